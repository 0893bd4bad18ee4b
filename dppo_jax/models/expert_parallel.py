"""Experts on a mesh: each device along `expert` has some of them, and tokens travel to theirs.

No token is dropped and no expert has a capacity, so that a device must have room for whatever comes
to it: its tokens go in as many pieces as the axis has devices, and a piece's room is what the
tokens would need without the axis. The products take the time of the rows in use: on TPUs XLA's
`ragged_dot` is a kernel whose grid ends with them (megablox' gmm, compiled for the same shapes,
moves 1.9 times the bytes by the compiler's count).

Two ways there and back, the same numbers:

* "ragged": each choice of a token is a row that is sent to its expert's device and back
  (`jax.lax.ragged_all_to_all`): 2·n·k·D numbers a device, a little less for those that stay.
* "gathered": every device sees all tokens along the axis, and the parts of their outputs are summed
  where they came from: 2·(devices - 1)·n·D numbers. Less where the axis is no longer than k, and
  the only way where there is no ragged exchange, as on CPUs.

Elsewhere experts are whole along `expert`, and their weights, split where they are stored (FSDP),
are gathered for a layer at a time; over `tensor` each expert's inner dimension is split and the
parts of its output are summed. In the decode view no weight moves: activations are split as the
weights are, and summed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dppo_jax.kernels import tiles
from dppo_jax.models.fsdp import Axes, whole
from dppo_jax.models.moe import LowRank, expert_mlps, grouped_mlps
from dppo_jax.sharding import axes_of, current_view, mesh_here, spec_of

AXIS = "expert"
Transport = Literal["ragged", "gathered"]


def expert_mlps_on_mesh(
    y: Float[Array, "N D"],
    gates: Float[Array, "N k"],
    chosen: Int[Array, "N k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    activation: Callable[[Array], Array],
    adapters: LowRank | None = None,
    transport: Transport | None = None,
) -> Float[Array, "N D"]:
    """`moe.expert_mlps` on the mesh that is set, in the view that is current.

    Tokens lie as the rules have "tokens", experts as "experts", F as "mlp". `transport` None
    chooses by the axis' length and the platform.
    """
    mesh = mesh_here()
    if mesh.empty or mesh.size == 1:
        return expert_mlps(y, gates, chosen, gate, up, down, activation, adapters)
    view = current_view()
    spec = partial(spec_of, mesh=mesh, view=view)
    stored = partial(spec_of, mesh=mesh, view=view if view == "decode" else "parameters")
    of = {"gate": ("experts", *_INTO), "up": ("experts", *_INTO), "down": ("experts", *_INTO[::-1])}
    inner = axes_of("mlp", mesh, view, gate.shape[-1])
    devices = mesh.shape[AXIS]
    stationary = view == "decode"
    if stationary:
        taken = axes_of("experts", mesh, view)
        split = tuple(axis for axis in axes_of("embed", mesh, view) if axis not in taken)
        choices = spec(("tokens",))
        rows = jax.sharding.PartitionSpec(choices[0] if choices else None, split or None)
    else:
        split, rows = (), spec(("tokens",))
        choices = rows
    if transport is None:
        there = tiles.target().platform == "tpu" and devices > chosen.shape[1]
        transport = "ragged" if there else "gathered"

    def local(y, gates, chosen, gate, up, down, adapters):
        if not stationary:
            gate, up, down = (
                whole(part, of[name], mesh)
                for name, part in (("gate", gate), ("up", up), ("down", down))
            )
            adapters = {
                name: tuple(
                    whole(factor, axes, mesh)
                    for factor, axes in zip(factors, _low_rank(of[name]), strict=True)
                )
                for name, factors in adapters.items()
            }
        here = _Here(gate, up, down, adapters, activation, split)
        if stationary:
            return lax.psum(_of_my_experts(here, y, gates, chosen), (AXIS, *inner))
        if devices == 1:
            out = expert_mlps(y, gates, chosen, gate, up, down, activation, adapters)
        else:
            exchange = {"ragged": _ragged, "gathered": _gathered}[transport]
            out = _in_pieces(partial(exchange, here), devices, y, gates, chosen)
        return lax.psum(out, inner) if inner else out

    low_rank = {
        name: tuple(
            stored(axes, shape=factor.shape)
            for axes, factor in zip(_low_rank(of[name]), factors, strict=True)
        )
        for name, factors in (adapters or {}).items()
    }
    weights = zip(of.values(), (gate, up, down), strict=True)
    specs = (rows, choices, choices, *(stored(a, shape=w.shape) for a, w in weights), low_rank)
    run = jax.shard_map(local, in_specs=specs, out_specs=rows, check_vma=False)
    return run(y, gates, chosen, gate, up, down, dict(adapters or {}))


_INTO = ("embed", "mlp")


def _low_rank(axes: Axes) -> tuple[Axes, Axes]:
    """Logical axes of the two factors of an adapter of experts' matrices."""
    experts, into, out = axes
    return (experts, into, None), (experts, None, out)


class _Here(NamedTuple):
    """This device's experts."""

    gate: Float[Array, "e D F"]
    up: Float[Array, "e D F"]
    down: Float[Array, "e F D"]
    adapters: LowRank
    activation: Callable[[Array], Array]
    split: tuple[str, ...]  # mesh axes that D is split over, too

    @property
    def number(self) -> int:
        return len(self.gate)

    def mine(self, chosen: Int[Array, "..."]) -> Int[Array, "..."]:
        """Ids counted from this device's first expert; `number` for experts of others."""
        local = chosen - lax.axis_index(AXIS) * self.number
        return jnp.where((local >= 0) & (local < self.number), local, self.number)

    def outputs(
        self, x: Float[Array, "M D"], source: Int[Array, " R"], expert: Int[Array, " R"], room: int
    ) -> Float[Array, "R D"]:
        """The output of row source_i of x through `expert`_i, 0 where that is `number`.

        At most `room` rows have an expert here. What the products leave beyond the rows in use is
        undefined, and so is their gradient: both are replaced, not multiplied, by 0.
        """
        order = jnp.argsort(expert, stable=True)
        sizes = jnp.bincount(expert, length=self.number).astype(jnp.int32)
        used = (jnp.arange(room) < jnp.sum(sizes))[:, None]
        grouped = jnp.where(used, x[source[order[:room]]], 0)
        weights = self.gate, self.up, self.down
        out = grouped_mlps(grouped, sizes, *weights, self.activation, self.adapters, self.split)
        out = jnp.where(used, out, 0)
        place = jnp.argsort(order)
        return jnp.where((place < room)[:, None], out[jnp.minimum(place, room - 1)], 0)


def _of_my_experts(here: _Here, y, gates, chosen) -> Float[Array, "N D"]:
    """The part of each token's output that this device's experts make."""
    tokens, each = chosen.shape
    source = jnp.repeat(jnp.arange(tokens), each)
    room = tokens * min(each, here.number)
    out = here.outputs(y, source, here.mine(chosen.reshape(-1)), room)
    out = out.reshape(tokens, each, -1)
    return jnp.einsum("nkd,nk->nd", out, gates.astype(y.dtype))


def _in_pieces(exchange: Any, pieces: int, *arrays: Array) -> Float[Array, "n D"]:
    """The exchange of a piece of the tokens after the other, so that each needs less room."""
    tokens = len(arrays[0])
    if tokens % pieces:
        return exchange(*arrays)
    cut = [x.reshape(pieces, tokens // pieces, *x.shape[1:]) for x in arrays]
    out = lax.map(jax.checkpoint(lambda piece: exchange(*piece)), tuple(cut))
    return out.reshape(tokens, -1)


def _gathered(here: _Here, y, gates, chosen) -> Float[Array, "n D"]:
    everyone = (lax.all_gather(x, AXIS, tiled=True) for x in (y, gates, chosen))
    part = _of_my_experts(here, *everyone)
    return lax.psum_scatter(part, AXIS, scatter_dimension=0, tiled=True)


def _ragged(here: _Here, y, gates, chosen) -> Float[Array, "n D"]:
    tokens, each = chosen.shape
    devices = lax.axis_size(AXIS)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    # counts[s, d, e]: rows from device s for expert e of device d, and sent[s, d] of all of those
    own = jnp.bincount(flat, length=devices * here.number).astype(jnp.int32)
    counts = lax.all_gather(own, AXIS).reshape(devices, devices, here.number)
    sent, me = jnp.sum(counts, axis=2), lax.axis_index(AXIS)
    before = jnp.cumsum(sent, axis=1) - sent  # where device s has its rows for device d
    behind = jnp.cumsum(sent, axis=0) - sent  # where device d has the rows of device s
    room = devices * tokens * min(each, here.number)

    def there(rows):
        nothing = jnp.zeros((room, rows.shape[1]), rows.dtype)
        offsets = before[me], sent[me], behind[me], sent[:, me]
        return lax.ragged_all_to_all(rows, nothing, *offsets, axis_name=AXIS)

    def back(rows):
        nothing = jnp.zeros((tokens * each, rows.shape[1]), rows.dtype)
        offsets = behind[:, me], sent[:, me], before[:, me], sent[me]
        return lax.ragged_all_to_all(rows, nothing, *offsets, axis_name=AXIS)

    # Received rows are in the order of their senders, and of experts within those.
    arrived = counts[:, me].reshape(-1)
    ids = jnp.tile(jnp.arange(here.number), devices)
    expert = jnp.repeat(ids, arrived, total_repeat_length=room)
    rows = jnp.arange(room)
    expert = jnp.where(rows < jnp.sum(arrived), expert, here.number)
    out = back(here.outputs(there(y[order // each]), rows, expert, room))
    out = out[jnp.argsort(order)].reshape(tokens, each, -1)
    return jnp.einsum("nkd,nk->nd", out, gates.astype(y.dtype))
