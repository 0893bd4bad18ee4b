"""The head compiled for TPUs that are not here: memory, flops and seconds as its compiler has them.

`compile_table` needs libtpu (the extra `plan`) and no TPU. It starts a Python process of its own,
because libtpu reads its environment when JAX starts.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dppo_jax.kernels import plain, single_pass, xla
from dppo_jax.kernels.chips import CHIPS, ENVIRONMENT, bytes_asked_for
from dppo_jax.kernels.head import head
from dppo_jax.kernels.sharded import Layout as OnMesh
from dppo_jax.kernels.sharded import sharded_loss_and_grad
from dppo_jax.kernels.single_pass import TokenTerms, fused_loss_and_grad

# (N, D, V): Qwen3-8B, Gemma3-4B, Qwen3-0.6B.
SHAPES = ((16384, 4096, 151936), (16384, 2560, 262144), (8192, 1024, 151936))


class Form(NamedTuple):
    """A program of (hidden, unembedding, ids), and what is known of its costs beforehand."""

    program: Callable
    flops: int  # in units of NDV, of all devices together
    reads: int  # of the unembedding and of hidden; what a perfect cache would leave
    writes: int  # of their gradients
    trips: Callable[[int, int], int]  # of its loops, which XLA's cost analysis counts once
    before_loop: str | None  # the form whose program runs before the loop
    multiplied_by_xla: bool  # every product with W; the Pallas forward takes W as arguments come
    parallel: bool = False  # the vocabulary lies over all devices of the chip's topology


def _losses(terms: TokenTerms, rows: Any) -> jax.Array:
    return terms.logp[:, 0] + terms.entropy


def _gradients(terms_of: Callable) -> Callable:
    def loss(x, w, ids):
        terms = terms_of(x, w, ids)
        return jnp.sum(_losses(terms, ())), terms.logp

    return jax.value_and_grad(loss, (0, 1), has_aux=True)


def _two_passes(body: str, layout: OnMesh | None = None) -> Callable:
    def terms_of(x, w, ids):
        out = head(x, w, ids, stored_gradient=False, body=body, layout=layout)
        return TokenTerms(out.logit_at - out.lse[:, None], out.entropy)

    return _gradients(terms_of)


def _single_pass(x, w, ids):
    return fused_loss_and_grad(_losses, x, w, ids, (), stored_gradient=False)


def _parallel_single_pass(x, w, ids):
    return sharded_loss_and_grad(
        _losses, x, w, ids, (), None, VOCABULARY_PARALLEL, stored_gradient=False
    )


def _column_chunks(tokens: int, vocabulary: int) -> int:
    return -(-vocabulary // xla.chunk_columns(tokens, vocabulary))


def _token_chunks(tokens: int, vocabulary: int) -> int:
    return -(-tokens // single_pass.chunk_tokens(tokens))


_AXIS = "chip"
VOCABULARY_PARALLEL = OnMesh(tokens=(), vocabulary=_AXIS, width=None)
FORWARD, PARALLEL_FORWARD = "pallas_tpu_forward", "parallel_forward"
# All with the gradients of hidden and unembedding, but FORWARD.
FORMS = {
    "naive": Form(_gradients(plain.naive), 6, 1, 1, lambda *_: 1, None, True),
    "chunked": Form(
        _gradients(plain.chunked), 8, 2, 1,
        lambda tokens, vocabulary: tokens // plain.chunk_size(tokens), None, True,
    ),
    "xla": Form(_two_passes("xla"), 8, 2, 1, _column_chunks, None, True),
    FORWARD: Form(partial(head, body="pallas_tpu"), 2, 1, 0, lambda *_: 1, None, False),
    "pallas_tpu": Form(_two_passes("pallas_tpu"), 8, 2, 1, _column_chunks, FORWARD, False),
    "single_pass": Form(_single_pass, 6, 1, 1, _token_chunks, None, True),
    PARALLEL_FORWARD: Form(
        partial(head, body="pallas_tpu", layout=VOCABULARY_PARALLEL), 2, 1, 0, lambda *_: 1, None,
        False, True,
    ),
    "parallel": Form(
        _two_passes("pallas_tpu", VOCABULARY_PARALLEL), 8, 2, 1, _column_chunks, PARALLEL_FORWARD,
        False, True,
    ),
    "parallel_single_pass": Form(
        _parallel_single_pass, 6, 1, 1, _token_chunks, None, False, True
    ),
}  # fmt: skip


def compile_table(
    chips: Iterable[str] = ("v5e", "v5p", "v6e", "7x"),
    shapes: Iterable[tuple[int, int, int]] = SHAPES,
    forms: Iterable[str] = FORMS,
    stored: int = 20,
) -> list[dict[str, Any]]:
    """One row a chip, shape (N, D, V) and form: bfloat16, J = 1 + stored ids, compiled with libtpu.

    A row holds `chip`, `form`, `tokens`, `width`, `vocabulary`, `stored`; `devices`, over which
    the parallel forms spread the vocabulary, all of the chip's topology in `CHIPS`, else 1: what
    follows is of one of them;
    `roofline_seconds`, the larger of 2, 8 or 6 NDV flops and the least traffic at the chip's peaks;
    `fits`. Where it is False the compiler found too little memory, `needed_bytes` is what it asked
    for, arguments and results included, and nothing else is known. Where the vocabulary does not
    go evenly over the devices, `skipped` says so, and nothing else is known either. Else
    `temporary_bytes` and `temporary_share` (of N x V float32 logits), beyond arguments and results;
    `flops` and `bytes` of the compiled program, its loops counted as often as they run;
    `compiler_seconds`, XLA's `optimal_seconds` likewise, None where XLA has none (for the Pallas
    kernel it is what the kernel's own flops and bytes take at the chip's peaks);
    `unknown_operations`, for which XLA has no figure: they are left out of `compiler_seconds`;
    `compile_seconds`. Raises ValueError for names that are not in `CHIPS` and `FORMS`, RuntimeError
    with libtpu's words where it cannot compile.
    """
    chips, shapes, forms = list(chips), list(shapes), list(forms)
    for kind, names, known in (("chip", chips, list(CHIPS)), ("form", forms, list(FORMS))):
        for name in names:
            if name not in known:
                raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    for shape in shapes:
        if min(shape) < 1 or not 0 <= stored <= shape[2]:
            raise ValueError(
                f"(tokens, width, vocabulary) {tuple(shape)} with {stored} stored ids: sizes are "
                "at least 1, and ids are of the vocabulary"
            )
    request = {"chips": chips, "shapes": shapes, "forms": forms, "stored": stored}
    done = subprocess.run(
        [sys.executable, "-m", "dppo_jax.kernels.plan", json.dumps(request)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "Error: " in line]
        reason = said[-1] if said else done.stderr[-1000:]
        raise RuntimeError(f"compiling for {', '.join(chips)} failed: {reason}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _rows(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in request["chips"]:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=CHIPS[name].topology
        ).devices

        def mesh_of(count, devices=devices):
            auto = (AxisType.Auto,)
            return jax.make_mesh((count,), (_AXIS,), axis_types=auto, devices=devices[:count])

        for shape in request["shapes"]:
            compiled: dict[str, dict[str, float]] = {}
            for form in request["forms"]:
                mesh = mesh_of(len(devices) if FORMS[form].parallel else 1)
                if shape[2] % mesh.size:
                    reason = f"a vocabulary of {shape[2]} is not divisible by {mesh.size} devices"
                    yield {"chip": name, "form": form, "fits": False, "skipped": reason}
                    continue
                with jax.set_mesh(mesh):
                    yield _row(name, form, mesh, tuple(shape), request["stored"], compiled)


def _row(
    name: str,
    form_name: str,
    mesh: Mesh,
    shape: tuple[int, int, int],
    stored: int,
    compiled: dict[str, dict[str, float]],
) -> dict[str, Any]:
    tokens, width, vocabulary = shape
    chip, form = CHIPS[name], FORMS[form_name]
    devices, here = mesh.size, NamedSharding(mesh, PartitionSpec())
    spread = NamedSharding(mesh, PartitionSpec(_AXIS))
    arguments = [
        jax.ShapeDtypeStruct((tokens, width), "bfloat16"),
        jax.ShapeDtypeStruct((vocabulary, width), "bfloat16"),
        jax.ShapeDtypeStruct((tokens, 1 + stored), "int32"),
    ]

    def costs_of(form_name: str) -> dict[str, float]:
        if form_name not in compiled:
            start = time.perf_counter()
            matrix: Format | NamedSharding = spread
            # In a training step W is cast to bfloat16 by the same program, in the tile that its
            # products want. Here it is an argument, which would be copied into that tile first.
            if chip.matrix_tile and FORMS[form_name].multiplied_by_xla:
                matrix = Format(Layout((0, 1), chip.matrix_tile), spread)
            jitted = jax.jit(FORMS[form_name].program, in_shardings=(here, matrix, here))
            program = jitted.trace(*arguments)
            executable = program.lower(lowering_platforms=("tpu",)).compile()
            analysis = executable.cost_analysis()
            seconds = analysis.get("optimal_seconds", math.nan)
            unknown = max(0, math.ceil(-seconds)) if math.isfinite(seconds) else 0
            compiled[form_name] = {
                "flops": analysis["flops"],
                "bytes": analysis["bytes accessed"],
                "seconds": seconds + unknown,  # each counts as -1 second in XLA's sum
                "unknown": unknown,
                "temporary": executable.memory_analysis().temp_size_in_bytes,
                "compile": time.perf_counter() - start,
            }
        return compiled[form_name]

    matrices = 2 * (tokens * width + vocabulary * width // devices)
    flops = form.flops * tokens * width * vocabulary // devices
    traffic = (form.reads + form.writes) * matrices
    row = {
        "chip": name,
        "form": form_name,
        "tokens": tokens,
        "width": width,
        "vocabulary": vocabulary,
        "stored": stored,
        "devices": devices,
        "roofline_seconds": max(flops / chip.bf16_flops, traffic / chip.memory_bytes),
    }
    try:
        once = costs_of(form_name)
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_asked_for(str(error))
        if needed is None:
            raise
        return row | {"fits": False, "needed_bytes": needed}
    before = dict.fromkeys(once, 0.0) if form.before_loop is None else costs_of(form.before_loop)
    trips = form.trips(tokens, vocabulary // devices)

    def total(cost: str) -> float:
        return before[cost] + trips * (once[cost] - before[cost])

    return row | {
        "fits": True,
        "temporary_bytes": int(once["temporary"]),
        "temporary_share": once["temporary"] / (4 * tokens * vocabulary),
        "flops": total("flops"),
        "bytes": total("bytes"),
        "compiler_seconds": total("seconds") if math.isfinite(once["seconds"]) else None,
        "unknown_operations": once["unknown"],
        "compile_seconds": once["compile"],
    }


if __name__ == "__main__":
    for row in _rows(json.loads(sys.argv[1])):
        print(json.dumps(row), flush=True)
