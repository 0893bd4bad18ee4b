"""Measured speed of the rollout engine, and how near it is to the machine's limits.

A decoding step reads the weights once and every slot's keys and values once, and makes the matrix
products of one token a slot. The fraction reported is of the time that the slower of the two needs
at the bandwidth and the matmul rate measured in the same run.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.bench import forward_flops, matmul_peak, mesh_of_copies, seconds_of
from dppo_jax.console import Console
from dppo_jax.models.decoder import DecoderConfig, Model, Params
from dppo_jax.sampling.engine import Engine, EngineConfig
from dppo_jax.sampling.paged_cache import storage_dtype
from dppo_jax.sampling.requests import SamplingParams
from dppo_jax.sharding import shardings_of

STREAM_BYTES = 2**28  # read and written by the measurement of the bandwidth


# Qwen3's form at the width of the comparison, and Qwen3-1.7B of its config.json.
SMALL: dict[str, Any] = dict(width=256, layers=4, heads=4, kv_heads=4, head_size=64, mlp_width=1024)
QWEN3_1_7B: dict[str, Any] = dict(
    width=2048, layers=28, heads=16, kv_heads=8, head_size=128, mlp_width=6144
)


@dataclass(frozen=True)
class Shape:
    """What is drawn, of which model. Response lengths are fixed, or from a long tail."""

    model: dict[str, Any]
    vocab: int
    prompts: int
    samples: int
    prompt_length: int
    response_length: int
    slots: int
    tail_median: int = 0  # 0: every response has response_length tokens
    chunk: int = 64  # tokens a slot draws before the host looks


# Of the comparison with other samplers, of continuous batching (as many responses as a step of the
# paper's recipe has), and of an accelerator. Where responses wait for slots chunks are shorter: a
# slot whose response has ended waits for the chunk's end.
PRESETS = {
    "small-batch": Shape(SMALL, 4096, 16, 1, 64, 128, 16),
    "large-batch": Shape(SMALL, 1024, 16, 8, 32, 128, 128),
    "long-tail": Shape(SMALL, 1024, 512, 1, 32, 512, 64, tail_median=64, chunk=32),
    "qwen3-1.7b": Shape(QWEN3_1_7B, 151_936, 16, 8, 512, 512, 128),
}


def tail_lengths(count: int, median: int, longest: int, seed: int = 0) -> np.ndarray:
    """Lengths of a log-normal of this median, one in a hundred of them cut at `longest`."""
    sigma = math.log(longest / median) / 2.326  # the normal's 99th percentile
    drawn = median * np.exp(sigma * np.random.default_rng(seed).standard_normal(count))
    return np.clip(np.rint(drawn), 1, longest).astype(int)


def memory_bandwidth(repeats: int = 5) -> float:
    """Bytes a second that a copy with one addition reads and writes, of an array beyond caches."""
    x = jnp.zeros(STREAM_BYTES // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1.0)
    return 2 * STREAM_BYTES / min(seconds_of(lambda: add(x), repeats))


def _run(
    engine: Engine, params: Params, prompts: Sequence[np.ndarray], lengths: np.ndarray, n: int
) -> tuple[float, int]:
    """Seconds and tokens of one generation in which nothing ends early."""
    sampling = [
        SamplingParams(max_new_tokens=int(length), n=n, seed=i) for i, length in enumerate(lengths)
    ]
    began = time.perf_counter()
    done = engine.generate(params, prompts, sampling)
    seconds = time.perf_counter() - began
    return seconds, sum(len(c.tokens) for each in done for c in each)


def _floor_seconds(
    config: DecoderConfig,
    shape: Shape,
    lengths: np.ndarray,
    peak: float,
    bandwidth: float,
    cache_dtype: str,
) -> float:
    """The time that no decoder with these weights and this cache goes below.

    Steps as few as the slots allow; each reads the weights once, and each token the keys and values
    of its context once, a prompt's once for its samples. The products are those of the tokens.
    """
    tokens = shape.samples * int(lengths.sum())
    steps = max(-(-tokens // shape.slots), int(lengths.max()))
    abstract = Model(config).abstract_params
    size = jnp.dtype(config.dtype).itemsize
    weights = size * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    a_token = 2 * config.layers * config.kv_heads * config.head_size
    a_token *= storage_dtype(config, cache_dtype).itemsize
    own = shape.samples * float((lengths * (lengths + 1) / 2).sum())
    shared = float(shape.prompt_length * lengths.sum())
    read = steps * weights + a_token * (own + shared)
    contexts = shape.samples * float((lengths * shape.prompt_length).sum()) + own
    flops = forward_flops(config, tokens, contexts, tokens)
    prompt = shape.prompt_length
    flops += forward_flops(
        config, shape.prompts * prompt, shape.prompts * prompt * (prompt + 1) / 2, 0
    )
    return max(read / bandwidth, flops / peak)


def bench_sample(
    *,
    preset: str,
    top_k: int,
    chunk: int | None,
    page_size: int,
    dtype: str,
    cache_dtype: str,
    repeats: int,
    data: int = 0,
) -> dict[str, Any]:
    """Tokens a second of a preset on random weights, as medians over `repeats` runs.

    chunk: None for the preset's.

    All devices take part: `data` copies of the parameters (0: one on each device of a CPU, else
    one) share the slots.

    Forms: "recorded" returns log-probabilities, entropy and the top K; "plain" has K = 0, and
    still computes the softmax that it draws from. The long tail adds "static": slots are filled
    only when all of them are free.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    shape = PRESETS[preset]
    shape = shape if chunk is None else replace(shape, chunk=chunk)
    config = DecoderConfig(vocab_size=shape.vocab, **shape.model, qk_norm=True, dtype=dtype)
    model = Model(config)
    mesh = mesh_of_copies(data)

    def made(key):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), model.init(key))

    with jax.set_mesh(mesh):
        born = jax.jit(made, out_shardings=shardings_of(model.logical_axes, mesh))
        params = born(jax.random.key(0))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, shape.vocab, shape.prompt_length) for _ in range(shape.prompts)]
    lengths = np.full(shape.prompts, shape.response_length)
    if shape.tail_median:
        lengths = tail_lengths(shape.prompts, shape.tail_median, shape.response_length)
    whole = shape.prompt_length + shape.response_length
    settings = EngineConfig(
        slots=shape.slots,
        max_context=whole,
        chunk=shape.chunk,
        page_size=page_size,
        prefill_buckets=(shape.prompt_length, whole),
        prefix_cache=False,  # the prompts of all runs are the same
        samples=shape.samples,
        shared_tokens=shape.prompt_length,
        top_k_capture=top_k,
        cache_dtype=cache_dtype,
    )
    forms: dict[str, dict[str, Any]] = {"recorded": {}, "plain": {"top_k_capture": 0}}
    if shape.tail_median:
        forms["static"] = {"continuous": False}
    peaks, bandwidths = [matmul_peak(dtype=dtype)], [memory_bandwidth()]
    engines = {}
    for name, change in forms.items():
        engine = engines[name] = Engine(
            model, replace(settings, **change), mesh if mesh.size > 1 else None
        )
        engine.warm_up(params)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    tokens = 0
    for _ in range(repeats):  # in turn, so that a slow moment meets all of them
        for name, engine in engines.items():
            spent, tokens = _run(engine, params, prompts, lengths, shape.samples)
            seconds[name].append(spent)
    peaks.append(matmul_peak(dtype=dtype))
    bandwidths.append(memory_bandwidth())
    floor = _floor_seconds(config, shape, lengths, max(peaks), max(bandwidths), cache_dtype)
    found = {}
    for name, engine in engines.items():
        median, stats = statistics.median(seconds[name]), engine.stats
        found[name] = {
            "seconds": median,
            "seconds_min": min(seconds[name]),
            "tokens_per_second": tokens / median,
            "fraction_of_limit": floor / median,
            "slots_busy": stats.drawn_tokens / max(1, stats.slot_steps),
            "compilations": stats.compilations,
            "preemptions": stats.preemptions,
        }
    return {
        "forms": found,
        "preset": preset,
        "shape": vars(shape)
        | dict(
            top_k=top_k, page_size=page_size, dtype=dtype, cache_dtype=cache_dtype, tokens=tokens
        ),
        "limit_seconds": floor,
        "peak_flops_per_second": max(peaks),
        "bandwidth_bytes_per_second": max(bandwidths),
        "repeats": repeats,
        "machine": {
            "device": jax.devices()[0].device_kind,
            "devices": mesh.size,
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
    }  # fmt: skip


def show_sample(result: dict[str, Any]) -> None:
    """The result as a table."""
    rows = {
        name: f"{form['tokens_per_second']:10,.0f} tokens/s   {form['fraction_of_limit']:4.0%} of "
        f"the limit   slots busy {form['slots_busy']:4.0%}"
        for name, form in result["forms"].items()
    }
    rows["matmul peak"] = f"{result['peak_flops_per_second'] / 1e9:.0f} GFLOP/s"
    rows["memory bandwidth"] = f"{result['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s"
    shape = result["shape"]
    size = f"{shape['prompts']} x {shape['samples']}, {shape['prompt_length']} + "
    size += f"{'up to ' if shape['tail_median'] else ''}{shape['response_length']} tokens"
    Console().table(f"sampling {result['preset']}: {size}, vocabulary {shape['vocab']}", rows)
