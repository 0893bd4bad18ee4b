"""What an estimator may look at, and how the training loop calls one.

An estimator is a function whose parameters are named like fields of `AdvantageInputs`; it is called
with those. `def mine(rewards): ...` is one, and so is `def mine(rewards, response_mask): ...`;
parameters of other names are its settings. It returns an advantage a sequence [P, G], one a token
[B, T], or `TokenAdvantages` where a critic learns from it.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dppo_jax.records import Rollout


class TokenAdvantages(NamedTuple):
    """Advantages a token, and what the critic's values should have been."""

    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T *R"] | None = None


Estimator = Callable[..., Float[Array, "..."] | TokenAdvantages]


class AdvantageInputs(NamedTuple):
    """One step's samples; rows b = p*G + g, and values outside response_mask mean nothing."""

    rewards: Float[Array, "P G"]  # of each sequence, penalties included: Σ_t token_rewards
    token_rewards: Float[Array, "B T"]  # the reward at the last token, penalties at their own
    response_mask: Bool[Array, "B T"]
    logp_rollout: Float[Array, "B T"]
    sum_squared_probs: Float[Array, "B T"]  # Σ_v μ(v)² over the stored top K and the sampled token
    values_old: Float[Array, "B T *Q"] | None = None  # the critic's, before the update


def inputs_of(
    rewards: Float[Array, "P G"],
    rollout: Rollout,
    penalty: Float[Array, "B T"] | None = None,
    values_old: Float[Array, "B T *Q"] | None = None,
) -> AdvantageInputs:
    """The inputs of a step whose verifier gave `rewards`, less `penalty` at each token.

    A sequence's reward stands at its last response token; an empty response has none.
    """
    mask = rollout.response_mask
    last = mask & (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
    token_rewards = jnp.where(last, rewards.reshape(-1, 1).astype(jnp.float32), 0.0)
    if penalty is not None:
        lost = jnp.where(mask, penalty, 0.0)
        token_rewards = token_rewards - lost
        rewards = rewards - lost.sum(axis=1).reshape(rewards.shape)
    stored = jnp.square(jnp.exp(rollout.topk_logp_rollout)).sum(axis=-1)
    held = (rollout.topk_ids == rollout.response_tokens[..., None]).any(axis=-1)
    sampled = jnp.where(held, 0.0, jnp.square(jnp.exp(rollout.logp_rollout)))
    return AdvantageInputs(
        rewards, token_rewards, mask, rollout.logp_rollout, stored + sampled, values_old
    )


def named_inputs(estimator: Callable[..., Any]) -> frozenset[str]:
    """The parameters of `estimator` that the training loop fills."""
    return frozenset(inspect.signature(estimator).parameters) & set(AdvantageInputs._fields)


def estimate(estimator: Estimator, inputs: AdvantageInputs) -> TokenAdvantages:
    """The estimator's advantages at each token, a sequence's at all of its own."""
    names = named_inputs(estimator)
    if "values_old" in names and inputs.values_old is None:
        raise ValueError("this advantage estimator needs a critic: set train.critic")
    found = estimator(**{name: getattr(inputs, name) for name in names})
    if isinstance(found, TokenAdvantages):
        return found
    shape = inputs.response_mask.shape
    if found.shape == inputs.rewards.shape and found.shape != shape:
        return TokenAdvantages(jnp.broadcast_to(found.reshape(-1, 1), shape))
    if found.shape != shape:
        raise ValueError(
            f"the advantage estimator gave {found.shape}: return [P, G] = {inputs.rewards.shape} "
            f"or [B, T] = {shape}"
        )
    return TokenAdvantages(found)
