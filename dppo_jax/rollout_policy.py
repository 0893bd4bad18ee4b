"""Which parameters a step samples from: the trained ones, or a deliberate mismatch with them.

A `RolloutPolicy` stands between the trainer's parameters and the sampler's. Mismatch made on
purpose (arXiv 2602.04879 studies what accident makes of it) is how methods are compared on a
small model, whose own mismatch is too small to hurt any. Each is a factory bound in gin:

    train.train.rollout_policy = @rollout_policy.stale()
    rollout_policy.stale.steps = 8
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dppo_jax.models.decoder import Params

State = Any  # a pytree of arrays that lives and is checkpointed with the run


class RolloutPolicy(NamedTuple):
    """Parameters to sample with, as a function of the trainer's and of what was remembered."""

    init: Callable[[Params], State]
    # (state, parameters before the step, step, key) -> (parameters to sample with, next state)
    choose: Callable[[State, Params, Int[Array, ""], Array], tuple[Params, State]]


def current() -> RolloutPolicy:
    """The trainer's parameters themselves: what differs is numerical alone."""
    return _mapped(lambda params, key: params)


def bfloat16_weights() -> RolloutPolicy:
    """Weights rounded to bfloat16; activations keep the model's dtype."""

    def round_to_bfloat16(params: Params, key: Array) -> Params:
        return jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(p.dtype), params)

    return _mapped(round_to_bfloat16)


def noisy_weights(scale: float) -> RolloutPolicy:
    """w + scale · rms(w) · ε with ε ~ N(0, 1) drawn anew each step; rms over each array."""
    if scale < 0:
        raise ValueError(f"scale={scale} must not be negative")

    def add_noise(params: Params, key: Array) -> Params:
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        noisy = [
            p + scale * jnp.sqrt(jnp.mean(p**2)) * jax.random.normal(k, p.shape, p.dtype)
            for p, k in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(treedef, noisy)

    return _mapped(add_noise)


def stale(steps: int) -> RolloutPolicy:
    """The parameters of `steps` steps ago; the first ones until there are such.

    Remembers `steps` copies of the parameters (with LoRA of the adapters), on the devices and in
    the checkpoints.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: rollouts are at least 1 step old; current() has none")

    def changing(params: Params) -> Params:
        return params.get("adapters", params)

    def init(params: Params) -> State:
        return jax.tree.map(lambda p: jnp.repeat(p[None], steps, axis=0), changing(params))

    def choose(
        history: State, params: Params, step: Int[Array, ""], key: Array
    ) -> tuple[Params, State]:
        slot = step % steps  # written `steps` steps ago, and now again
        oldest = jax.tree.map(lambda h: h[slot], history)
        history = jax.tree.map(lambda h, p: h.at[slot].set(p), history, changing(params))
        return params | {"adapters": oldest} if "adapters" in params else oldest, history

    return RolloutPolicy(init, choose)


def chained(policies: Sequence[RolloutPolicy]) -> RolloutPolicy:
    """One after the other: `(@rollout_policy.stale(), @rollout_policy.bfloat16_weights())`."""

    def init(params: Params) -> State:
        return [policy.init(params) for policy in policies]

    def choose(
        states: State, params: Params, step: Int[Array, ""], key: Array
    ) -> tuple[Params, State]:
        after = []
        for index, (policy, state) in enumerate(zip(policies, states, strict=True)):
            params, state = policy.choose(state, params, step, jax.random.fold_in(key, index))
            after.append(state)
        return params, after

    return RolloutPolicy(init, choose)


def _mapped(function: Callable[[Params, Array], Params]) -> RolloutPolicy:
    """A rollout policy that remembers nothing."""
    return RolloutPolicy(
        lambda params: (), lambda state, params, step, key: (function(params, key), state)
    )
