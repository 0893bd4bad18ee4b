"""Run by test_sharded_experts.py with eight CPU devices: experts with and without a mesh.

CPUs have no ragged exchange: `exchanged` is its definition, so that the rows that are sent, where
they arrive, and their gradients are checked; that TPUs compile the real one is tpu_aot's.
"""

import dataclasses
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model
from dppo_jax.models.expert_parallel import expert_mlps_on_mesh
from dppo_jax.models.moe import expert_mlps
from dppo_jax.records import Prompts
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.scoring import score, score_and_routing, with_own_routing
from dppo_jax.sharding import MeshConfig, batch_sharding, shardings_of

CONFIG = DecoderConfig(
    vocab_size=16, width=16, layers=1, heads=4, kv_heads=2, head_size=4, mlp_width=12,
    experts=6, experts_per_token=2, normalised_gates=True,
)  # fmt: skip


def exchanged(rows, nothing, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` by its documentation, with everyone's rows in sight."""
    everyone = jax.lax.all_gather(rows, axis_name)
    me = jax.lax.axis_index(axis_name)
    starts, sizes, ends = (
        jax.lax.all_gather(x, axis_name)[:, me] for x in (input_offsets, send_sizes, output_offsets)
    )
    behind = jnp.arange(len(nothing)) - ends[:, None]  # a row for each device that sends
    taken = jnp.clip(starts[:, None] + behind, 0, len(rows) - 1)
    sent = jnp.take_along_axis(everyone, taken[..., None], axis=1)
    here = ((behind >= 0) & (behind < sizes[:, None]))[..., None]
    out = jnp.where(here.any(axis=0), jnp.where(here, sent, 0).sum(axis=0), nothing)
    # The sizes that this device expects are those that the others send.
    return jnp.where(jnp.all(sizes == recv_sizes), out, jnp.nan)


def layer() -> list[dict]:
    """One layer's experts by each way, where all tokens choose alike and where they do not."""
    jax.lax.ragged_all_to_all = exchanged
    rng = np.random.default_rng(0)
    tokens, width, experts, each, inner = 32, 8, 8, 3, 6
    x = {
        name: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)
        for name, shape in dict(
            y=(tokens, width), gates=(tokens, each), gate=(experts, width, inner),
            up=(experts, width, inner), down=(experts, inner, width),
            a=(experts, width, 2), b=(experts, 2, inner),
        ).items()
    }  # fmt: skip
    choices = {
        "even": np.stack([rng.permutation(experts)[:each] for _ in range(tokens)]),
        "alike": np.broadcast_to([6, 0, 1], (tokens, each)),
    }
    choices = {name: jnp.asarray(chosen, jnp.int32) for name, chosen in choices.items()}
    found = []

    def loss(x, chosen, form):
        weights = x["gate"], x["up"], x["down"]
        adapters = {"gate": (x["a"], x["b"])}
        out = form(x["y"], x["gates"], chosen, *weights, jax.nn.silu, adapters)
        return jnp.sum(jnp.sin(out)), out

    of = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    alone = {name: jax.device_get(of(x, chosen, expert_mlps)) for name, chosen in choices.items()}
    for sizes, transport in (
        (dict(expert=8), "ragged"),
        (dict(expert=8), "gathered"),
        (dict(fsdp=2, expert=2, tensor=2), "ragged"),
    ):
        form = partial(expert_mlps_on_mesh, transport=transport)
        with jax.set_mesh(MeshConfig(**{"fsdp": 1} | sizes).build()):
            for name, chosen in choices.items():
                split = jax.device_get(of(x, chosen, form))
                pairs = zip(*map(jax.tree.leaves, (split, alone[name])), strict=True)
                worst = max(float(np.max(np.abs(a - b))) for a, b in pairs)
                found.append(
                    {"choice": name, "mesh": sizes, "transport": transport, "difference": worst}
                )
    return found


def unrecorded(rollout):
    return dataclasses.replace(rollout, prompt_experts=None, experts=None)


def replay(model, params, rollout) -> dict:
    """R3 and R2 with and without a mesh: the routers have moved since the experts were recorded."""
    router = params["blocks"]["router"]
    noise = jax.random.normal(jax.random.key(5), router.shape)
    moved = params | {"blocks": params["blocks"] | {"router": router + 0.3 * noise}}

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def of(params, rollout):
        stats, routing = score_and_routing(model, params, rollout, temperature=1.0)
        return jnp.sum(jnp.sin(stats.logp)), routing["routing/differing_fraction"]

    own_choices = jax.jit(partial(with_own_routing, model))

    def both(params, before, placed=lambda rows: rows):
        """The sampler's choices replayed, and those that the scorer makes by itself at `before`."""
        own = jax.device_get(own_choices(before, placed(rollout)))
        found = [of(params, placed(rows)) for rows in (rollout, own)]
        return jax.device_get(found), (own.prompt_experts, own.experts)

    params, moved, rollout = jax.device_get((params, moved, rollout))
    alone, alone_chosen = both(moved, params)
    mesh = MeshConfig(fsdp=4, expert=2).build()
    with jax.set_mesh(mesh):
        shardings = shardings_of(model.logical_axes, mesh)
        split = [jax.device_put(leaf, shardings) for leaf in (moved, params)]
        together, chosen = both(*split, lambda rows: jax.device_put(rows, batch_sharding(mesh)))
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), alone, together)
    changed = alone[0][0][1]
    return {
        "difference": max(jax.tree.leaves(apart)),
        "largest": max(float(np.abs(x).max()) for x in jax.tree.leaves(alone)),
        "differing": float(changed.sum / changed.count),
        "same_own_choices": all(
            bool((a == b).all()) for a, b in zip(alone_chosen, chosen, strict=True)
        ),
        "router_learns": float(np.abs(together[0][1]["blocks"]["router"]).max()),
    }


def main() -> dict:
    model = Model(CONFIG)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    params = jax.tree.map(lambda leaf: 2 * leaf, params)
    tokens = jax.random.randint(jax.random.key(1), (8, 3), 0, 16)
    prompts = Prompts(tokens, jnp.ones_like(tokens, bool))
    settings = SamplingConfig(
        max_new_tokens=4, samples_per_prompt=2, top_k_capture=3, record_experts=True
    )
    key = jax.random.key(2)
    recorded = generate(model, params, prompts, key, settings=settings)
    rollout = unrecorded(recorded)

    def loss(params, rollout):
        return jnp.sum(jnp.sin(score(model, params, rollout, temperature=1.0).logp))

    alone = jax.jit(jax.value_and_grad(loss))(params, rollout)
    mesh = MeshConfig(data=1, fsdp=4, tensor=2).build()
    with jax.set_mesh(mesh):
        split = jax.device_put(params, shardings_of(model.logical_axes, mesh))
        again = generate(model, split, prompts, key, settings=settings)
        program = jax.jit(jax.value_and_grad(loss)).lower(split, rollout).compile()
        together = program(split, rollout)
    differences = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), alone, together
    )
    mesh = MeshConfig(expert=2, sequence=2, tensor=2).build()
    with jax.set_mesh(mesh):
        split_experts = jax.device_put(params, shardings_of(model.logical_axes, mesh))

        drawn = generate(model, split_experts, prompts, key, settings=settings)
    same = ("response_tokens", "prompt_experts", "experts")
    sorts = re.findall(r"= \(?s32\[(\d+)\][^=]*\bsort\(", program.as_text())
    return {
        "difference": max(jax.tree.leaves(differences)),
        "largest": max(float(np.abs(np.asarray(x)).max()) for x in jax.tree.leaves(alone)),
        "same_tokens": [
            all(bool((getattr(each, name) == getattr(recorded, name)).all()) for name in same)
            for each in (again, drawn)
        ],
        "replay": replay(model, params, recorded),
        "layer": layer(),
        "sorted": sorted({int(length) for length in sorts}),
        "tokens": 8 * 3 + 16 * 3,  # prompts, and what responses feed
        "experts_stored": split["blocks"]["gate"].addressable_shards[0].data.size
        / split["blocks"]["gate"].size,
    }


if __name__ == "__main__":
    print(json.dumps(main()))
