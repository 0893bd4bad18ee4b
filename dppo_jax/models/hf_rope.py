"""The rotary embeddings that a `config.json` asks for, by its old keys and its new, and back."""

from typing import Any

from dppo_jax.models.rope import Linear, Llama3, RopeScaling, Yarn

Json = dict[str, Any]


def ropes_of(hf: Json, where: str) -> tuple[float, RopeScaling | None, float | None]:
    """θ and scaling of the (global) layers, θ of local ones where they have their own."""
    # transformers 5 writes rope_parameters, one dict or one a kind of layer; before it,
    # rope_theta and rope_scaling.
    new = hf.get("rope_parameters") or {}
    local = hf.get("rope_local_base_freq")
    if "full_attention" in new:
        local = new.get("sliding_attention", {}).get("rope_theta", local)
        new = new["full_attention"]
    scaling = hf.get("rope_scaling") or new
    theta = float(new.get("rope_theta") or hf.get("rope_theta") or 10_000.0)
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: rope over a part of the head is not supported")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    try:
        return theta, _scaling(kind, scaling, hf), None if local is None else float(local)
    except KeyError as error:
        raise ValueError(f"{where}: rope of type {kind!r} lacks {error}") from error
    except LookupError as error:
        raise ValueError(f"{where}: {error}") from error


def _scaling(kind: str, s: Json, hf: Json) -> RopeScaling | None:
    match kind:
        case "default":
            return None
        case "linear":
            return Linear(float(s["factor"]))
        case "llama3":
            return Llama3(
                float(s["factor"]),
                float(s["low_freq_factor"]),
                float(s["high_freq_factor"]),
                int(s["original_max_position_embeddings"]),
            )
        case "yarn":
            original = s.get("original_max_position_embeddings") or hf["max_position_embeddings"]
            if s.get("mscale") and s.get("mscale_all_dim"):
                raise LookupError("yarn with mscale and mscale_all_dim is not supported")
            return Yarn(
                float(s["factor"]),
                int(original),
                float(s.get("beta_fast") or 32.0),
                float(s.get("beta_slow") or 1.0),
                s.get("attention_factor"),
                bool(s.get("truncate", True)),
            )
    raise LookupError(f"rope of type {kind!r}; known are default, linear, llama3 and yarn")


def scaling_json(scaling: RopeScaling | None) -> Json:
    match scaling:
        case None:
            return {"rope_type": "default"}
        case Linear(factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3(factor, low, high, length):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
        case Yarn():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.attention_factor,
                "truncate": scaling.truncate,
            }
    raise ValueError(f"{type(scaling).__name__} is a rope scaling of this project alone")


def longest_of(scaling: RopeScaling | None) -> int:
    """Nothing here has a limit of length, but other tools want one."""
    if isinstance(scaling, Yarn):
        return round(scaling.factor * scaling.original_length)
    return 32_768
