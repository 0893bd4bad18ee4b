"""What a run with LoRA keeps beside its checkpoints, which hold the adapters alone.

`lora.json` says which adapters they are and where the base is: a Hugging Face folder, read again,
or the checkpoint `base` in the run directory, written once.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dppo_jax.checkpoint import CheckpointError, load_params, newest_step, save_params
from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model, Params
from dppo_jax.models.hf_config import check_same
from dppo_jax.models.hf_weights import read_params
from dppo_jax.models.lora import LoraConfig, LoraModel, merged
from dppo_jax.models.peft import read_adapters
from dppo_jax.sharding import shardings_of

KEPT = "lora.json"


def network_of(config: DecoderConfig, lora: LoraConfig | None) -> Model:
    """The run's model; adapters where there is a `lora`."""
    return Model(config) if lora is None else LoraModel(config, lora)


class Parts(NamedTuple):
    """A policy's parameters by what becomes of them."""

    trained: Params
    base: Params | None  # what LoRA leaves alone


def begin(model: Model, params: Params, key: jax.Array, mesh: Mesh) -> Parts:
    """A run's first parameters: with LoRA fresh adapters, or those of PEFT that it starts from."""
    if not isinstance(model, LoraModel):
        return Parts(params, None)
    shardings = shardings_of(model.adapter_axes, mesh)
    if model.lora.start is not None:
        return Parts(read_adapters(Path(model.lora.start).expanduser(), model, shardings), params)
    return Parts(jax.jit(model.init_adapters, out_shardings=shardings)(key), params)


def begin_again(directory: Path, model: Model, key: jax.Array, mesh: Mesh) -> Parts:
    """The base of the run in this directory, and parameters to be replaced by a checkpoint's."""
    if isinstance(model, LoraModel):
        shardings = shardings_of(model.adapter_axes, mesh)
        adapters = jax.jit(model.init_adapters, out_shardings=shardings)(key)
        return Parts(adapters, load_base(directory, model, mesh))
    shardings = shardings_of(model.logical_axes, mesh)
    return Parts(jax.jit(model.init, out_shardings=shardings)(key), None)


def keep(directory: Path, model: Model, base: Any, folder: str | None) -> dict[str, str]:
    """Writes the base, unless it can be read again from a Hugging Face folder.

    Returns the texts of the files that say so.
    """
    if not isinstance(model, LoraModel):
        return {}
    if folder is None and newest_step(directory / "base") is None:
        save_params(directory / "base", base)
    kept = dataclasses.asdict(model.lora) | {"base": folder}
    return {KEPT: json.dumps(kept, indent=2) + "\n"}


def load_base(directory: Path, model: LoraModel, mesh: Mesh) -> Params:
    """The base of a run's adapters."""
    folder = _kept(directory)["base"]
    if folder is None:
        return load_params(
            directory / "base", _abstract(model.abstract_params, model.logical_axes, mesh)
        )
    check_same(folder, model.config)
    return read_params(folder, model, shardings_of(model.logical_axes, mesh))


def load_policy(directory: Path, model: Model, mesh: Mesh) -> Params:
    """The parameters of a run's newest checkpoint for a plain model, adapters merged."""
    found = load_adapters(directory, model.config, mesh)
    if found is None:
        return load_params(directory, _abstract(model.abstract_params, model.logical_axes, mesh))
    return merged(*found)


def load_adapters(
    directory: Path, config: DecoderConfig, mesh: Mesh
) -> tuple[LoraModel, Params] | None:
    """A run's newest adapters over their base, unmerged; None where the run has none."""
    directory = directory.parent if directory.name == "checkpoints" else directory
    if not (directory / KEPT).is_file():
        return None
    kept = _kept(directory)
    model = LoraModel(config, LoraConfig(**{k: v for k, v in kept.items() if k != "base"}))
    adapters = load_params(directory, _abstract(model.abstract_adapters, model.adapter_axes, mesh))
    return model, model.policy(adapters, load_base(directory, model, mesh))


def _kept(directory: Path) -> dict[str, Any]:
    try:
        kept = json.loads((directory / KEPT).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / KEPT} cannot be read: {error}") from error
    targets = kept["targets"]
    return kept | {"targets": targets if isinstance(targets, str) else tuple(targets)}


def _abstract(shapes: Params, axes: Params, mesh: Mesh) -> Params:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings_of(axes, mesh),
    )
