"""A mixture of experts: each token's MLP is a weighted sum of the few that a router picks for it.

Tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`): no token is
dropped, no expert has a capacity, and the work is that of `experts_per_token` experts a token.

On a mesh every device sorts its own tokens and no token travels: the experts' weights, split where
they are stored (FSDP), are gathered for a layer at a time; over `tensor` each expert's inner
dimension is split and the parts of its output are summed.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dppo_jax.sharding import spec_of

# "gate", "up", "down" -> the adapter's A [E, in, r] and s·B [E, r, out] (`adapters.Adapter`)
LowRank = Mapping[str, tuple[Array, Array]]


def route(
    y: Float[Array, "N D"], router: Float[Array, "D E"], experts_per_token: int, normalised: bool
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """Gates and ids of each token's experts, most likely first; all in float32.

    The k largest of p = softmax(y·router), divided by their sum where `normalised`
    (Qwen3-MoE, arXiv 2505.09388; transformers' Qwen3MoeTopKRouter).
    """
    logits = jnp.dot(y.astype(jnp.float32), router, preferred_element_type=jnp.float32)
    gates, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts_per_token)
    if normalised:
        gates /= jnp.sum(gates, axis=-1, keepdims=True)
    return gates, chosen


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

    def product(x: Array, name: str, weight: Array) -> Array:
        out = jax.lax.ragged_dot(x, weight.astype(x.dtype), sizes)
        if adapters and name in adapters:
            a, b = (factor.astype(x.dtype) for factor in adapters[name])
            out += jax.lax.ragged_dot(jax.lax.ragged_dot(x, a, sizes), b, sizes)
        return out

    opened, linear = product(grouped, "gate", gate), product(grouped, "up", up)
    out = product(activation(opened) * linear, "down", down)
    by_token = out[jnp.argsort(order)].reshape(tokens, each, -1)
    return jnp.einsum("nkd,nk->nd", by_token, gates.astype(y.dtype))


def expert_mlps_on_mesh(
    y: Float[Array, "N D"],
    gates: Float[Array, "N k"],
    chosen: Int[Array, "N k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    activation: Callable[[Array], Array],
    adapters: LowRank | None = None,
) -> Float[Array, "N D"]:
    """`expert_mlps`, its rows split as "batch" is and F as "mlp" on the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return expert_mlps(y, gates, chosen, gate, up, down, activation, adapters)
    rows = spec_of(("tokens",), mesh, "compute")
    into = spec_of((None, None, "mlp"), mesh, "compute")
    out = spec_of((None, "mlp"), mesh, "compute")
    whole = spec_of((), mesh, "compute")
    adapters = dict(adapters or {})
    low_rank = {name: (out, whole) if name == "down" else (whole, into) for name in adapters}

    def local(y, gates, chosen, gate, up, down, adapters):
        part = expert_mlps(y, gates, chosen, gate, up, down, activation, adapters)
        return jax.lax.psum(part, "tensor")

    specs = (rows, rows, rows, into, into, out, low_rank)
    split = jax.shard_map(local, in_specs=specs, out_specs=rows)
    return split(y, gates, chosen, gate, up, down, adapters)
