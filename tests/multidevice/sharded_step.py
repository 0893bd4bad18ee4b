"""Run by test_sharded_step.py with eight CPU devices: one step's loss and gradients on many meshes.

With the argument each-axis on meshes of one axis, with models' names of these alone. Prints for
each mesh the largest difference from one device, of values relative to the largest of their kind
(to 1 where that is less) and of gradients to the largest of their parameter.
"""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax import packing
from dppo_jax.models import ring
from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model
from dppo_jax.objectives import dppo_topk_tv
from dppo_jax.records import Batch, Rollout
from dppo_jax.scoring import loss_and_score, score
from dppo_jax.sharding import MeshConfig, batch_sharding, shardings_of

DENSE = DecoderConfig(
    vocab_size=32, width=16, layers=1, heads=4, kv_heads=2, head_size=4, mlp_width=24,
    qk_norm=True, qkv_bias=True, tied_embeddings=False, remat=True,
)  # fmt: skip
# Gemma's: soft-caps, local and global layers, windows shorter than a response and than a prompt.
GEMMA = dataclasses.replace(
    DENSE, layers=2, window=5, local_layers=(True, False), local_rope_theta=100.0,
    attention_soft_cap=2.0, final_soft_cap=3.0, post_norms=True, unit_offset_norms=True,
)  # fmt: skip
MIXTURE = dataclasses.replace(DENSE, experts=8, experts_per_token=3, normalised_gates=True)
MODELS = {"gemma": GEMMA, "mixture": MIXTURE}
MESHES = {  # fsdp x tensor is test_mesh.py's
    "gemma": (dict(fsdp=2, sequence=4),),
    "mixture": (
        dict(data=2, fsdp=2, expert=2),
        dict(expert=2, sequence=2, tensor=2),
    ),
}
EACH_AXIS = {  # as far as heads, prompts and columns go
    "gemma": (dict(data=8), dict(fsdp=8), dict(sequence=4), dict(tensor=2)),
    "mixture": (dict(expert=8),),
}
PROMPTS, SAMPLES, LENGTH, NEW = 8, 2, 4, 8


def rollout_of(vocabulary, prompts=PROMPTS, length=LENGTH, new=NEW):
    rng = np.random.default_rng(0)
    batch = prompts * SAMPLES
    prompt_mask = np.arange(length) >= rng.integers(0, length, (prompts, 1))  # left-padded
    mask = np.arange(new) < rng.integers(1, new + 1, (batch, 1))
    mask[0] = True
    logp = -np.sort(rng.exponential(2.0, (batch, new, 3)), axis=-1)
    return Rollout(
        prompt_tokens=rng.integers(0, vocabulary, (prompts, length)).astype(np.int32),
        prompt_mask=prompt_mask,
        response_tokens=rng.integers(0, vocabulary, (batch, new)).astype(np.int32),
        response_mask=mask,
        logp_rollout=np.where(mask, logp[..., 0], 0.0).astype(np.float32),
        topk_ids=rng.integers(0, vocabulary, (batch, new, 3)).astype(np.int32),
        topk_logp_rollout=np.where(mask[..., None], logp, 0.0).astype(np.float32),
        entropy_rollout=np.zeros((batch, new), np.float32),
        finish_reason=np.zeros(batch, np.int32),
    )


def replayed(rollout, config):
    """With recorded experts, that the routers would not choose."""
    rng = np.random.default_rng(2)

    def recorded(mask):
        shape = (*mask.shape, config.layers, config.experts)
        chosen = rng.random(shape).argsort(axis=-1)[..., : config.experts_per_token]
        return np.where(mask[..., None, None], chosen, -1).astype(np.int8)

    followed = np.pad(rollout.response_mask[:, 1:], ((0, 0), (0, 1)))
    return dataclasses.replace(
        rollout, prompt_experts=recorded(rollout.prompt_mask), experts=recorded(followed)
    )


def program_of(model, packed=False, balanced=True):
    """(params, batch) -> ((loss, statistics), gradients); Gemma's by two passes, others by one.

    `packed`: as one microbatch of packed rows. `balanced`: with the load's term of a mixture.
    """
    objective = dppo_topk_tv(delta=10.0)

    def loss(params, batch, of=None):
        mask = batch.rollout.response_mask
        if packed:
            total, kept = of_rows(params, packing.take(batch, of, 0, budget(batch.rollout)))
            # Back in the order of the sequences.
            kept = [jnp.zeros_like(leaf).at[of.sequences[0]].set(leaf) for leaf in kept]
        else:
            total, kept = of_rows(params, batch)
        return total / jnp.sum(mask), kept

    def of_rows(params, batch):
        mask = batch.rollout.response_mask
        if model.config.final_soft_cap is None:
            total, stats, routing = loss_and_score(
                model, params, batch, objective.token_local, temperature=0.9
            )
            if model.config.experts and balanced:
                total += routing["moe/aux_loss"].sum * jnp.sum(mask)
        else:
            stats = score(model, params, batch.rollout, temperature=0.9)
            total = objective.loss(stats, batch).loss_sum + 0.1 * jnp.sum(stats.entropy, where=mask)
        kept = [jnp.where(mask, leaf, 0.0) for leaf in (stats.logp, stats.entropy)]
        return total, kept

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def budget(rollout):
    """Room for all sequences in one microbatch."""
    return packing.budget_of(PROMPTS * SAMPLES * (LENGTH + NEW), rollout)


def differences(ours, theirs):
    (value, aux), gradients = jax.device_get(ours)
    (true_value, true_aux), true_gradients = jax.device_get(theirs)
    largest = lambda a, b: float(np.max(np.abs(a - b)))  # noqa: E731
    relative = jax.tree.map(
        lambda a, b: largest(a, b) / (1e-3 + float(np.abs(b).max())), gradients, true_gradients
    )
    pairs = zip([value, *aux], [true_value, *true_aux], strict=True)
    return {
        "values": max(largest(a, b) / max(1.0, float(np.abs(b).max())) for a, b in pairs),
        "gradients": max(jax.tree.leaves(relative)),
    }


def temporary_bytes(sequence):
    """What a device needs beside its arguments for one prompt's two responses of 512 tokens."""
    config = dataclasses.replace(DENSE, width=64, head_size=16, layers=9)
    model = Model(config)
    mesh = MeshConfig(fsdp=1, sequence=sequence).build(jax.devices()[:sequence])

    def array(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with jax.set_mesh(mesh):
        shardings = shardings_of(model.logical_axes, mesh)
        params = jax.tree.map(array, model.abstract_params, shardings)
        rollout = rollout_of(32, prompts=1, length=64, new=512)
        batch = Batch(rollout, np.zeros((SAMPLES, 512), np.float32))
        rows = jax.tree.map(lambda leaf: array(leaf, batch_sharding(mesh)), batch)
        program = program_of(model).lower(params, rows).compile()
    return program.memory_analysis().temp_size_in_bytes


def main(*asked) -> dict:
    each_axis = "each-axis" in asked
    found, meshes = [], EACH_AXIS if each_axis else MESHES
    ring.LARGEST = 1  # blocks of as few queries as can be
    for name in [name for name in MODELS if name in asked] or MODELS:
        model = Model(MODELS[name])
        params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
        params = jax.tree.map(lambda leaf: 3 * leaf, params)
        rollout = rollout_of(model.config.vocab_size)
        advantages = np.random.default_rng(1).normal(size=(PROMPTS * SAMPLES, 1))
        advantages = np.broadcast_to(advantages, (PROMPTS * SAMPLES, NEW)).astype(np.float32)
        batch = Batch(rollout, advantages)
        alone = {"padded": program_of(model)(params, batch)}
        alone["packed"] = alone["padded"]
        of = packing.plan_of(rollout, budget(rollout))
        assert of.count == 1 and len(set(of.row[0].tolist())) < PROMPTS * SAMPLES
        packed = batch
        if model.config.experts and not each_axis:
            # Balance would differ: packed, each sample brings its prompt.
            packed = Batch(replayed(rollout, model.config), advantages)
            alone["packed"] = program_of(model, balanced=False)(params, packed)
        for sizes in meshes[name]:
            devices = jax.devices()[: math.prod(sizes.values())]
            mesh = MeshConfig(**{"fsdp": 1} | sizes).build(devices)
            with jax.set_mesh(mesh):
                placed = jax.device_put(params, shardings_of(model.logical_axes, mesh))
                rows, packed_rows = jax.device_put((batch, packed), batch_sharding(mesh))
                runs = {"padded": program_of(model)(placed, rows)}
                if "sequence" in sizes:
                    runs["packed"] = program_of(model, packed=True, balanced=False)(
                        placed, packed_rows, of
                    )
            for kind, split in runs.items():
                found.append({"model": name, "mesh": sizes, "rows": kind})
                found[-1] |= differences(split, alone[kind])
                print(found[-1], file=sys.stderr, flush=True)
    ring.LARGEST = 2**26
    memory = [] if each_axis else [temporary_bytes(devices) for devices in (1, 8)]
    return {"devices": jax.device_count(), "found": found, "temporary": memory}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
