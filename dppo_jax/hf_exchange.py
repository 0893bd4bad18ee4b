"""Hugging Face folders in and out: what `dppo import-hf` and `dppo export-hf` do.

An imported folder is a checkpoint like that of a run, and keeps the origin's small files beside it,
so that what is trained from it can be written back whole.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dppo_jax.checkpoint import save_params
from dppo_jax.lora_run import load_adapters, load_policy
from dppo_jax.models import peft
from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model, Params
from dppo_jax.models.hf_config import (
    FAMILIES,
    check_same,
    config_of,
    parse,
    read_json,
    same_weights,
    to_json,
)
from dppo_jax.models.hf_files import NAMES
from dppo_jax.models.hf_weights import read_params, write_params
from dppo_jax.models.lora import LoraModel, merged
from dppo_jax.sharding import shardings_of

ORIGIN = "hf"  # the folder of an imported checkpoint that holds the small files
# What is neither weights nor config.json, and belongs to a model all the same.
KEPT = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


class Imported(NamedTuple):
    """A Hugging Face folder's model, in memory."""

    folder: Path
    model: Model
    params: Params

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.params))


def read_hf(folder: Path, mesh: Mesh) -> Imported:
    """The model of a Hugging Face folder, its float32 parameters in their shards."""
    model = Model(config_of(str(folder)))
    shardings = shardings_of(model.logical_axes, mesh)
    return Imported(folder, model, read_params(folder, model, shardings))


def load_model(directory: Path, model: Model, mesh: Mesh) -> Params:
    """The parameters of a run's newest checkpoint, adapters merged, or of a Hugging Face folder."""
    if is_hf(directory):
        check_same(str(directory), model.config)
        return read_params(directory, model, shardings_of(model.logical_axes, mesh))
    return load_policy(directory, model, mesh)


def is_hf(directory: Path) -> bool:
    """Whether this is a Hugging Face folder and not a run's."""
    return (directory / "config.json").is_file()


def write_checkpoint(imported: Imported, out: Path) -> None:
    """Writes `out`, a checkpoint that a run may start from; as a whole or not at all."""
    with new_folder(out) as place:
        save_params(place / "checkpoints", imported.params)
        _keep(imported.folder, place / ORIGIN, ("config.json", *KEPT))


def export_hf(
    checkpoint: Path,
    out: Path,
    config: DecoderConfig,
    mesh: Mesh,
    *,
    like: Path | None = None,
    dtype: str | None = None,
) -> str:
    """Writes a checkpoint's newest parameters as a folder that transformers loads.

    `like` is the folder that the model came from: its tokenizer and generation settings go along,
    its config.json too where it still describes the model. `dtype` is that of the weights; by
    default that of `like`, else float32. Returns the dtype.
    """
    origin = None if like is None else read_json(like / "config.json")
    of_origin = origin and (origin.get("dtype") or origin.get("torch_dtype"))
    dtype = dtype or (of_origin if of_origin in NAMES else "float32")
    if dtype not in NAMES:
        raise ValueError(f"dtype {dtype!r}: use one of {', '.join(NAMES)}")
    if origin is not None and same_weights(parse(origin), config):
        described = origin | {"dtype": dtype}
        described.pop("torch_dtype", None)
    else:
        described = to_json(config, dtype)
    model = Model(config)
    with new_folder(out) as place:
        write_folder(place, model, load_model(checkpoint, model, mesh), described, dtype, like)
    return dtype


def with_adapter(imported: Imported, folder: Path, mesh: Mesh) -> Imported:
    """The imported model with the adapter of a PEFT folder merged into its weights."""
    model = LoraModel(imported.model.config, peft.adapter(str(folder)))
    adapters = peft.read_adapters(folder, model, shardings_of(model.adapter_axes, mesh))
    params = merged(model, model.policy(adapters, imported.params))
    return imported._replace(params=params)


def export_adapter(
    checkpoint: Path,
    out: Path,
    config: DecoderConfig,
    mesh: Mesh,
    *,
    like: Path | None = None,
    dtype: str | None = None,
) -> str:
    """Writes the adapters of a run with LoRA as a folder that PEFT loads over the base `like`."""
    dtype = dtype or "float32"
    if dtype not in NAMES:
        raise ValueError(f"dtype {dtype!r}: use one of {', '.join(NAMES)}")
    found = load_adapters(checkpoint, config, mesh)
    if found is None:
        raise ValueError(f"{checkpoint} holds no adapters: it was not trained with LoRA")
    model, policy = found
    with new_folder(out) as place:
        base = None if like is None else str(like)
        peft.write_adapters(place, model, policy["adapters"], base=base, dtype=dtype)
    return dtype


def write_folder(
    place: Path, model: Model, params: Params, described: dict, dtype: str, like: Path | None
) -> None:
    """Weights, config.json, generation_config.json and, from `like`, what else it has."""
    write_params(place, model, params, dtype)
    if like is not None:
        _keep(like, place, KEPT)
    (place / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    generation = place / "generation_config.json"
    if not generation.exists():
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        known = {name: described[name] for name in tokens if described.get(name) is not None}
        generation.write_text(json.dumps({"_from_model_config": True, **known}, indent=2) + "\n")


def architecture_of(folder: Path) -> str:
    """The name in config.json, one of `FAMILIES`."""
    (name,) = set(read_json(folder / "config.json")["architectures"]) & FAMILIES.keys()
    return name


def _keep(source: Path, target: Path, names: tuple[str, ...]) -> None:
    target.mkdir(exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def check_new(out: Path) -> None:
    """Raises ValueError where `out` holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists: give a folder that is not there yet, or an empty one")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` once the block ends well, and else disappears."""
    check_new(out)
    place = out.absolute().with_name(f".{out.name}.unfinished")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
        if out.exists():
            out.rmdir()
        place.rename(out)
    finally:
        shutil.rmtree(place, ignore_errors=True)
