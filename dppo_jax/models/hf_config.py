"""`config.json` of a Hugging Face folder to DecoderConfig and back, family by family."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.hf_rope import Json, longest_of, ropes_of, scaling_json

# Of a DecoderConfig, what the weights do not depend on.
FREE = ("dtype", "remat", "remat_policy", "load_balancing")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Family(NamedTuple):
    """What an architecture fixes, and transformers' defaults of what config.json may leave out."""

    model_type: str
    fixed: dict[str, Any]  # fields of DecoderConfig
    defaults: Json
    activation: str = "hidden_act"  # the name of its key


GEMMA = dict(post_norms=True, unit_offset_norms=True, scaled_embeddings=True)
GEMMA_DEFAULTS: Json = dict(
    head_dim=256,
    query_pre_attn_scalar=256,
    tie_word_embeddings=True,
    sliding_window=4096,
    hidden_activation="gelu_pytorch_tanh",
)
FAMILIES = {
    "LlamaForCausalLM": Family("llama", {}, {}),
    "MistralForCausalLM": Family(
        "mistral", {}, dict(sliding_window=4096, num_key_value_heads=8, use_sliding_window=True)
    ),
    "Qwen2ForCausalLM": Family("qwen2", dict(qkv_bias=True), dict(max_window_layers=28)),
    "Qwen3ForCausalLM": Family(
        "qwen3", dict(qk_norm=True), dict(head_dim=128, max_window_layers=28)
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        dict(qk_norm=True),
        dict(num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False),
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        GEMMA,
        GEMMA_DEFAULTS | dict(final_logit_softcapping=30.0, attn_logit_softcapping=50.0),
        "hidden_activation",
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        GEMMA | dict(qk_norm=True),
        GEMMA_DEFAULTS | dict(rope_theta=1e6, rope_local_base_freq=10_000.0),
        "hidden_activation",
    ),
}


def read_json(path: Path) -> Json:
    """A JSON object; ValueError in one line where there is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a Hugging Face model folder")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def config_of(
    path: str,
    *,
    dtype: str = "float32",
    remat: bool = False,
    remat_policy: str = "nothing_saveable",
    load_balancing: float = 0.0,
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto",
) -> DecoderConfig:
    """The DecoderConfig of a Hugging Face folder, for computation in `dtype`.

    Raises ValueError where the architecture, or something that it is set to, is not known here.
    """
    file = Path(path).expanduser() / "config.json"
    config = parse(read_json(file), str(file))
    return dataclasses.replace(
        config,
        dtype=dtype,
        remat=remat,
        remat_policy=remat_policy,
        load_balancing=load_balancing,
        attention=attention,
    )


def parse(given: Json, where: str = "config.json") -> DecoderConfig:
    """The DecoderConfig that the contents of a `config.json` mean."""
    architecture = (given.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise ValueError(
            f"{where} is of the architecture {architecture}; known are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[architecture]
    # An explicit null is transformers' way of saying "as usual", but for soft-caps and windows.
    kept_null = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")
    hf = family.defaults | {k: v for k, v in given.items() if v is not None or k in kept_null}

    def size(name: str, *default: int) -> int:
        value = hf.get(name, *default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: {name}={value!r} should be a whole number above 0")
        return value

    def number(name: str) -> float | None:
        value = hf.get(name)
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"{name}={value!r} should be a number")
        return None if value is None else float(value)

    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if hf.get(name) and not (name == "attention_bias" and family.model_type == "qwen2"):
            raise ValueError(f"{where}: {name}=true is not supported")
    moe = family.model_type == "qwen3_moe"
    if moe and (hf.get("mlp_only_layers") or hf.get("decoder_sparse_step", 1) != 1):
        raise ValueError(f"{where}: layers without experts among those with them are not supported")
    if moe and hf.get("use_sliding_window"):
        raise ValueError(f"{where}: use_sliding_window=true is not supported for {architecture}")
    activation = hf.get(family.activation, "silu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    layers, heads, width = (
        size(name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    window, local_layers = _windows(hf, family, layers, where)
    theta, scaling, local_theta = ropes_of(hf, where)
    try:
        return DecoderConfig(
            vocab_size=size("vocab_size"),
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_size=size("head_dim", width // heads),
            mlp_width=size("moe_intermediate_size" if moe else "intermediate_size"),
            # transformers 5 writes the one name, the published files have the other.
            experts=size("num_experts", hf.get("num_local_experts", 128)) if moe else 0,
            experts_per_token=size("num_experts_per_tok") if moe else 0,
            normalised_gates=moe and bool(hf["norm_topk_prob"]),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=number("rms_norm_eps") or 1e-6,
            tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
            window=window,
            local_layers=local_layers,
            local_rope_theta=local_theta if window is not None else None,
            attention_scalar=number("query_pre_attn_scalar"),
            attention_soft_cap=number("attn_logit_softcapping"),
            final_soft_cap=number("final_logit_softcapping"),
            activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
            **family.fixed,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _windows(hf: Json, family: Family, layers: int, where: str):
    """The sliding window, and which layers have it (empty: all)."""
    window = hf.get("sliding_window")
    gemma = family.model_type.startswith("gemma")
    if window is None or not (gemma or hf.get("use_sliding_window")):
        return None, ()
    kinds = hf.get("layer_types")
    if kinds is None and gemma:
        every = int(hf.get("sliding_window_pattern", 2 if family.model_type == "gemma2" else 6))
        local = tuple(bool((layer + 1) % every) for layer in range(layers))
    elif kinds is None and family.model_type == "mistral":
        local = (True,) * layers
    elif kinds is None:
        local = tuple(layer >= hf["max_window_layers"] for layer in range(layers))
    elif set(kinds) <= {"sliding_attention", "full_attention"} and len(kinds) == layers:
        local = tuple(kind == "sliding_attention" for kind in kinds)
    else:
        raise ValueError(f"{where}: layer_types {sorted(set(kinds))} for {layers} layers")
    if not any(local):
        return None, ()
    return window, () if all(local) else local


def to_json(config: DecoderConfig, dtype: str) -> Json:
    """A `config.json` that means `config`, for weights stored in `dtype`.

    Raises ValueError where no known architecture has this combination of settings.
    """
    c = config
    architecture = _architecture(c)
    family = FAMILIES[architecture]
    theta: Json = {"rope_theta": c.rope_theta, **scaling_json(c.rope_scaling)}
    value: Json = {
        "architectures": [architecture],
        "model_type": family.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "intermediate_size": c.mlp_width,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied_embeddings,
        family.activation: {ours: hf for hf, ours in ACTIVATIONS.items() if hf != "swish"}[
            c.activation
        ],
        "max_position_embeddings": longest_of(c.rope_scaling),
        "dtype": dtype,
    }
    local = [window is not None for window in c.windows]
    gemma = family.model_type.startswith("gemma")
    if gemma:
        value |= {
            "query_pre_attn_scalar": int(c.attention_scalar or c.head_size),
            "attn_logit_softcapping": c.attention_soft_cap,
            "final_logit_softcapping": c.final_soft_cap,
        }
    if family.model_type == "gemma3_text":
        near = {"rope_type": "default", "rope_theta": c.local_rope_theta or c.rope_theta}
        value["rope_parameters"] = {"full_attention": theta, "sliding_attention": near}
    else:
        value["rope_parameters"] = theta
    value["sliding_window"] = c.window
    if family.model_type.startswith("qwen"):
        value["use_sliding_window"] = c.window is not None
    if c.experts:
        value |= {
            "moe_intermediate_size": c.mlp_width,
            "num_experts": c.experts,
            "num_experts_per_tok": c.experts_per_token,
            "norm_topk_prob": c.normalised_gates,
        }
    elif gemma or family.model_type.startswith("qwen"):
        kinds = ("full_attention", "sliding_attention")
        value["layer_types"] = [kinds[is_local] for is_local in local]
    if family.model_type == "llama":
        del value["sliding_window"]
    try:
        understood = parse(value)
    except ValueError:
        understood = None
    if understood is None or not same_weights(understood, c):
        raise ValueError(
            f"no Hugging Face architecture has this model's combination of settings: as "
            f"{architecture} it would be {_difference(understood, c)}"
        )
    return value


def same_weights(one: DecoderConfig, other: DecoderConfig) -> bool:
    """Whether two configurations make the same function of the same weights."""
    return _free(one) == _free(other)


def check_same(path: str, config: DecoderConfig) -> None:
    """Raises ValueError where a Hugging Face folder is of another model than `config`."""
    if not same_weights(config_of(path), config):
        raise ValueError(
            f"{path}/config.json is of another model than the recipe's DecoderConfig: "
            "bind train.train.model = @hf_config.config_of() with the same path"
        )


def _free(config: DecoderConfig) -> Json:
    fields = dataclasses.asdict(config) | {"rope_scaling": config.rope_scaling}
    local_theta = config.rope_theta if config.rope_scaling is None else None
    return {
        **{name: value for name, value in fields.items() if name not in FREE},
        "local_rope_theta": config.window and (config.local_rope_theta or local_theta),
        "attention_scalar": config.attention_scalar or config.head_size,
        "local_layers": config.windows,
    }


def _difference(one: DecoderConfig | None, other: DecoderConfig) -> str:
    if one is None:
        return "refused"
    ours, theirs = _free(one), _free(other)
    return ", ".join(f"{n}={ours[n]} for {theirs[n]}" for n in ours if ours[n] != theirs[n])


def _architecture(c: DecoderConfig) -> str:
    if c.post_norms:
        return "Gemma3ForCausalLM" if c.qk_norm else "Gemma2ForCausalLM"
    if c.qk_norm:
        return "Qwen3MoeForCausalLM" if c.experts else "Qwen3ForCausalLM"
    if c.qkv_bias:
        return "Qwen2ForCausalLM"
    return "LlamaForCausalLM" if c.window is None else "MistralForCausalLM"
