"""Every family against transformers: logits, gradients, greedy decoding, and the way back.

The table that these tests print stands in the README.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, left_padded, saved, torch_logits, transformers_model
from jax.sharding import Mesh

from dppo_jax import hf_verify
from dppo_jax.models.decoder import Model, full_forward
from dppo_jax.models.hf_config import config_of, read_json, to_json
from dppo_jax.models.hf_weights import leaves_of, read_params, write_params
from dppo_jax.records import Prompts
from dppo_jax.sampling import generate as generate_module
from dppo_jax.sharding import MeshConfig, shardings_of

NEW = 64


@pytest.fixture(scope="module")
def table():
    rows: dict[str, dict[str, str]] = {}
    yield rows
    print("\n| family | logits | gradients | greedy tokens | round trip |\n|---|---|---|---|---|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells.values()) + " |")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory, table):
    theirs = transformers_model(request.param)
    folder = saved(theirs, tmp_path_factory.mktemp(request.param))
    model = Model(config_of(str(folder)))
    mesh: Mesh = MeshConfig().build(jax.devices()[:1])
    params = read_params(folder, model, shardings_of(model.logical_axes, mesh))
    tokens, mask = left_padded(model.config.vocab_size)
    return theirs, model, params, tokens, mask, table.setdefault(request.param, {})


def gradients_of(model):
    """By the names in files, where each expert has its own tensors."""
    found = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    for name in [name for name in found if ".experts." in name]:
        each, kind = found.pop(name), name.rsplit(".", 1)[1]
        for expert, tensor in enumerate(each):
            prefix = name.replace(kind, str(expert))
            if kind == "gate_up_proj":
                found[f"{prefix}.gate_proj.weight"], found[f"{prefix}.up_proj.weight"] = np.split(
                    tensor, 2
                )
            else:
                found[f"{prefix}.{kind}.weight"] = tensor
    return found


def test_logits_and_gradients(case):
    """A weighted sum of log-probabilities: every logit and every parameter takes part."""
    import torch

    theirs, model, params, tokens, mask, row = case
    weights = np.random.default_rng(1).normal(size=(*tokens.shape, 101)).astype(np.float32)
    weights *= mask[..., None] / mask.sum() / 10

    def loss(params):
        decoder = model.bind(params)
        logits = decoder.logits(full_forward(decoder, jnp.asarray(tokens), jnp.asarray(mask))[0])
        return jnp.sum(jax.nn.log_softmax(logits) * weights), logits

    (_, ours), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    logits = torch_logits(theirs, tokens, mask)
    torch.sum(torch.log_softmax(logits, -1) * torch.from_numpy(weights)).backward()
    error = np.abs(np.asarray(ours) - logits.detach().numpy())[mask].max()
    row["logits"] = f"{error:.1e}"
    assert np.abs(np.asarray(ours))[mask].max() > 1.0
    assert error < 1e-4

    worst = 0.0
    their_gradients = gradients_of(theirs)
    for leaf in leaves_of(model):
        value = gradients
        for key in leaf.path:
            value = value[key]
        for name, index in leaf.names.items():
            mine = np.asarray(value[index])
            other = their_gradients[name]
            assert np.abs(other).max() > 1e-5, name
            worst = max(worst, np.abs((mine.T if leaf.transposed else mine) - other).max())
    row["gradients"] = f"{worst:.1e}"
    assert worst < 1e-4


def test_greedy_tokens(case, monkeypatch):
    """64 tokens through our cache, after prompts of three lengths.

    Each is the most likely one to transformers after all before it, so its own greedy decoding
    takes the same.
    """
    import torch

    # The cache whole from the start: one loop to compile; test_sampling grows it.
    monkeypatch.setattr(generate_module, "SMALLEST_STAGE", NEW)
    theirs, model, params, tokens, mask, row = case
    settings = generate_module.SamplingConfig(
        max_new_tokens=NEW, samples_per_prompt=1, temperature=0.0, top_k_capture=1
    )
    prompts = Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
    rollout = generate_module.generate(model, params, prompts, jax.random.key(0), settings=settings)
    ours = np.asarray(rollout.response_tokens, np.int64)
    with torch.no_grad():
        logits = torch_logits(
            theirs,
            np.concatenate([tokens, ours], axis=1),
            np.concatenate([mask, np.ones_like(ours, bool)], axis=1),
        )
    equal = ours == logits[:, -NEW - 1 : -1].argmax(-1).numpy()
    row["greedy"] = f"{equal.sum()} of {equal.size}"
    assert equal.all()
    assert len(np.unique(ours)) > 5, "a model that repeats itself proves little"


def test_transformers_loads_what_is_exported(case, tmp_path):
    import transformers

    theirs, model, params, tokens, mask, row = case
    write_params(tmp_path, model, params, "float32")
    (tmp_path / "config.json").write_text(json.dumps(to_json(model.config, "float32")))
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    assert type(again) is type(theirs)
    before, after = (torch_logits(m, tokens, mask).detach().numpy()[mask] for m in (theirs, again))
    error = np.abs(before - after).max()
    row["round trip"] = f"{error:.1e}"
    assert error == 0.0
    assert config_of(str(tmp_path)) == model.config
    assert read_json(tmp_path / "config.json")["model_type"] == theirs.config.model_type


def test_verify_prints_the_differences_and_refuses_what_differs(tmp_path, dppo, monkeypatch):
    saved(transformers_model("qwen3_moe", moe_intermediate_size=13), tmp_path / "in")
    monkeypatch.setattr(hf_verify, "NEW", 8)
    given = ("import-hf", tmp_path / "in", tmp_path / "out", "--verify")
    done = dppo(*given, "--json")
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert report["ok"] and report["greedy_equal"] == report["greedy_tokens"] == 4 * 8
    assert 0 < report["logits_difference"] < 1e-4 < report["logits_largest"]
    assert report["exported_difference"] == 0.0
    for worse in (dict(logits_difference=0.1), dict(greedy_wrong=1), dict(exported_difference=0.1)):
        assert not hf_verify.agrees(report | worse)
    monkeypatch.setattr(hf_verify, "verify", lambda _: report | {"ok": False})
    refused = dppo(*given[:2], tmp_path / "again", "--verify")
    assert refused.status == 1 and "differs from transformers" in refused.err
    assert not (tmp_path / "again").exists()
