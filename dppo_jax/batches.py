"""From a rollout and its rewards to the `Batch` that the objective asks for."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax import packing
from dppo_jax.advantages import Estimator, estimate, inputs_of, named_inputs
from dppo_jax.critic import Critic, HeadCritic
from dppo_jax.models.decoder import Decoder, Model, Params
from dppo_jax.parts import over_packed
from dppo_jax.records import (
    Batch,
    Mean,
    Metrics,
    Need,
    Objective,
    Rollout,
    TokenStats,
    TrainState,
)
from dppo_jax.scoring import Also, score, with_own_routing
from dppo_jax.sharding import constrain

# Subtracted from the reward at each token; called with what it names of `PENALTY_INPUTS`, [B, T].
RewardPenalty = Callable[..., Float[Array, "B T"]]
PENALTY_INPUTS = frozenset({"logp_rollout", "logp_ref", "response_mask"})


def needs_of(
    objective: Objective, advantage: Estimator, penalty: RewardPenalty | None
) -> frozenset[Need]:
    """What the training loop must provide for all three."""
    needs = set(objective.needs)
    if "values_old" in named_inputs(advantage):
        needs.add("values")
    if penalty is not None and "logp_ref" in inspect.signature(penalty).parameters:
        needs.add("logp_ref")
    return frozenset(needs)


def make_batch_of(
    model: Model,
    objective: Objective,
    advantage: Estimator,
    penalty: RewardPenalty | None = None,
    critic: Critic | HeadCritic | None = None,
    *,
    temperature: float,
    replay_own_routing: bool = False,
    tokens_per_microbatch: int | None = None,
) -> Callable[..., tuple[Batch, Metrics]]:
    """(state, reference's parameters, rollout, rewards [P, G]) -> (batch, metrics), jitted.

    With LoRA the base's parameters are a fifth argument.

    Whatever must be known before the step's updates is scored here, once: the policy itself, the
    reference and the critic, each only where somebody asks for it. With `replay_own_routing` the
    batch's rollout gets the experts that the policy's routers choose here. With
    `tokens_per_microbatch` the sequences are scored packed, as the update does.
    """
    needs = needs_of(objective, advantage, penalty)

    def scored(params, rollout, of, also=None) -> TokenStats:
        if of is None:
            return score(model, params, rollout, temperature=temperature, also=also)
        budget = packing.budget_of(tokens_per_microbatch or 0, rollout)
        return score_packed(model, params, rollout, of, budget, temperature=temperature, also=also)

    def fields_of(state, reference, rollout, rewards, base, of) -> tuple[dict[str, Any], Metrics]:
        fields: dict[str, Any] = {}
        policy = model.policy(state.params, base)
        if replay_own_routing:
            fields["rollout"] = rollout = with_own_routing(model, policy, rollout)
        old = None
        if critic is not None or needs & {"logp_old", "uniform_logp"}:

            def also(_: Decoder, states: Array, rollout: Rollout) -> dict[str, Array]:
                if critic is None:
                    return {}
                return {"values": critic.values(state.critic.params, rollout, states)}

            old = scored(policy, rollout, of, also)
            fields["values_old"] = old.values
        if needs & {"logp_old", "uniform_logp"}:
            assert old is not None
            fields |= dict(
                logp_old=old.logp, topk_logp_old=old.topk_logp, uniform_logp_old=old.uniform_logp
            )
        if "logp_ref" in needs:
            # Another policy than the one whose routing is recorded: its own routers choose.
            alone = replace(rollout, prompt_experts=None, experts=None)
            fields["logp_ref"] = scored(reference, alone, of).logp
        metrics: Metrics = {}
        lost = None
        if penalty is not None:
            known = dict(logp_rollout=rollout.logp_rollout, response_mask=rollout.response_mask)
            known |= {name: fields[name] for name in ("logp_ref",) if name in fields}
            named = PENALTY_INPUTS & set(inspect.signature(penalty).parameters)
            lost = penalty(**{name: known[name] for name in named})
            total = jnp.sum(lost, where=rollout.response_mask)
            metrics["reward/penalty"] = Mean(total, jnp.float32(len(lost)))  # of a sequence
        inputs = inputs_of(rewards, rollout, lost, fields.get("values_old"))
        found = estimate(advantage, inputs)
        fields |= dict(advantages=found.advantages, returns=found.returns)
        if critic is not None and found.returns is not None:
            explained = _explained(fields["values_old"], found.returns, rollout.response_mask)
            metrics["critic/explained_variance"] = Mean(explained, jnp.float32(1))
        return fields, metrics

    jitted = jax.jit(fields_of)

    def batch_of(
        state: TrainState,
        reference: Params | None,
        rollout: Rollout,
        rewards: Array,
        base: Params | None = None,
    ) -> tuple[Batch, Metrics]:
        if not isinstance(rollout.response_tokens, jax.core.Tracer):  # a plan traces this
            check_ids(rollout, model.config.vocab_size)
        of = None
        scores = critic is not None or needs & {"logp_old", "uniform_logp", "logp_ref"}
        if tokens_per_microbatch is not None and scores:
            of = packing.plan_of(rollout, packing.budget_of(tokens_per_microbatch, rollout))
        fields, metrics = jitted(state, reference, rollout, rewards, base, of)
        return Batch(**{"rollout": rollout} | fields), metrics

    return batch_of


def check_ids(rollout: Rollout, vocabulary: int) -> None:
    """Refuses token ids outside the vocabulary, which a source of rollouts elsewhere may send.

    Scored, they would be NaN.
    """
    for name, (lowest, highest) in _ranges(rollout).items():
        lowest, highest = int(lowest), int(highest)
        if lowest < 0 or highest >= vocabulary:
            raise ValueError(
                f"the rollout's {name} holds token id {lowest if lowest < 0 else highest}, outside "
                f"the model's vocabulary of {vocabulary}: does the sampler serve another model?"
            )


@jax.jit
def _ranges(rollout: Rollout) -> dict[str, tuple[Array, Array]]:
    """The least and the largest id of a field, padding left out."""
    masks = {
        "prompt_tokens": rollout.prompt_mask,
        "response_tokens": rollout.response_mask,
        "topk_ids": rollout.response_mask[..., None],
    }
    found = {}
    for name, mask in masks.items():
        ids = jnp.where(mask, getattr(rollout, name), 0)
        if ids.size:
            found[name] = constrain(jnp.min(ids)), constrain(jnp.max(ids))
    return found


def score_packed(
    model: Model,
    params: Params,
    rollout: Rollout,
    of: packing.Plan,
    budget: packing.Budget,
    *,
    temperature: float,
    also: Also | None = None,
) -> TokenStats:
    """`score` of packed sequences, microbatch by microbatch of the plan."""

    def of_part(rows: Rollout) -> dict[str, Array | None]:
        stats = score(model, params, rows, temperature=temperature, also=also)
        names = ("logp", "topk_logp", "entropy", "uniform_logp", "values")
        return {name: getattr(stats, name) for name in names}

    return TokenStats(**over_packed(of_part, rollout, of, budget, len(rollout.response_tokens)))


def _explained(values: Array, returns: Array, mask: Array) -> Array:
    """1 - var(R - V) / var(R) over response tokens: 1 is a critic that knows, 0 one that guesses
    the mean; 0 where all returns are equal."""
    if values.ndim == 3:
        values, returns = values.mean(axis=-1), returns.mean(axis=-1)

    def variance(x):
        mean = jnp.mean(x, where=mask)
        return jnp.mean(jnp.square(x - mean), where=mask)

    spread = variance(returns)
    return jnp.where(spread > 0, 1.0 - variance(returns - values) / spread, 0.0)
