"""Measured speed of one training step, against what this machine's matrix products reach."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dppo_jax.advantages import group_mean_baseline
from dppo_jax.console import Console
from dppo_jax.models.decoder import DecoderConfig, Model
from dppo_jax.objectives import dppo_binary_tv
from dppo_jax.optimizer import adamw
from dppo_jax.records import Batch, Prompts
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.sampling.weights import for_decoding
from dppo_jax.scoring import score
from dppo_jax.sharding import MeshConfig, batch_sharding, check_divides, shardings_of
from dppo_jax.update import init_state, make_update

PEAK_SIZE = 2048  # of the square matrices whose product is the peak


def forward_flops(config: DecoderConfig, tokens: int, contexts: float, predictions: int) -> float:
    """Multiply-adds x 2 of a forward pass, the work that no implementation can leave out.

    `tokens` go through the layers, attend to `contexts` keys in all (causal: half the square) and
    `predictions` of them through the unembedding.
    """
    c = config
    projections = c.width * c.head_size * (2 * c.heads + 2 * c.kv_heads)
    mlp = 3 * c.width * c.mlp_width * (c.experts_per_token or 1) + c.width * c.experts
    layer = projections + mlp
    attention = 2 * c.heads * c.head_size * contexts
    return 2.0 * (c.layers * (layer * tokens + attention) + c.width * c.vocab_size * predictions)


def step_flops(
    config: DecoderConfig, prompts: int, samples: int, length: int, new: int
) -> dict[str, float]:
    """Flops of sampling, scoring and update for a step without early ends.

    A prompt's samples share its tokens, which go through once; the last token of a response is
    predicted and predicts nothing. The update is the forward pass and twice that backward.
    """
    batch, fed = prompts * samples, new - 1
    in_prompt = prompts * length * (length + 1) / 2
    in_response = batch * (fed * length + fed * (fed + 1) / 2)
    tokens, predictions = prompts * length + batch * fed, prompts + batch * fed
    forward = forward_flops(config, tokens, in_prompt + in_response, predictions)
    return {"sampling": forward, "scoring": forward, "update": 3 * forward}


def seconds_of(run: Callable[[], Any], repeats: int) -> list[float]:
    """Wall seconds of each of `repeats` runs, after one that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds


def matmul_peak(repeats: int = 10, dtype: str = "float32") -> float:
    """Flops a second of the best product of two square matrices through XLA."""
    # An accelerator needs a larger product to reach its peak, and has the memory for it.
    size = PEAK_SIZE if jax.default_backend() == "cpu" else 4 * PEAK_SIZE
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / min(seconds_of(lambda: product(a), repeats))


def mesh_of_copies(data: int) -> Mesh:
    """All devices, `data` copies of the parameters on them; 0: one on each of a CPU, else one."""
    if data == 0:
        data = jax.device_count() if jax.default_backend() == "cpu" else 1
    return MeshConfig(data=data).build()


def bench_step(
    *,
    vocab: int,
    width: int,
    layers: int,
    head_size: int,
    mlp: int,
    prompts: int,
    samples: int,
    prompt_length: int,
    response_length: int,
    top_k: int,
    microbatches: int,
    repeats: int,
    kv_heads: int = 0,
    experts: int = 0,
    experts_per_token: int = 0,
    data: int = 0,
) -> dict[str, Any]:
    """Times the parts of a DPPO-Binary-TV step on random weights; nothing ends early.

    All devices take part: `data` copies of the parameters (0: one on each device of a CPU, else
    one in all), each split over the devices that remain.

    With `kv_heads` (0: as many as heads) the model is Qwen3's, with `experts` Qwen3-MoE's, of MLPs
    of `mlp` each.

    A step is sampling and one update: with the rollout as anchor DPPO scores inside the update.
    Scoring alone, what a recomputed anchor would add, is timed beside it. Times are medians.
    """
    sizes = dict(
        vocab=vocab, width=width, layers=layers, head_size=head_size, mlp=mlp, prompts=prompts,
        samples=samples, prompt_length=prompt_length, response_length=response_length,
        microbatches=microbatches, repeats=repeats,
    )  # fmt: skip
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    for name, size, of, divisor in (
        ("width", width, "head_size", head_size),
        ("prompts", prompts, "microbatches", microbatches),
    ):
        if size % divisor:
            raise ValueError(f"{name}={size} is not divisible by {of}={divisor}: change one")
    heads = width // head_size
    config = DecoderConfig(
        vocab_size=vocab,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_size=head_size,
        mlp_width=mlp,
        qk_norm=bool(kv_heads),
        experts=experts,
        experts_per_token=experts_per_token,
        normalised_gates=bool(experts),
    )
    settings = SamplingConfig(
        max_new_tokens=response_length, samples_per_prompt=samples, top_k_capture=top_k
    )
    settings.check(vocab)
    mesh = mesh_of_copies(data)
    check_divides(mesh, "batch", {"prompts / microbatches": prompts // microbatches})
    peak_before = matmul_peak()
    with jax.set_mesh(mesh):
        seconds = _seconds_of_parts(
            config, mesh, settings, prompts, prompt_length, microbatches, repeats
        )
    peak = max(peak_before, matmul_peak())
    flops = step_flops(config, prompts, samples, prompt_length, response_length)
    parts = {}
    for name, measured in seconds.items():
        median = statistics.median(measured)
        parts[name] = {
            "seconds": median,
            "seconds_min": min(measured),
            "flops": flops[name],
            "fraction_of_peak": flops[name] / median / peak,
            "in_step": name != "scoring",
        }
    abstract = jax.tree.leaves(Model(config).abstract_params)
    in_step = [part for part in parts.values() if part["in_step"]]
    step_seconds = sum(part["seconds"] for part in in_step)
    work = sum(part["flops"] for part in in_step)
    return {
        "seconds": step_seconds,
        "flops": work,
        "fraction_of_peak": work / step_seconds / peak,
        "tokens_per_second": prompts * samples * response_length / step_seconds,
        "parts": parts,
        "peak_flops_per_second": peak,
        "shape": dict(
            vocab=vocab, width=width, layers=layers, heads=heads, head_size=head_size, mlp=mlp,
            prompts=prompts, samples=samples, prompt_length=prompt_length,
            response_length=response_length, top_k=top_k, microbatches=microbatches,
            kv_heads=config.kv_heads, experts=experts, experts_per_token=experts_per_token,
            parameters=int(sum(np.prod(p.shape) for p in abstract)),
        ),
        "repeats": repeats,
        "machine": {
            "device": jax.devices()[0].device_kind,
            "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
            "devices": jax.device_count(),
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
    }  # fmt: skip


def _seconds_of_parts(
    config: DecoderConfig,
    mesh: Mesh,
    settings: SamplingConfig,
    prompts: int,
    prompt_length: int,
    microbatches: int,
    repeats: int,
) -> dict[str, list[float]]:
    model, key = Model(config), jax.random.key(0)
    optimizer = adamw(learning_rate=1e-6)
    born = shardings_of(model.logical_axes, mesh)
    state = init_state(jax.jit(model.init, out_shardings=born)(key), optimizer)
    rows = batch_sharding(mesh)
    tokens = jax.random.randint(key, (prompts, prompt_length), 0, config.vocab_size)
    asked = jax.device_put(Prompts(tokens, jnp.ones_like(tokens, bool)), rows)

    def drawn():
        weights = for_decoding(state.params, model, prompts * settings.samples_per_prompt)
        return generate(model, state.params, asked, key, settings=settings, weights=weights)

    rollout = drawn()
    sampling = seconds_of(drawn, repeats)
    scorer = jax.jit(lambda params, rollout: score(model, params, rollout, temperature=1.0))
    scoring = seconds_of(lambda: scorer(state.params, rollout), repeats)
    rewards = (rollout.response_tokens % 2).mean(axis=1).reshape(prompts, -1)
    advantages = group_mean_baseline(rewards).reshape(-1, 1)
    batch = Batch(rollout, jnp.broadcast_to(advantages, rollout.response_mask.shape))
    update = make_update(
        model, dppo_binary_tv(), optimizer, temperature=1.0, microbatches=microbatches
    )

    def run_update():
        nonlocal state
        state, metrics = update(state, batch)
        return state, metrics

    return {"sampling": sampling, "scoring": scoring, "update": seconds_of(run_update, repeats)}


def show_step(result: dict[str, Any]) -> None:
    """The result as a table."""

    def row(part):
        return (
            f"{part['seconds']:.3f} s   {part['flops'] / 1e9:.1f} GFLOP   "
            f"{part['fraction_of_peak']:.0%} of peak"
        )

    rows = {name: row(part) for name, part in result["parts"].items()}
    rows["scoring (not in the step)"] = rows.pop("scoring")
    rows["step"] = row(result)
    rows["tokens a second"] = f"{result['tokens_per_second']:,.0f}"
    rows["matmul peak"] = f"{result['peak_flops_per_second'] / 1e9:.0f} GFLOP/s float32"
    Console().table("one DPPO-Binary-TV step", rows)
