"""A mixture of experts: each token's MLP is a weighted sum of the few that a router picks for it.

Tokens are sorted by expert and multiplied group by group (`grouped`): no token is dropped, no
expert has a capacity, and the work is that of `experts_per_token` experts a token. On a mesh:
`expert_parallel`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.models.grouped import grouped_product

# "gate", "up", "down" -> the adapter's A [E, in, r] and s·B [E, r, out] (`adapters.Adapter`)
LowRank = Mapping[str, tuple[Array, Array]]


class Load(NamedTuple):
    """How the routers of some layers spread some tokens over their experts."""

    chosen: Float[Array, "*layers E"]  # how many tokens chose each expert
    probability: Float[Array, "*layers E"]  # sums over tokens of the router's; differentiable
    tokens: Float[Array, "*layers"]

    def loss(self) -> Float[Array, ""]:
        """E · Σ_e f_e P_e; k where both are even.

        Of the tokens of all layers the share f_e chooses expert e, and P_e is its mean probability:
        Switch Transformers (arXiv 2101.03961, eqs. 4-6), with the k choices and the layers joined
        as `load_balancing_loss_func` of transformers 5.23 does.
        """
        total = jnp.sum(self.tokens)
        share, mean = (jnp.sum(x, axis=0) / total for x in (self.chosen, self.probability))
        return share.shape[0] * jnp.sum(share * mean)

    def highest(self) -> Float[Array, ""]:
        """Tokens of the busiest expert of any layer, over those of an even load."""
        even = jnp.mean(self.chosen, axis=-1, keepdims=True)
        return jnp.max(self.chosen / jnp.maximum(even, 1.0 / self.chosen.shape[-1]))


class Routing(NamedTuple):
    """Where each token goes."""

    gates: Float[Array, "N k"]
    chosen: Int[Array, "N k"]
    native: Int[Array, "N k"]  # the router's own choice, which a replay overrides
    probability: Float[Array, "N E"]  # the router's, over all experts

    def load(self, real: Bool[Array, " N"]) -> Load:
        """Of the real tokens, by the router's own choice."""
        experts = self.probability.shape[1]
        kept = real[:, None].astype(jnp.float32)
        chosen = jax.nn.one_hot(self.native, experts) * kept[..., None]
        probability = jnp.sum(self.probability * kept, axis=0)
        return Load(jnp.sum(chosen, axis=(0, 1)), probability, jnp.sum(kept))


def route(
    y: Float[Array, "N D"],
    router: Float[Array, "D E"],
    experts_per_token: int,
    normalised: bool,
    replayed: Int[Array, "N k"] | None = None,
) -> Routing:
    """Gates and ids of each token's experts, most likely first; all in float32.

    The k largest of p = softmax(y·router), divided by their sum where `normalised`
    (Qwen3-MoE, arXiv 2505.09388; transformers' Qwen3MoeTopKRouter). Ids of `replayed` take the
    place of the k largest, except where they are negative; the gates are this router's at them, so
    that its gradient flows (Rollout Routing Replay, arXiv 2510.11370).
    """
    logits = jnp.dot(y.astype(jnp.float32), router, preferred_element_type=jnp.float32)
    p = jax.nn.softmax(logits, axis=-1)
    _, native = jax.lax.top_k(jax.lax.stop_gradient(p), experts_per_token)
    chosen = native
    if replayed is not None:
        chosen = jnp.where(replayed < 0, native, replayed.astype(native.dtype))
    if normalised:  # p / Σp without a quotient of two tiny numbers
        gates = jax.nn.softmax(jnp.take_along_axis(logits, chosen, axis=-1), axis=-1)
    else:
        gates = jnp.take_along_axis(p, chosen, axis=-1)
    return Routing(gates, chosen, native, p)


class Experts(NamedTuple):
    """The experts of each fed token in each layer; negative where there is no such token."""

    prompt: Int[Array, "P L layers k"]
    response: Int[Array, "B T layers k"]

    def only(self, prompt_mask: Bool[Array, "P L"], response_mask: Bool[Array, "B T"]) -> "Experts":
        """Those of the tokens that another token follows, -1 at all others."""
        followed = jnp.pad(response_mask[:, 1:], ((0, 0), (0, 1)))
        return Experts(
            jnp.where(prompt_mask[..., None, None], self.prompt, -1),
            jnp.where(followed[..., None, None], self.response, -1),
        )


def stored_ids(experts: int) -> jnp.dtype:
    """The smallest type that holds an expert's id, and -1 for none."""
    return jnp.dtype(jnp.int8 if experts <= 128 else jnp.int16)


def differing_choices(
    recorded: Int[Array, "*N k"], native: Int[Array, "*N k"]
) -> tuple[Int[Array, "*N"], Int[Array, "*N"]]:
    """Of each token's recorded experts: how many its router would not choose, and how many.

    Order does not matter; ids below 0 are not recorded.
    """
    known = recorded >= 0
    same = jnp.any(recorded[..., :, None] == native[..., None, :], axis=-1)
    return jnp.sum(known & ~same, axis=-1), jnp.sum(known, axis=-1)


def expert_mlps(
    y: Float[Array, "N D"],
    gates: Float[Array, "N k"],
    chosen: Int[Array, "N k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    activation: Callable[[Array], Array],
    adapters: LowRank | None = None,
) -> Float[Array, "N D"]:
    """Σ_j gates_j · (activation(y·gate_e) * y·up_e)·down_e with e = chosen_j.

    With `adapters` every W stands for W + A·(s·B).
    """
    tokens, each = chosen.shape
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=len(gate)).astype(jnp.int32)
    grouped = y[order // each]

    out = grouped_mlps(grouped, sizes, gate, up, down, activation, adapters)
    by_token = out[jnp.argsort(order)].reshape(tokens, each, -1)
    return jnp.einsum("nkd,nk->nd", by_token, gates.astype(y.dtype))


def grouped_mlps(
    x: Float[Array, "M D"],
    sizes: Int[Array, " E"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    activation: Callable[[Array], Array],
    adapters: LowRank | None = None,
    summed: tuple[str, ...] = (),
) -> Float[Array, "M D"]:
    """Each expert's MLP on its rows: the first sizes_0 are expert 0's, and so on.

    `summed`: mesh axes that D is split over, inside `jax.shard_map`.
    """

    def product(x: Array, name: str, weight: Array) -> Array:
        out = grouped_product(x, weight.astype(x.dtype), sizes)
        if adapters and name in adapters:
            a, b = (factor.astype(x.dtype) for factor in adapters[name])
            out += grouped_product(grouped_product(x, a, sizes), b, sizes)
        return out

    opened, linear = product(x, "gate", gate), product(x, "up", up)
    if summed:
        opened, linear = jax.lax.psum((opened, linear), summed)
    return product(activation(opened) * linear, "down", down)
