"""Adapters from and to the folders of Hugging Face's PEFT.

    train.train.lora = @peft.adapter()
    peft.adapter.path = "my-adapter"

A folder holds adapter_config.json and adapter_model.safetensors: for each module A [rank, in] and
B [out, rank], the transposes of ours. Experts stand one by one, as transformers 4 named them (PEFT
fuses them itself), or fused, as PEFT writes `target_parameters`: A [experts·rank, in] with the
experts outside, B [out, rank·experts] with the experts inside, gates and ups in one, a module's
parameters nested as `base_layer`. Both are read; the first is written.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
    "lora_bias", "fan_in_fan_out", "trainable_token_indices",
    "layer_replication", "alora_invocation_tokens", "use_qalora", "megatron_config",
)  # fmt: skip
# theirs -> ours, for what names its module by a last part
MODULES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "lm_head": "unembedding",
}  # fmt: skip
# Fused parameters of a mixture's module, the innermost first, and what each is made of.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class _Part(NamedTuple):
    """An expert's matrix within a fused one."""

    whole: Stored
    split: tuple[int, ...]  # the fused matrix with its experts as an axis of their own
    at: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view().shape

    def view(self) -> np.ndarray:
        return self.whole.view().reshape(self.split)[self.at]


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
    try:
        rank, alpha = int(described["r"]), float(described["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: r or lora_alpha is missing or no number") from error
    modules = {
        name.split(".lora_")[0].rpartition(".")[2] for name in _adapter_tensors(folder, described)
    }
    for module in sorted(modules - MODULES.keys()):
        raise ValueError(f"{folder / WEIGHTS} adapts {module}; known are {', '.join(MODULES)}")
    found = {MODULES[module] for module in modules}
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
    described = read_json(folder / CONFIG)
    found, places = _adapter_tensors(folder, described), _places(model)
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


def _adapter_tensors(folder: Path, described: dict[str, Any]) -> dict[str, Stored | _Part]:
    """The folder's tensors, fused ones as those of each expert, but without copies of frozen ones,
    which PEFT keeps of an adapted lm_head."""
    found: dict[str, Stored | _Part] = {}
    fused = _fused_modules(folder, described)
    for name, tensor in tensors_of(folder / WEIGHTS).items():
        module, _, letter = name.partition(".lora_")
        if module in fused:
            found |= _experts_of(folder, module, letter[0], tensor, fused[module], described["r"])
        elif not name.endswith(".base_layer.weight"):
            found[name] = tensor
    return found


def _fused_modules(folder: Path, described: dict[str, Any]) -> dict[str, str]:
    """The modules that hold adapters of `target_parameters`, and which of them each has."""
    targets = described.get("target_parameters") or ()
    for target in targets:
        if not target.endswith(tuple(f"experts.{name}" for name in FUSED)):
            raise ValueError(
                f"{folder / CONFIG}: target_parameters names {target}; known are the experts' "
                f"{' and '.join(FUSED)}: train the others as target_modules"
            )
    # PEFT wraps a module once for each of its parameters, in the module's order.
    order = [name for name in FUSED if any(target.endswith(name) for target in targets)]
    modules = {name.partition(".lora_")[0] for name in tensors_of(folder / WEIGHTS)}
    return {
        module: order[-1 - module.count(".base_layer")]
        for module in modules
        if module.removesuffix(".base_layer").endswith(".experts")
        and module.count(".base_layer") < len(order)
    }


def _experts_of(
    folder: Path, module: str, letter: str, tensor: Stored, fused: str, rank: int
) -> dict[str, _Part]:
    rows, columns = tensor.shape
    experts, rest = divmod(rows if letter == "A" else columns, rank)
    parts = FUSED[fused]
    if rest or (letter == "B" and rows % len(parts)):
        raise ValueError(
            f"{folder / WEIGHTS}: {module}.lora_{letter}.weight has shape {tensor.shape}, which is "
            f"no {fused} of experts at rank {rank}"
        )
    found: dict[str, _Part] = {}
    for at, part in enumerate(parts):
        mine = slice(at * rows // len(parts), (at + 1) * rows // len(parts))
        for expert in range(experts):
            name = f"{module.removesuffix('.base_layer')}.{expert}.{part}.lora_{letter}.weight"
            if letter == "A":  # one for gates and ups
                found[name] = _Part(tensor, (experts, rank, columns), (expert,))
            else:
                found[name] = _Part(tensor, (rows, rank, experts), (mine, slice(None), expert))
    return found


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


def _numbers(tensor: Stored | _Part) -> np.ndarray:
    return np.asarray(tensor.view(), np.float32)
