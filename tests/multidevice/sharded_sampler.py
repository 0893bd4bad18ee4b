"""Run by test_sharded_sampler.py in a process of eight CPU devices: the sampler on several meshes.

Each mesh draws the same rows as one device: plain, filtered, biased, greedy. What crosses the
mesh is read in the compiled programs, those of the head and of the whole decoding loop.
"""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from sharded_head import looped

from dppo_jax.kernels import drawing
from dppo_jax.kernels.filters import Filters
from dppo_jax.kernels.rows import RowSampling
from dppo_jax.kernels.sampler import sample, sample_rows
from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model
from dppo_jax.records import Prompts
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.sharding import MeshConfig, batch_sharding, sampler_layout, shardings_of

BATCH, WIDTH, VOCABULARY, STORED = 64, 16, 8 * 76, 5
KINDS = ["plain", "cold", "top_k", "top_p", "min_p", "three", "changed", "greedy"]
MESHES = ((2, 2, 2), (1, 1, 8), (8, 1, 1), (1, 2, 4))  # data, fsdp, tensor
MODEL = DecoderConfig(
    vocab_size=VOCABULARY, width=16, layers=1, heads=2, kv_heads=2, head_size=8, mlp_width=16
)


def rows_of() -> RowSampling:
    """Eight rows of each kind, in turn."""
    each = RowSampling(
        seed=np.stack([np.zeros(8), np.arange(8)], axis=1),
        sample=np.arange(8),
        temperature=[1.0, 0.5, 1.0, 0.9, 1.0, 1.2, 1.0, 0.0],
        top_k=[0, 0, 6, 0, 0, 40, 9, 0],
        top_p=[1, 1, 1, 0.8, 1, 0.9, 1, 1],
        min_p=[0, 0, 0, 0, 0.02, 0.01, 0, 0],
        repetition_penalty=[1, 1, 1, 1, 1, 1, 2.5, 1],
        bias_ids=[[0], [0], [0], [0], [0], [0], [VOCABULARY - 1], [0]],
        bias=[[0.0]] * 6 + [[3.0], [0.0]],
    )
    kinds = RowSampling("uint32", "int32", *["float32"] * 5, "int32", "float32")
    kinds = kinds._replace(top_k="int32")
    return jax.tree.map(
        lambda leaf, kind: np.tile(np.asarray(leaf, kind), (8,) + (1,) * (np.ndim(leaf) - 1)),
        each, kinds, is_leaf=lambda leaf: isinstance(leaf, list | np.ndarray),
    )  # fmt: skip


def by_row(hidden, matrix, rows, position, history, layout):
    return sample_rows(
        hidden, matrix, rows, position, history,
        top_k_capture=STORED, soft_cap=9.0, raw_logp=True, layout=layout,
    )  # fmt: skip


def replayed(hidden, matrix, rows, position, history, layout):
    return sample(
        hidden, matrix, jax.random.key(0), temperature=0.8, top_k_capture=STORED,
        filters=Filters(top_p=0.7), replay=True, layout=layout,
    )  # fmt: skip


def gathered(program: str) -> list[list[int]]:
    """The shapes of what each all-gather gives."""
    found = re.findall(r"= ([^=]*?) all-gather(?:-start)?\(", program)
    shapes = [shape for types in found for shape in re.findall(r"\[([\d,]*)\]", types)]
    return [[int(size) for size in shape.split(",") if size] for shape in shapes]


def head_on(sizes, form, inputs) -> dict:
    """What a mesh draws, how far from one device, and what crosses it."""
    mesh = MeshConfig(*sizes).build()
    with jax.set_mesh(mesh):
        layout = sampler_layout(BATCH)
        hidden, matrix, *others = inputs
        placed = (
            jax.device_put(hidden, NamedSharding(mesh, layout.rows)),
            jax.device_put(matrix, NamedSharding(mesh, layout.matrix)),
            *others,
        )
        program = jax.jit(partial(form, layout=layout)).lower(*placed).compile()
        ours = jax.device_get(program(*placed))
    theirs = jax.device_get(jax.jit(partial(form, layout=None))(*inputs))
    same = (ours.token == theirs.token).reshape(8, 8)
    pairs = zip(*(jax.tree.leaves(d._replace(token=None)) for d in (ours, theirs)), strict=True)
    apart = [np.where(a == b, 0.0, np.abs(a.clip(-99) - b.clip(-99))).max() for a, b in pairs]
    text = program.as_text()
    return {
        "form": form.__name__,
        "mesh": sizes,
        "same_tokens": {kind: bool(same[:, at].all()) for at, kind in enumerate(KINDS)},
        "different_tokens": int(len(np.unique(ours.token))),
        "numbers": float(max(apart)),
        "gathered": gathered(text),
        # all rows of a part of the vocabulary, or the whole vocabulary of some rows
        "all_rows": bool(re.search(rf"f32\[{BATCH},{VOCABULARY // sizes[2]}\]", text)),
        "all_columns": bool(re.search(rf"f32\[\d+,{VOCABULARY}\]", text)),
    }


def nothing_stored(inputs) -> list[int]:
    """The shape of the top K where K is 0 and the vocabulary is split."""
    hidden, matrix, *_ = inputs
    with jax.set_mesh(MeshConfig(1, 2, 4).build()):
        form = partial(sample, temperature=1.0, top_k_capture=0, layout=sampler_layout(BATCH))
        drawn = jax.jit(form)(hidden, matrix, jax.random.key(0))
    assert np.isfinite(drawn.logp).all()
    return list(drawn.topk_logp.shape)


def decoding() -> dict:
    """What the loop of `generate` gathers."""
    mesh, model = MeshConfig(2, 2, 2).build(), Model(MODEL)
    settings = SamplingConfig(max_new_tokens=4, samples_per_prompt=2, top_k_capture=STORED)
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            model.abstract_params, shardings_of(model.logical_axes, mesh),
        )  # fmt: skip
        rows = batch_sharding(mesh)
        prompts = Prompts(
            jax.ShapeDtypeStruct((BATCH // 2, 4), "int32", sharding=rows),
            jax.ShapeDtypeStruct((BATCH // 2, 4), bool, sharding=rows),
        )
        program = generate.lower(model, params, prompts, jax.random.key(0), settings=settings)
        text = program.compile().as_text()
    return {"in_loops": gathered(looped(text)), "loops": text.count(" while(")}


def main() -> dict:
    drawing.COLUMNS = 128  # several groups, whose borders are not those of the devices
    rng = np.random.default_rng(0)
    inputs = (
        jnp.asarray(rng.normal(size=(BATCH, WIDTH)), jnp.float32),
        jnp.asarray(rng.normal(size=(VOCABULARY, WIDTH)) * 0.7, jnp.float32),
        rows_of(),
        np.arange(BATCH, dtype=np.int32),
        rng.integers(-1, VOCABULARY + 1, (BATCH, 7)).astype(np.int32),
    )
    heads = [head_on(sizes, by_row, inputs) for sizes in MESHES]
    heads.append(head_on((2, 2, 2), replayed, inputs))
    return {"heads": heads, "stored": nothing_stored(inputs), "decoding": decoding()}


if __name__ == "__main__":
    print(json.dumps(main()))
