"""Records what transformers computes for every family in families.json, for machines without it.

    PYTHONPATH=.:tests python tests/golden/make_families.py

Needs the extra `parity`. Weights are not stored: `families.numbered_params` draws them by name.
"""

import json
import tempfile
from pathlib import Path

import transformers
from families import FAMILIES, left_padded, numbered_params, saved, torch_logits, transformers_model

from dppo_jax.models.decoder import Model
from dppo_jax.models.hf_config import config_of
from dppo_jax.models.hf_weights import write_params

recorded = {"transformers": transformers.__version__}
for family in FAMILIES:
    with tempfile.TemporaryDirectory() as place:
        folder = saved(transformers_model(family), Path(place))
        model = Model(config_of(str(folder)))
        write_params(folder, model, numbered_params(model), "float32")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager"
        ).eval()
        tokens, mask = left_padded(model.config.vocab_size)
        logits = torch_logits(theirs, tokens, mask).detach().numpy()
        recorded[family] = {
            "config": json.loads((folder / "config.json").read_text()),
            "last_logits": logits[:, -1, :8].tolist(),
            "best": [row[real].argmax(-1).tolist() for row, real in zip(logits, mask, strict=True)],
        }
Path(__file__).with_name("families.json").write_text(json.dumps(recorded) + "\n")
