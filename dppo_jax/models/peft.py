"""Adapters from and to the folders of Hugging Face's PEFT.

    train.train.lora = @peft.adapter()
    peft.adapter.path = "my-adapter"

A folder holds adapter_config.json and adapter_model.safetensors: for each module A [rank, in] and
B [out, rank], the transposes of ours, those of experts one by one.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dppo_jax.models.adapters import ADAPTABLE, A, B, LoraConfig
from dppo_jax.models.decoder import Params
from dppo_jax.models.hf_config import read_json
from dppo_jax.models.hf_files import DTYPES, NAMES, Stored, tensors_of, write_file
from dppo_jax.models.hf_weights import OUTSIDE, leaves_of
from dppo_jax.models.lora import LoraModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Fields of PEFT's configuration that make another function of the same tensors where they are set.
UNKNOWN = (
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform",
    "lora_bias", "fan_in_fan_out", "target_parameters", "trainable_token_indices",
    "layer_replication", "alora_invocation_tokens", "use_qalora", "megatron_config",
)  # fmt: skip
# theirs -> ours, for what names its module by a last part
MODULES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "lm_head": "unembedding",
}  # fmt: skip


def adapter(path: str, dropout: float = 0.0) -> LoraConfig:
    """Training that goes on from a PEFT folder: its rank, alpha and matrices, its weights.

    The run's initial policy gives the base.
    """
    folder = Path(path).expanduser()
    described = read_json(folder / CONFIG)
    if described.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type {described.get('peft_type')} is not LORA")
    for name in UNKNOWN:
        if described.get(name):
            raise ValueError(f"{folder / CONFIG} sets {name}, which is not supported here")
    if described.get("bias", "none") != "none":
        raise ValueError(f"{folder / CONFIG} sets bias to {described['bias']}: only none is known")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} lacks {WEIGHTS}; pickled adapters are not read")
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in _adapter_tensors(folder)}
    for module in sorted(modules - MODULES.keys()):
        raise ValueError(f"{folder / WEIGHTS} adapts {module}; known are {', '.join(MODULES)}")
    found = {MODULES[module] for module in modules}
    try:
        rank, alpha = int(described["r"]), float(described["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: r or lora_alpha is missing or no number") from error
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=tuple(name for name in ADAPTABLE if name in found),
        dropout=dropout,
        rslora=bool(described.get("use_rslora", False)),
        start=str(folder),
    )


def is_peft(folder: Path) -> bool:
    """Whether this is a folder of PEFT's."""
    return (folder / CONFIG).is_file()


def read_adapters(folder: Path, model: LoraModel, shardings: Any) -> Params:
    """The folder's tensors as float32 adapters in their shards (`LoraModel.adapter_axes`).

    Raises ValueError naming the first tensor that is missing, of another shape, or too many.
    """
    found, places = _adapter_tensors(folder), _places(model)
    for name, (_, _, shape) in places.items():
        if name not in found:
            raise ValueError(f"{folder / WEIGHTS} lacks {name}")
        if found[name].shape != shape:
            raise ValueError(
                f"{folder / WEIGHTS}: {name} has shape {found[name].shape}; model and rank "
                f"{model.lora.rank} make it {shape}"
            )
    for name in found:
        if name not in places:
            raise ValueError(f"{folder / WEIGHTS} holds {name}, which the model has no place for")
    filled = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), model.abstract_adapters)
    for name, (path, index, _) in places.items():
        _leaf(filled, path)[index] = _numbers(found[name]).T
    return jax.tree.map(
        lambda value, sharding: jax.make_array_from_callback(
            value.shape, sharding, lambda piece: value[piece]
        ),
        filled,
        shardings,
    )


def write_adapters(
    folder: Path, model: LoraModel, adapters: Params, *, base: str | None, dtype: str
) -> None:
    """Writes the two files of a PEFT folder; `base` is the folder or name of the base model.

    With experts and rank-stabilised scaling it is told as a plain alpha of the same scale: PEFT
    fuses gates and ups, doubling rank and alpha, which keeps alpha / rank alone.
    """
    lora, places = model.lora, _places(model)
    modules = {ours: theirs for theirs, ours in MODULES.items()}
    rslora = lora.rslora and not model.config.experts
    alpha = lora.alpha if rslora or not lora.rslora else lora.alpha * math.sqrt(lora.rank)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0 if model.config.experts else lora.dropout,
        "use_rslora": rslora,
        "target_modules": [modules[name] for name in lora.names],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }

    def tensors() -> Iterator[np.ndarray]:
        for path, index, _ in places.values():
            yield np.asarray(_leaf(adapters, path)[index].T).astype(DTYPES[NAMES[dtype]])

    shapes = {name: shape for name, (_, _, shape) in places.items()}
    write_file(folder / WEIGHTS, shapes, tensors(), DTYPES[NAMES[dtype]], NAMES[dtype])
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")


def _adapter_tensors(folder: Path) -> dict[str, Stored]:
    """The folder's tensors but copies of frozen ones, which PEFT keeps of an adapted lm_head."""
    found = tensors_of(folder / WEIGHTS)
    return {name: at for name, at in found.items() if not name.endswith(".base_layer.weight")}


def _places(model: LoraModel) -> dict[str, tuple[tuple[str, ...], Any, tuple[int, ...]]]:
    """Each tensor of theirs: our leaf, the index into its leading axes, the shape as stored."""
    names = {leaf.path: leaf.names for leaf in leaves_of(model)}
    names[("unembedding",)] = {OUTSIDE["unembedding"]: ()}
    places = {}
    for name in model.lora.names:
        path = (name,) if name == "unembedding" else ("blocks", name)
        for theirs, index in names[path].items():
            for suffix, letter in ((A, "A"), (B, "B")):
                leaf = (*path[:-1], name + suffix)
                shape = _leaf(model.abstract_adapters, leaf).shape[-2:]
                stem = theirs.removesuffix(".weight")
                places[f"{PREFIX}{stem}.lora_{letter}.weight"] = leaf, index, shape[::-1]
    return places


def _leaf(tree: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _numbers(tensor: Stored) -> np.ndarray:
    return np.asarray(tensor.view(), np.float32)
