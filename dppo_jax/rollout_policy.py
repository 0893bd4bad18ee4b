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
from qwix import quantize

from dppo_jax.models.block import MATRICES
from dppo_jax.models.decoder import Params

State = Any  # a pytree of arrays that lives and is checkpointed with the run


class RolloutPolicy(NamedTuple):
    """Parameters to sample with, as a function of the trainer's and of what was remembered."""

    init: Callable[[Params], State]
    # (state, parameters before the step, step, key) -> (parameters to sample with, next state)
    choose: Callable[[State, Params, Int[Array, ""], Array], tuple[Params, State]]
    last: bool = False  # stores parameters in a form that no other policy takes


def chooser(policy: RolloutPolicy, remembers: bool = True) -> Callable[..., tuple[Params, State]]:
    """`policy.choose` as one program that donates the state, or with no next state.

    Parameters that the policy hands on are given back themselves: a program's results are copies.
    """
    structure: Any = None
    handed_on: list[int | None] = []  # of each leaf: which given one it is

    def changed(state, params, step, key):
        nonlocal structure, handed_on
        given = {id(leaf): index for index, leaf in enumerate(jax.tree.leaves(params))}
        chosen, state = policy.choose(state, params, step, key)
        leaves, structure = jax.tree.flatten(chosen)
        handed_on = [given.get(id(leaf)) for leaf in leaves]
        return [leaf for leaf in leaves if id(leaf) not in given], state if remembers else None

    program = jax.jit(changed, donate_argnums=0 if remembers else ())

    def choose(state, params, step, key):
        made, state = program(state, params, step, key)
        given, new = jax.tree.leaves(params), iter(made)
        leaves = [next(new) if index is None else given[index] for index in handed_on]
        return jax.tree.unflatten(structure, leaves), state

    return choose


def current() -> RolloutPolicy:
    """The trainer's parameters themselves: what differs is numerical alone."""
    return _mapped(lambda params, key: params)


def bfloat16_weights() -> RolloutPolicy:
    """Weights in bfloat16, in the sampler's memory too; activations keep the model's dtype."""
    return _mapped(lambda params, key: jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))


def int8_weights() -> RolloutPolicy:
    """The layers' matrices in 8-bit integers: W ≈ s·Q, a scale s for each output.

    s = max|W| over the inputs of an output / 127.5, as qwix's symmetric "absmax". They are int8 in
    the sampler's memory too, and floating point where a product reads them; activations keep the
    model's dtype. Embedding, unembedding, norms, biases and router stay as they are.
    """

    def quantised(params: Params, key: Array) -> Params:
        found = []

        def one(path, weight):
            if getattr(path[-1], "key", None) not in MATRICES or weight.ndim < 2:
                return weight
            found.append(path)
            each = [axis for axis in range(weight.ndim) if axis != weight.ndim - 2]
            return quantize(weight, jnp.int8, channelwise_axes=each)

        out = jax.tree_util.tree_map_with_path(one, params)
        if not found:
            raise ValueError("int8_weights: there is no layer's matrix among these parameters")
        return out

    return _mapped(quantised)._replace(last=True)


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
    if any(policy.last for policy in policies[:-1]):
        raise ValueError("int8_weights takes what others leave: make it the last of the chain")

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

    return RolloutPolicy(init, choose, last=any(policy.last for policy in policies))


def _mapped(function: Callable[[Params, Array], Params]) -> RolloutPolicy:
    """A rollout policy that remembers nothing."""
    return RolloutPolicy(
        lambda params: (), lambda state, params, step, key: (function(params, key), state)
    )
