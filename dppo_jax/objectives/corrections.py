"""Rollout corrections: weights for tokens that the sampler drew from another policy.

A correction maps a batch to weights >= 0, always constants for the gradient. `corrected` multiplies
every token's loss by them, whatever the loss is: its penalties too (DRPO's, CPGD's drift), as verl
does, but not terms that are added to it (KL to a reference, entropy, a critic's).

ρ is old/μ at each token by default (`old_policy`: for objectives at old_anchor, verl's "decoupled"
form) or π/μ (`current_policy`: for losses that have no ratio of their own). With an objective whose
weight is π/μ already, neither is needed. log ρ, and its sum over a sequence, is clipped to ±20 as
in verl.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax.objectives.measures import Anchor, old_anchor, rollout_anchor
from dppo_jax.records import Batch, LossSum, Max, Mean, Metrics, Need, Objective, Scope, TokenStats

LOG_BOUND = 20.0


class Corrected(NamedTuple):
    """Whose probabilities stand above μ in ρ, and what the training loop must provide."""

    logp: Callable[[TokenStats, Batch], Float[Array, "B T"]]
    needs: frozenset[Need] = frozenset()


def old_policy() -> Corrected:
    """The trainer's recomputation before the update: ρ is the mismatch of sampler and trainer."""
    old = old_anchor()
    return Corrected(lambda stats, batch: old.logps(batch).logp, old.needs)


def current_policy() -> Corrected:
    """The policy being trained: ρ is mismatch and staleness together (verl's bypass mode)."""
    return Corrected(lambda stats, batch: stats.logp)


class Correction(NamedTuple):
    """A weight >= 0 for each token; meaningless outside response_mask."""

    weight: Callable[[TokenStats, Batch], Float[Array, "B T"]]
    needs: frozenset[Need] = frozenset()
    scope: Scope = "token"


def corrected(objective: Objective, correction: Correction) -> Objective:
    """The objective with the loss of each token multiplied by sg[weight].

    Its masks, budgets and targets are those of the objective alone. Adds the metrics
    correction/weight, correction/weight_max and correction/dropped, the share of tokens with weight
    0; those are not counted in mask/*.
    """

    def weighted(stats: TokenStats, batch: Batch) -> Batch:
        weight = jax.lax.stop_gradient(correction.weight(stats, batch))
        weight = jnp.where(batch.rollout.response_mask, weight, 0.0)
        before = 1.0 if batch.loss_weights is None else batch.loss_weights
        return replace(batch, loss_weights=weight * before)

    def loss(stats: TokenStats, batch: Batch) -> LossSum:
        batch = weighted(stats, batch)
        weight, mask = batch.loss_weights, batch.rollout.response_mask
        assert weight is not None
        result = objective.loss(stats, batch)
        tokens = mask.sum().astype(jnp.float32)
        metrics: Metrics = {
            "correction/weight": Mean(weight.sum(), tokens),
            "correction/weight_max": Max(weight.max(initial=0.0)),
            "correction/dropped": Mean(jnp.sum(mask & (weight == 0)).astype(jnp.float32), tokens),
        }
        return result._replace(metrics=metrics | result.metrics)

    scopes: tuple[Scope, ...] = ("token", "sequence", "prompt", "batch")
    local = objective.token_local if correction.scope == "token" else None
    if local is not None:
        of_token = local.loss
        local = local._replace(loss=lambda stats, batch: of_token(stats, weighted(stats, batch)))
    return objective._replace(
        loss=loss,
        needs=objective.needs | correction.needs,
        token_local=local,
        scope=max(objective.scope, correction.scope, key=scopes.index),
    )


def product(*corrections: Correction) -> Correction:
    """All of them at once: their weights multiplied."""

    def weight(stats: TokenStats, batch: Batch) -> Float[Array, "B T"]:
        result = jnp.ones_like(stats.logp)
        for correction in corrections:
            result = result * correction.weight(stats, batch)
        return result

    needs = frozenset[Need]().union(*(correction.needs for correction in corrections))
    wide = any(correction.scope != "token" for correction in corrections)
    return Correction(weight, needs, "sequence" if wide else "token")


def tis(cap: float = 2.0, policy: Callable[[], Corrected] = old_policy) -> Correction:
    """Truncated importance sampling: min(ρ, C) a token. verl and slime, C = 2."""
    _check_cap(cap)
    return _by_token(lambda log_rho: jnp.minimum(jnp.exp(log_rho), cap), policy)


def sequence_tis(cap: float = 5.0, policy: Callable[[], Corrected] = old_policy) -> Correction:
    """min(Π ρ, C) at all tokens of a sequence. SkyRL@a9564572, C = 5."""
    _check_cap(cap)
    return _by_sequence(lambda total, mean: jnp.minimum(jnp.exp(total), cap), policy)


def icepop(
    lowest: float = 0.5, highest: float = 5.0, policy: Callable[[], Corrected] = old_policy
) -> Correction:
    """IcePop: ρ·1[lowest <= ρ <= highest] a token; bounds of NeMo-RL@7ea279ab's reference.

    With `lowest` 0 it is masked importance sampling a token; `sequence_mis` is both a sequence.
    """
    _check_bounds(lowest, highest)
    return _by_token(lambda log_rho: _inside(jnp.exp(log_rho), lowest, highest), policy)


def sequence_mis(
    highest: float = 3.0, lowest: float = 0.0, policy: Callable[[], Corrected] = old_policy
) -> Correction:
    """Masked importance sampling: Π ρ where lowest <= Π ρ <= highest, else 0.

    TRL@f2cd57710 mode "sequence_mask", C = 3, on by default there with vLLM.
    """
    _check_bounds(lowest, highest)
    return _by_sequence(lambda total, mean: _inside(jnp.exp(total), lowest, highest), policy)


def product_mask(
    lowest: float = 0.5, highest: float = 2.0, policy: Callable[[], Corrected] = old_policy
) -> Correction:
    """1 where Π ρ of the sequence is within the bounds, else 0: rejection, no weight.

    verl@1dda039b rollout_corr_helper, sequence level; C = 2 is its threshold, 1/2 its inverse.
    """
    _check_bounds(lowest, highest)
    return _by_sequence(
        lambda total, mean: jnp.sign(_inside(jnp.exp(total), lowest, highest)), policy
    )


def geometric_mask(
    lowest: float = 0.999, highest: float = 1.002, policy: Callable[[], Corrected] = old_policy
) -> Correction:
    """1 where the sequence's geometric mean of ρ is within the bounds, else 0: NeMo-RL's values."""
    _check_bounds(lowest, highest)
    return _by_sequence(
        lambda total, mean: jnp.sign(_inside(jnp.exp(mean), lowest, highest)), policy
    )


def opsm(threshold: float = 0.5, anchor: Callable[[], Anchor] = rollout_anchor) -> Correction:
    """Off-policy sequence masking: 0 where A < 0 and mean_t log(anchor/π) > threshold, else 1.

    DeepSeek-V3.2; TRL@f2cd57710 off_policy_mask_threshold, for which 0.5 is its example; slime uses
    1e-4 at old_anchor.
    """

    def mean(gap: Float[Array, "B T"], batch: Batch) -> Float[Array, "B 1"]:
        mask = batch.rollout.response_mask
        total = jnp.sum(gap, axis=1, keepdims=True, where=mask)
        return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)

    return _off_policy(mean, threshold, anchor, "sequence")


def opsm_token(threshold: float = 0.5, anchor: Callable[[], Anchor] = rollout_anchor) -> Correction:
    """OPSM's rule for each token by itself: 0 where A < 0 and log(anchor/π) > threshold."""
    return _off_policy(lambda gap, batch: gap, threshold, anchor, "token")


def _off_policy(
    summary: Callable[[Float[Array, "B T"], Batch], Float[Array, "B _"]],
    threshold: float,
    anchor: Callable[[], Anchor],
    scope: Scope,
) -> Correction:
    centre = anchor()

    def weight(stats: TokenStats, batch: Batch) -> Float[Array, "B T"]:
        far = summary(centre.logps(batch).logp - stats.logp, batch) > threshold
        return jnp.where(far & (batch.advantages < 0), 0.0, 1.0)

    return Correction(weight, centre.needs, scope)


def _check_cap(cap: float) -> None:
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")


def _check_bounds(lowest: float, highest: float) -> None:
    if not 0 <= lowest <= highest:
        raise ValueError(f"bounds must be 0 <= lowest <= highest, got {lowest} and {highest}")


def _inside(rho: Float[Array, "B _"], lowest: float, highest: float) -> Float[Array, "B _"]:
    return jnp.where((rho >= lowest) & (rho <= highest), rho, 0.0)


def _log_rho(policy: Corrected, stats: TokenStats, batch: Batch) -> Float[Array, "B T"]:
    gap = policy.logp(stats, batch) - batch.rollout.logp_rollout
    return jnp.where(batch.rollout.response_mask, gap, 0.0)


def _by_token(
    rule: Callable[[Float[Array, "B T"]], Float[Array, "B T"]], policy: Callable[[], Corrected]
) -> Correction:
    above = policy()

    def weight(stats: TokenStats, batch: Batch) -> Float[Array, "B T"]:
        return rule(jnp.clip(_log_rho(above, stats, batch), -LOG_BOUND, LOG_BOUND))

    return Correction(weight, above.needs)


def _by_sequence(
    rule: Callable[[Float[Array, "B 1"], Float[Array, "B 1"]], Float[Array, "B 1"]],
    policy: Callable[[], Corrected],
) -> Correction:
    """`rule` sees log Π ρ and its mean over tokens, each clipped."""
    above = policy()

    def weight(stats: TokenStats, batch: Batch) -> Float[Array, "B T"]:
        log_rho = _log_rho(above, stats, batch)
        total = log_rho.sum(axis=1, keepdims=True)
        mean = total / jnp.maximum(batch.rollout.response_mask.sum(axis=1, keepdims=True), 1)
        whole = rule(*(jnp.clip(log, -LOG_BOUND, LOG_BOUND) for log in (total, mean)))
        return jnp.broadcast_to(whole, log_rho.shape)

    return Correction(weight, above.needs, "sequence")
