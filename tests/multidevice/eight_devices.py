"""Run by test_mesh.py in a process of eight CPU devices: prints what became of the shardings."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from dppo_jax.checkpoint import Checkpoints, load_params
from dppo_jax.elsewhere import Transfer
from dppo_jax.metrics import CompilationCounter
from dppo_jax.models.decoder import DecoderConfig, Model
from dppo_jax.models.lora import LoraConfig, LoraModel
from dppo_jax.multihost import to_global_rows
from dppo_jax.objectives import dppo_topk_tv
from dppo_jax.optimizer import adamw
from dppo_jax.records import Batch, Prompts, Rollout
from dppo_jax.rollout_policy import int8_weights
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.sharding import MeshConfig, batch_sharding, shardings_of
from dppo_jax.update import init_state, make_update, take_prompts

CONFIG = DecoderConfig(
    vocab_size=16,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=4,
    mlp_width=24,
    qk_norm=True,
    qkv_bias=True,
    tied_embeddings=False,
)


def by_name(tree, of):
    return {jax.tree_util.keystr(at): of(leaf) for at, leaf in jax.tree.leaves_with_path(tree)}


def pairs(left, right):
    return zip(*map(jax.tree.leaves, (left, right)), strict=True)


def adapters_on(mesh) -> dict:
    """One step of adapters on one device and on all: how far apart, and how they are spread."""
    model = LoraModel(CONFIG, LoraConfig(rank=4, alpha=4.0, targets=(".*", "unembedding")))
    rng = np.random.default_rng(0)
    base, adapters = (
        jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype("float32"), shapes)
        for shapes in (model.abstract_params, model.abstract_adapters)
    )
    tokens, mask = rng.integers(16, size=(16, 4)), np.ones((16, 4), bool)
    nothing = np.zeros((16, 4), np.float32)
    rollout = Rollout(
        *(tokens[:8, :3].astype("int32"), mask[:8, :3], tokens.astype("int32"), mask),
        *(nothing - 2.0, nothing[..., None].astype("int32"), nothing[..., None], nothing),
        np.ones(16, np.int32),
    )
    advantages = rng.normal(size=(16, 1)).astype("float32") * mask
    optimizer = optax.sgd(1.0)
    update = make_update(model, dppo_topk_tv(delta=2.0), optimizer, temperature=1.0, microbatches=2)
    alone, _ = update(
        init_state(jax.tree.map(jnp.asarray, adapters), optimizer),
        jax.tree.map(jnp.asarray, Batch(rollout, advantages)),
        None,
        jax.tree.map(jnp.asarray, base),
    )
    with jax.set_mesh(mesh):
        spread = jax.device_put(adapters, shardings_of(model.adapter_axes, mesh))
        batch = to_global_rows(Batch(rollout, advantages), batch_sharding(mesh))
        held = jax.device_put(base, shardings_of(model.logical_axes, mesh))
        together, _ = update(init_state(spread, optimizer), batch, None, held)
    trained = jax.device_get((alone.params, together.params))
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *trained)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained[0], adapters)
    return {
        "apart": max(jax.tree.leaves(apart)),
        "moved": min(jax.tree.leaves(moved)),
        "fractions": by_name(
            together.params, lambda leaf: leaf.addressable_shards[0].data.size / leaf.size
        ),
    }


def sent_apart(samplers: int, trainers: int, **sizes: int) -> list:
    """A matrix and a scale to other devices: whether they are the same there and lie as asked,
    whether they are not sent again, and bytes over those of one copy of the matrix."""
    devices = jax.devices()
    home = MeshConfig(**sizes).build(devices[samplers : samplers + trainers])
    there = MeshConfig(fsdp=-1).build(devices[:samplers])
    spread = {"w": jax.P(None, "fsdp"), "scale": jax.P()}
    given = {"w": np.arange(240.0).reshape(2, 120), "scale": np.float32(3)}
    axes = {"w": ("layers", "embed"), "scale": ()}
    transfer = Transfer(home, there, axes)
    with jax.set_mesh(home):
        at_home = jax.device_put(given, shardings_of(axes, home))
        sent, wait = transfer.send(at_home)
        wait()
        again, _ = transfer.send(at_home)
    same = all((np.asarray(sent[name]) == given[name]).all() for name in given)
    asked = all(sent[name].sharding == NamedSharding(there, spread[name]) for name in given)
    return [same, asked, again["w"] is sent["w"], transfer.bytes // sent["w"].nbytes]


def weights_apart() -> dict:
    """The part of each array that one of four devices holds, of policies sent from one device."""
    devices, found = jax.devices(), {}
    home, there = (MeshConfig().build(devices[part]) for part in (slice(4, 5), slice(4)))
    plain, lora = Model(CONFIG), LoraModel(CONFIG, LoraConfig(rank=4, targets=(".*",)))
    base = plain.init(jax.random.key(0))
    policies = {
        "plain": (plain, base),
        "int8": (plain, int8_weights().choose((), base, 0, jax.random.key(0))[0]),
        "lora": (lora, lora.policy(lora.init_adapters(jax.random.key(0)), base)),
    }
    for name, (model, policy) in policies.items():
        policy = jax.device_put(policy, NamedSharding(home, jax.P()))
        sent, wait = Transfer(home, there, model.policy_axes).send(policy)
        wait()
        assert all((np.asarray(a) == np.asarray(b)).all() for a, b in pairs(sent, policy))
        found[name] = by_name(sent, lambda leaf: leaf.addressable_shards[0].data.size / leaf.size)
    return found


def main(folder: Path) -> dict:
    mesh, model = MeshConfig(data=1, fsdp=4, tensor=2).build(), Model(CONFIG)
    optimizer = adamw(learning_rate=1e-3)
    tokens = jax.random.randint(jax.random.key(1), (8, 3), 0, 16)
    settings = SamplingConfig(max_new_tokens=4, samples_per_prompt=2, top_k_capture=3)
    counter = CompilationCounter()
    with jax.set_mesh(mesh):
        shardings = shardings_of(model.logical_axes, mesh)
        params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
        asked = [leaf.sharding == s for leaf, s in pairs(params, shardings)]
        state = init_state(params, optimizer)
        prompts = to_global_rows(tokens, batch_sharding(mesh))
        prompts = Prompts(prompts, jnp.ones_like(prompts, bool))
        update = make_update(model, dppo_topk_tv(), optimizer, temperature=1.0, microbatches=2)
        shardings_after, types_after, compilations = [], [], []
        for step in range(4):
            before = counter.total
            rollout = generate(
                model, state.params, prompts, jax.random.key(step), settings=settings
            )
            advantages = to_global_rows(
                jax.random.normal(jax.random.key(step), (16, 1)), batch_sharding(mesh)
            )
            batch = Batch(rollout, jnp.broadcast_to(advantages, rollout.response_mask.shape))
            shardings_after.append(by_name(state, lambda leaf: str(leaf.sharding)))
            types_after.append(by_name(state, lambda leaf: str(jax.typeof(leaf))))
            state, _ = update(state, take_prompts(batch, jnp.arange(8)[::-1]))
            jax.block_until_ready(state)
            compilations.append(counter.total - before)
        shardings_after.append(by_name(state, lambda leaf: str(leaf.sharding)))
        types_after.append(by_name(state, lambda leaf: str(jax.typeof(leaf))))

        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoints.save(4, state, jax.random.key(0), {})
        checkpoints.close()
        other = shardings_of(model.logical_axes, MeshConfig(data=2, fsdp=2, tensor=2).build())
        like = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            model.abstract_params,
            other,
        )
        restored = load_params(folder, like)
        same = [
            bool((a == b).all())
            for a, b in pairs(jax.device_get(state.params), jax.device_get(restored))
        ]
        moved = [leaf.sharding == s for leaf, s in pairs(restored, other)]
    return {
        "devices": jax.device_count(),
        "born_as_asked": all(asked),
        "fractions": by_name(
            state, lambda leaf: leaf.addressable_shards[0].data.size / max(1, leaf.size)
        ),
        "shardings": shardings_after,
        "types": types_after,
        "compilations": compilations,
        "response_rows": len(rollout.response_tokens.addressable_shards[0].data),
        "restored_elsewhere": all(same) and all(moved),
        "adapters": adapters_on(mesh),
        "sent": [sent_apart(*sides) for sides in ((2, 6), (3, 5), (4, 2), (4, 1))]
        + [sent_apart(4, 2, fsdp=1, tensor=2)],
        "weights_apart": weights_apart(),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
