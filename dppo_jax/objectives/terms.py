"""Terms a token that are added to an objective's loss, weighted and divided as it is."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax.objectives.policy_gradient import zero_padding
from dppo_jax.records import Batch, LossSum, Mean, Metrics, Need, Objective, TokenLocal, TokenStats

Term = Callable[[TokenStats, Batch], Float[Array, "B T"]]


def with_term(
    objective: Objective,
    term: Term,
    *,
    name: str,
    needs: frozenset[Need] = frozenset(),
    metrics: Callable[[TokenStats, Batch], Metrics] | None = None,
) -> Objective:
    """L' = L + agg(term), with the objective's own aggregation, so that sums still add exactly.

    `term` sees values that are 0 outside response_mask, and is ignored there; at a token it may
    depend on that token's entries alone. `name` is the metric of its mean, `metrics` are more.
    """
    aggregate = objective.aggregate
    if aggregate is None:
        raise ValueError(f"{name} cannot be added: the objective does not say how it aggregates")

    def loss(stats: TokenStats, batch: Batch) -> LossSum:
        base = objective.loss(stats, batch)
        mask = batch.rollout.response_mask
        inside = zero_padding(stats, batch)
        weights = aggregate(mask)
        added = jnp.sum(weights.token * jnp.where(mask, term(*inside), 0.0))
        own = {name: Mean(added, base.weight_sum)} | (metrics(*inside) if metrics else {})
        return LossSum(
            base.loss_sum + added,
            base.weight_sum,
            base.metrics | jax.lax.stop_gradient(own),
        )

    def one_by_one(stats: TokenStats, batch: Batch) -> Float[Array, "B T"]:
        assert local is not None
        added = term(*zero_padding(stats, batch))
        return local.loss(stats, batch) + jnp.where(batch.rollout.response_mask, added, 0.0)

    local = objective.token_local
    return objective._replace(
        loss=loss,
        needs=objective.needs | needs,
        token_local=local and TokenLocal(one_by_one, local.weights),
    )


def with_entropy_bonus(objective: Objective, coefficient: float = 0.001) -> Objective:
    """Rewards a policy for being undecided: L' = L - c · agg(H(π(·|s_t))), H in nats.

    PPO (arXiv 1707.06347) eq. 9. Differentiated through the head, exact over the vocabulary, of the
    distribution at the sampling temperature.
    """
    return with_term(
        objective, lambda stats, batch: -coefficient * stats.entropy, name="loss/entropy_bonus"
    )
