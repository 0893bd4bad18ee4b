"""Reward models: transformers' scores on random weights, and a run that is rewarded by one."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from families import FAMILIES, saved, transformers_model
from test_streaming import by_bytes  # noqa: F401  a fixture

from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model
from dppo_jax.models.hf_config import to_json
from dppo_jax.models.hf_files import write_tensors
from dppo_jax.models.hf_weights import leaves_of
from dppo_jax.reward_model import RewardModel, Scorer, filled
from dppo_jax.sharding import MeshConfig

LLAMA = DecoderConfig(
    vocab_size=258, width=16, layers=2, heads=4, kv_heads=2, head_size=4, mlp_width=24
)
QWEN2 = dataclasses.replace(LLAMA, qkv_bias=True)
PROMPTS = ["1*2=", "12*34=", "say €", ""]
RESPONSES = ["2", "408 and more", "{prompt}", "x"]


def write_classifier(place, config, tokenizer, labels=1):
    """A folder as transformers writes it: no language model's head, a score in its place."""
    place.mkdir()
    rng = np.random.default_rng(0)
    leaves = leaves_of(Model(config))
    shapes = {name: leaf.shape for leaf in leaves for name in leaf.names}
    shapes["score.weight"] = (labels, config.width)
    write_tensors(
        place, shapes, (rng.normal(0, 0.3, s).astype(np.float32) for s in shapes.values()),
        "float32",
    )  # fmt: skip
    described = to_json(config, "float32")
    architecture = described["architectures"][0].replace("CausalLM", "SequenceClassification")
    described |= {"architectures": [architecture], "tie_word_embeddings": False, "pad_token_id": 0}
    described |= {"id2label": {str(n): f"L{n}" for n in range(labels)}}
    (place / "config.json").write_text(json.dumps(described))
    tokenizer._model.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return place


@pytest.fixture(scope="module")
def qwen2(by_bytes, tmp_path_factory):  # noqa: F811
    return write_classifier(tmp_path_factory.mktemp("rm") / "qwen2", QWEN2, by_bytes)


def scorer(folder, **settings):
    settings = {"max_tokens": 24, "rows": 3} | settings
    return Scorer(RewardModel(str(folder), **settings), MeshConfig().build())


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name not in ("llama2", "r1_distill_qwen")]
)
def test_scores_are_those_of_transformers(family, by_bytes, tmp_path):  # noqa: F811
    """A folder that transformers wrote, with weights that leave nothing small."""
    theirs = transformers_model(family, "SequenceClassification", vocab_size=258, num_labels=1)
    by_bytes._model.save(str(saved(theirs, tmp_path) / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    import torch

    ours = scorer(tmp_path, template="<{prompt}|{response}>").scores(PROMPTS, RESPONSES)
    for prompt, response, score in zip(PROMPTS, RESPONSES, ours, strict=True):
        ids = by_bytes.encode(f"<{prompt}|{response}>")
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits.item()
        assert score == pytest.approx(expected, abs=5e-5, rel=1e-5), (prompt, response)


def test_a_text_does_not_depend_on_its_neighbours(qwen2):
    """Padding, the others of the call and its size change nothing; what is too long has none."""
    together = scorer(qwen2).scores(PROMPTS, RESPONSES)
    one = scorer(qwen2, rows=1)
    alone = [one.scores([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    wider = scorer(qwen2, max_tokens=40, rows=4).scores(PROMPTS, RESPONSES)
    assert together == pytest.approx(alone, abs=1e-5)
    assert together == pytest.approx(wider, abs=1e-5)
    assert len(set(np.round(together, 3))) == 4
    short = scorer(qwen2, max_tokens=6).scores(PROMPTS, RESPONSES)
    assert np.isnan(short).tolist() == [False, True, True, False]
    assert filled("{prompt}-{response}", prompt="{response}", response="r") == "{response}-r"


RUN = """
from __gin__ import dynamic_registration
from dppo_jax import reward_model
from dppo_jax import train
include "{toy}"
train.train.reward_model = @reward_model.RewardModel()
reward_model.RewardModel.path = "{folder}"
reward_model.RewardModel.max_tokens = 64
reward_model.RewardModel.weight = 0.5
reward_model.RewardModel.verifier_weight = 2.0
reward_model.RewardModel.name = "taste"
"""


def test_a_run_rewarded_by_a_model(dppo, toy_recipe, qwen2, tmp_path):
    recipe = tmp_path / "rewarded.gin"
    recipe.write_text(RUN.format(toy=toy_recipe, folder=qwen2))
    done = dppo("train", recipe, "--workdir", tmp_path / "run", "--gin.STEPS=2")
    assert done.status == 0 and "recompiled" not in done.out, done.err
    for line in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()):
        total = 2 * line["reward/verifier"] + 0.5 * line["reward/taste"]
        assert line["reward/mean"] == pytest.approx(total, abs=1e-5)
        assert line["reward/taste"] != 0 and line["reward/verifier_errors"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens and rows must be at least 1"),
        ({"template": "{prompt}"}, "has no {response}"),
        ({"name": "mean"}, "reward/mean is taken"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardModel("x", **({"max_tokens": 4} | settings))


def test_a_folder_that_is_no_reward_model(qwen2, by_bytes, tmp_path):  # noqa: F811
    two = write_classifier(tmp_path / "two", LLAMA, by_bytes, labels=2)
    with pytest.raises(ValueError, match=r"score.weight is \(2, 16\); .* \(1, 16\)"):
        scorer(two)
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match="BertModel, no reward model known here"):
        scorer(two)
    assert jax.device_count() == 1
