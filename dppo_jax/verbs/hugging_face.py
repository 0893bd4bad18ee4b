"""Verbs about Hugging Face folders: import-hf, export-hf."""

import argparse
import json
from pathlib import Path
from typing import Any

from dppo_jax.verbs import command
from dppo_jax.verbs.command import GIVEN, Failure, add_verb


def add(verbs: Any) -> None:
    """Adds them to the parser's verbs."""
    importer = add_verb(
        verbs,
        "import-hf",
        _import,
        "Read a Hugging Face folder into a checkpoint that runs start from. A recipe can also name "
        "the folder itself: initial_policy.hf_policy.",
        "dppo import-hf Qwen3-8B-Base runs/qwen3-8b --verify",
    )
    importer.add_argument("folder", metavar="HF_DIR", help="config.json and safetensors files")
    importer.add_argument("out", metavar="OUT", help="a folder that is not there yet")
    importer.add_argument(
        "--verify",
        action="store_true",
        help="first compare logits, greedy tokens and the exported folder with transformers; exit "
        "status 1, and nothing written, where they differ",
    )
    importer.add_argument(
        "--adapter", metavar="PEFT_DIR", help="merge this adapter of PEFT's into the weights"
    )
    importer.add_argument("--json", action="store_true", help="print one JSON object")

    exporter = add_verb(
        verbs,
        "export-hf",
        _export,
        "Write a run's newest checkpoint as a folder that transformers loads.",
        "dppo export-hf runs/RUN my-model --dtype bfloat16",
    )
    exporter.add_argument("checkpoint", metavar="CHECKPOINT", help="a run, or what import-hf wrote")
    exporter.add_argument("out", metavar="OUT_DIR", help="a folder that is not there yet")
    exporter.add_argument(
        "--like",
        metavar="HF_DIR",
        help="take tokenizer and generation settings from here (default: where the run started)",
    )
    exporter.add_argument(
        "--dtype", help="float32, bfloat16 or float16 (default: that of --like, else float32)"
    )
    exporter.add_argument(
        "--adapter",
        action="store_true",
        help="write the adapters of a run with LoRA as PEFT does; else they are merged",
    )
    exporter.add_argument("--json", action="store_true", help="print one JSON object")


def _import(options: argparse.Namespace) -> None:
    command.start_jax()
    from dppo_jax.hf_exchange import (
        architecture_of,
        check_new,
        read_hf,
        with_adapter,
        write_checkpoint,
    )
    from dppo_jax.sharding import MeshConfig

    folder, out = Path(options.folder).expanduser(), Path(options.out)
    check_new(out)
    mesh = MeshConfig().build()
    imported = read_hf(folder, mesh)
    report: dict[str, Any] = {
        "path": str(out),
        "architecture": architecture_of(folder),
        "parameters": imported.parameters,
    }
    if options.verify:
        from dppo_jax.hf_verify import verify

        report |= verify(imported)
    correct = report.get("ok", True)
    if correct:
        if options.adapter:
            report["adapter"] = options.adapter
            imported = with_adapter(imported, Path(options.adapter).expanduser(), mesh)
        write_checkpoint(imported, out)
    _show(report, f"{folder} -> {out}", options.json)
    if not correct:
        raise Failure(f"{folder} differs from transformers: {out} not written")


def _export(options: argparse.Namespace) -> None:
    command.start_jax()
    from dppo_jax.hf_exchange import ORIGIN, check_new, export_adapter, export_hf
    from dppo_jax.models.hf_config import config_of
    from dppo_jax.sharding import MeshConfig

    checkpoint, out = Path(options.checkpoint).expanduser(), Path(options.out)
    check_new(out)
    like = checkpoint / ORIGIN
    if (like / "config.json").is_file():
        config, start = config_of(str(like)), like
    else:
        config, start = _of_run(checkpoint)
    like = Path(options.like).expanduser() if options.like else start
    export = export_adapter if options.adapter else export_hf
    dtype = export(checkpoint, out, config, MeshConfig().build(), like=like, dtype=options.dtype)
    report = {"path": str(out), "dtype": dtype, "like": str(like) if like else None}
    _show(report, f"{checkpoint} -> {out}", options.json)


def _of_run(run: Path):
    """A run's DecoderConfig, and the Hugging Face folder that it started from, if any."""
    from dppo_jax.config import load_recipe
    from dppo_jax.hf_exchange import ORIGIN
    from dppo_jax.initial_policy import CheckpointPolicy, HuggingFacePolicy
    from dppo_jax.train import train

    recipe = run / "operative_config.gin"
    if not recipe.is_file():
        raise ValueError(f"{run} is neither a run directory nor a folder that import-hf wrote")
    found = load_recipe(recipe, train, (), GIVEN).arguments("model", "initial_policy")
    match found["initial_policy"]:
        case HuggingFacePolicy(path):
            start = Path(path).expanduser()
        case CheckpointPolicy(directory):
            start = Path(directory).expanduser() / ORIGIN
        case _:
            return found["model"], None
    return found["model"], start if (start / "config.json").is_file() else None


def _show(report: dict[str, Any], title: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
        return
    from dppo_jax.console import Console

    def text(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else f"{value}"

    Console().table(title, {name.replace("_", " "): text(v) for name, v in report.items()})
