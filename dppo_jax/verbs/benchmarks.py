"""Verbs that measure: bench step, bench head, bench sample."""

import argparse
import importlib.util
import json
from typing import Any

from dppo_jax.verbs import command
from dppo_jax.verbs.command import add_verb


def add(verbs: Any) -> None:
    """Adds them to the parser's verbs."""
    bench = verbs.add_parser("bench", help="Measure speed.").add_subparsers(
        required=True, metavar="WHAT"
    )
    step = add_verb(
        bench,
        "step",
        _bench_step,
        "Seconds of one training step: sampling, scoring, update, against the matmul peak.",
        "dppo bench step --json\n"
        "  Qwen3's form:     dppo bench step --kv-heads 2\n"
        "  Qwen3-MoE's form: dppo bench step --kv-heads 2 --mlp 128 --experts 32 "
        "--experts-per-token 8",
    )
    step.add_argument("--json", action="store_true", help="print one JSON object")
    for flag, default in (
        ("vocab", 1024), ("width", 256), ("layers", 4), ("head-size", 64), ("mlp", 1024),
        ("prompts", 16), ("samples", 8), ("prompt-length", 32), ("response-length", 128),
        ("top-k", 20), ("microbatches", 4), ("repeats", 5),
        ("kv-heads", 0), ("experts", 0), ("experts-per-token", 0),
    ):  # fmt: skip
        step.add_argument(f"--{flag}", type=int, default=default, help=f"(default: {default})")
    _add_data(step, "the batch")

    head = add_verb(
        bench,
        "head",
        _bench_head,
        "Seconds and memory of the head's forms, forward and with both gradients.",
        "dppo bench head --tokens 2048 --width 512 --vocab 151936 --json",
    )
    head.add_argument("--json", action="store_true", help="print one JSON object")
    for flag, default in (
        ("tokens", 2048), ("width", 512), ("vocab", 151936), ("top-k", 20), ("repeats", 3),
    ):  # fmt: skip
        head.add_argument(f"--{flag}", type=int, default=default, help=f"(default: {default})")
    head.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: float32)")
    forms = "naive,chunked,xla,pallas_tpu,single_pass"
    head.add_argument(
        "--forms",
        help=f"which, by commas (default: {forms} and, measured, tokamax, compiled, "
        "pallas_tpu_forward and, with the vocabulary over all devices of four chips, "
        "parallel_forward, parallel, parallel_single_pass)",
    )
    head.add_argument(
        "--chips",
        help="compile for these TPUs instead, by commas (v4, v5e, v5p, v6e, 7x): memory, flops and "
        "seconds as the compiler has them, in bfloat16; needs libtpu and no TPU",
    )

    sample = add_verb(
        bench,
        "sample",
        _bench_sample,
        "Tokens a second of the rollout engine, against the machine's limits.",
        "dppo bench sample large-batch --json",
    )
    sample.add_argument(
        "preset", help="small-batch, large-batch, long-tail, or qwen3-1.7b (for an accelerator)"
    )
    sample.add_argument("--json", action="store_true", help="print one JSON object")
    for flag, default in (("top-k", 20), ("page-size", 32), ("repeats", 3)):
        sample.add_argument(f"--{flag}", type=int, default=default, help=f"(default: {default})")
    sample.add_argument(
        "--chunk", type=int, help="tokens between two looks of the host (default: the preset's)"
    )
    sample.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: float32)")
    sample.add_argument(
        "--cache-dtype", default="model", help="model, bfloat16 or int8 (default: model)"
    )
    _add_data(sample, "the slots")


def _add_data(verb: argparse.ArgumentParser, shared: str) -> None:
    verb.add_argument(
        "--data",
        type=int,
        default=0,
        help=f"how many copies of the parameters share {shared} (default: 2 on a CPU, made two "
        "devices; else 1, split over all devices)",
    )


def _start_devices(options: argparse.Namespace) -> None:
    """What XLA runs on one core of a CPU in decoding, two devices do side by side."""
    command.start_jax(cpu_devices=options.data or 2)


def _bench_sample(options: argparse.Namespace) -> None:
    _start_devices(options)
    from dppo_jax.bench_sample import bench_sample, show_sample

    result = bench_sample(
        preset=options.preset,
        top_k=options.top_k,
        chunk=options.chunk,
        page_size=options.page_size,
        dtype=options.dtype,
        cache_dtype=options.cache_dtype,
        repeats=options.repeats,
        data=options.data,
    )
    print(json.dumps(result)) if options.json else show_sample(result)


def _bench_step(options: argparse.Namespace) -> None:
    _start_devices(options)
    from dppo_jax.bench import bench_step, show_step

    shape = {
        name: value
        for name, value in vars(options).items()
        if name not in ("verb", "json", "debug", "overrides")
    }
    result = bench_step(**shape)
    print(json.dumps(result)) if options.json else show_step(result)


def _bench_head(options: argparse.Namespace) -> None:
    if options.chips:
        _compile_head(options)
        return
    command.start_jax()
    from dppo_jax.bench_head import FORMS, bench_head, show_head

    result = bench_head(
        tokens=options.tokens,
        width=options.width,
        vocab=options.vocab,
        top_k=options.top_k,
        dtype=options.dtype,
        forms=options.forms.split(",") if options.forms else list(FORMS),
        repeats=options.repeats,
    )
    print(json.dumps(result)) if options.json else show_head(result)


def _compile_head(options: argparse.Namespace) -> None:
    from dppo_jax.console import Console
    from dppo_jax.kernels.plan import FORMS, compile_table

    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("--chips needs libtpu: pip install 'dppo-jax[plan]'")
    shape = (options.tokens, options.width, options.vocab)
    forms = options.forms.split(",") if options.forms else FORMS
    rows = compile_table(options.chips.split(","), (shape,), forms, options.top_k)
    if options.json:
        print(json.dumps({"compiled": rows}))
        return
    cells = {f"{row['chip']} {row['form']}": _compiled(row) for row in rows}
    Console().table(f"head N={shape[0]} D={shape[1]} V={shape[2]} K={options.top_k}", cells)


def _compiled(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    if not row["fits"]:
        return f"does not fit: needs {row['needed_bytes'] / 2**30:.1f} GiB"
    seconds = row["compiler_seconds"]
    least = ">= " if row["unknown_operations"] else ""
    told = "-" if seconds is None else f"{least}{seconds * 1e3:.1f}"
    return (
        f"{row['temporary_bytes'] / 2**20:.0f} MiB ({row['temporary_share']:.1%} of N x V), "
        f"{told} ms (roofline {row['roofline_seconds'] * 1e3:.1f})"
    )
