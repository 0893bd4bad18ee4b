"""A Hugging Face folder through this project and through transformers, side by side."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.hf_exchange import Imported, architecture_of, write_folder
from dppo_jax.models.decoder import full_forward
from dppo_jax.models.hf_config import read_json
from dppo_jax.models.hf_files import NAMES
from dppo_jax.records import Prompts
from dppo_jax.sampling.generate import SamplingConfig, generate

LENGTHS = (16, 11, 5, 1)  # of the prompts, random tokens, left-padded to the longest
NEW = 32  # tokens decoded
TOLERANCE = 1e-3  # of the largest logit


def verify(imported: Imported) -> dict[str, Any]:
    """The largest differences between our float32 and that of transformers.

    `logits`: of a padded batch. `greedy`: tokens decoded through our cache that are the most likely
    ones to transformers after all before them; those that differ although it is surer than the
    tolerance are counted as wrong. `exported`: logits of the folder that we would export, loaded by
    transformers, against those of the given one. Raises ValueError where transformers is missing.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f"--verify needs PyTorch and transformers: {error}") from error
    transformers.utils.logging.disable_progress_bar()
    folder, model, params = imported
    config = model.config
    plain = {"attn_implementation": "eager"}
    if hasattr(transformers.PreTrainedModel, "set_experts_implementation"):
        # Its other forms refuse experts whose rows are not whole 16 bytes.
        plain["experts_implementation"] = "eager"

    def logits_by_transformers(where: Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            theirs = transformers.AutoModelForCausalLM.from_pretrained(
                where, dtype=torch.float32, **plain
            ).eval()
            real = torch.from_numpy(mask).long()
            return theirs(
                input_ids=torch.from_numpy(tokens),
                attention_mask=real,
                position_ids=(real.cumsum(-1) - 1).clamp(min=0),
            ).logits.numpy()

    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(len(LENGTHS), LENGTHS[0]))
    mask = np.arange(LENGTHS[0]) >= LENGTHS[0] - np.asarray(LENGTHS)[:, None]
    settings = SamplingConfig(
        max_new_tokens=NEW, samples_per_prompt=1, temperature=0.0, top_k_capture=1
    )
    prompts = Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
    decoded = generate(model, params, prompts, jax.random.key(0), settings=settings)
    answer = np.asarray(decoded.response_tokens, np.int64)
    tokens = np.concatenate([tokens, answer], axis=1)
    mask = np.concatenate([mask, np.ones_like(answer, bool)], axis=1)

    @jax.jit
    def logits_of(params, tokens, mask):
        decoder = model.bind(params)
        return decoder.logits(full_forward(decoder, tokens, mask)[0])

    ours = np.asarray(logits_of(params, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)))
    theirs = logits_by_transformers(folder, tokens, mask)
    largest = float(np.abs(theirs[mask]).max())
    predictions = theirs[:, -NEW - 1 : -1]
    chosen = np.take_along_axis(predictions, answer[..., None], axis=-1)[..., 0]
    behind = predictions.max(axis=-1) - chosen

    described = read_json(folder / "config.json")
    dtype = described.get("dtype") or described.get("torch_dtype")
    with tempfile.TemporaryDirectory() as place:
        exported = dtype if dtype in NAMES else "float32"
        write_folder(Path(place), model, params, described | {"dtype": exported}, exported, folder)
        again = logits_by_transformers(Path(place), tokens, mask)
    report: dict[str, Any] = {
        "architecture": architecture_of(folder),
        "parameters": imported.parameters,
        "logits_largest": largest,
        "logits_difference": float(np.abs(ours - theirs)[mask].max()),
        "greedy_tokens": int(answer.size),
        "greedy_equal": int((behind == 0).sum()),
        "greedy_wrong": int((behind > TOLERANCE * largest).sum()),
        "exported_difference": float(np.abs(again - theirs)[mask].max()),
    }
    return report | {"ok": agrees(report)}


def agrees(report: dict[str, Any]) -> bool:
    """Whether the differences of a report of `verify` are within the tolerance."""
    within = TOLERANCE * report["logits_largest"]
    return (
        report["logits_difference"] <= within
        and not report["greedy_wrong"]
        and report["exported_difference"] <= within
    )
