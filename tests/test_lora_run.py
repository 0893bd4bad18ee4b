"""A run with adapters as a user has it: what it writes, goes on from, and hands to others."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import left_padded, saved, torch_logits, transformers_model

from dppo_jax.checkpoint import load_params
from dppo_jax.config import load_recipe
from dppo_jax.hf_exchange import load_model
from dppo_jax.lora_run import begin, load_adapters
from dppo_jax.models import peft
from dppo_jax.models.decoder import Model, full_forward
from dppo_jax.models.hf_config import config_of
from dppo_jax.models.hf_files import tensors_of, write_file
from dppo_jax.models.hf_weights import read_params
from dppo_jax.models.lora import LoraConfig, LoraModel, merged
from dppo_jax.sharding import MeshConfig, shardings_of
from dppo_jax.train import train
from dppo_jax.verbs.command import GIVEN

RECIPE = """
from __gin__ import dynamic_registration
from dppo_jax import objectives
from dppo_jax import train
from dppo_jax.models import lora
include "{toy}"
train.train.lora = @lora.LoraConfig()
lora.LoraConfig.rank = 2
lora.LoraConfig.targets = ("q|v", "down")
train.train.objective = @objectives.with_reference_kl()
objectives.with_reference_kl.objective = @objectives.dppo_binary_tv()
objectives.with_reference_kl.coefficient = 0.1
train.train.eval_prompts = 4
"""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(workdir):
    return [
        {name: value for name, value in line.items() if not name.startswith("time/")}
        for line in lines(workdir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def recipe(toy_recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "lora.gin"
    path.write_text(RECIPE.format(toy=toy_recipe))
    return path


@pytest.fixture(scope="module")
def run(dppo, recipe, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    done = dppo("train", recipe, "--workdir", workdir)
    assert done.status == 0, done.err
    return workdir


@pytest.fixture(scope="module")
def config(recipe):
    return load_recipe(recipe, train, (), GIVEN).arguments("model")["model"]


def test_checkpoints_hold_adapters_and_the_base_lies_beside_them_once(run, config):
    assert {"base", "lora.json"} <= {path.name for path in run.iterdir()}
    assert not (run / "reference").exists()  # it is the base
    model, policy = load_adapters(run, config, MeshConfig().build())
    assert [f"{name}_lora_b" in policy["adapters"]["blocks"] for name in ("q", "k", "down")] == [
        True, False, True,
    ]  # fmt: skip
    moved = [leaf for at, leaf in jax.tree.leaves_with_path(policy["adapters"]) if "_b" in str(at)]
    assert len(moved) == 3 and all(float(jnp.abs(leaf).max()) > 1e-4 for leaf in moved)
    untouched = load_params(run / "base", model.abstract_params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), untouched, policy["base"]))


def test_the_reference_is_the_policy_without_adapters(run):
    """Zero in the first gradient step of the run, while B is zero; then the policy moves away."""
    kl = [line["loss/kl_ref"] for line in numbers(run)]
    assert 0 <= kl[0] < kl[1] < kl[3]


def test_a_stopped_run_goes_on_to_the_same_end(dppo, run, recipe, tmp_path):
    stopped = tmp_path / "run"
    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / "checkpoints" / "4")
    (stopped / "summary.json").unlink()
    done = dppo("train", recipe, "--workdir", stopped)
    assert done.status == 0, done.err
    assert "resuming" in done.out and numbers(stopped) == numbers(run)


def test_an_explicit_reference_says_the_same(dppo, run, recipe, tmp_path):
    """A second copy of the initial policy, scored by itself, in the place of the LoRA-off pass."""
    given = tmp_path / "given.gin"
    given.write_text(
        recipe.read_text().replace(
            "import train\n", "import train\nfrom dppo_jax import initial_policy\n"
        )
        + "train.train.reference = @initial_policy.random_policy()\n"
    )
    done = dppo("train", given, "--workdir", tmp_path / "run")
    assert done.status == 0, done.err
    assert (tmp_path / "run" / "reference").exists()
    for ours, theirs in zip(numbers(run), numbers(tmp_path / "run"), strict=True):
        assert ours["loss/kl_ref"] == pytest.approx(theirs["loss/kl_ref"], rel=1e-4, abs=1e-9)
        assert ours["reward/mean"] == theirs["reward/mean"]


# ---- PEFT's folders and merged weights ------------------------------------------------------


@pytest.fixture(scope="module")
def exported(dppo, run, tmp_path_factory):
    """What export-hf makes of the run: (merged weights, adapter)."""
    place = tmp_path_factory.mktemp("exported")
    for name, flags in (("whole", ()), ("adapter", ("--adapter",))):
        done = dppo("export-hf", run, place / name, "--json", *flags)
        assert done.status == 0, done.err
    return place / "whole", place / "adapter"


def close(ours, theirs, tolerance=0.0):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


def test_export_merges_and_eval_sees_the_same(run, exported, config):
    mesh = MeshConfig().build()
    plain = Model(config)
    whole = read_params(exported[0], plain, shardings_of(plain.logical_axes, mesh))
    model, policy = load_adapters(run, config, mesh)
    close(whole, merged(model, policy))
    close(whole, load_model(run, plain, mesh))
    changed = {
        name
        for name, leaf in whole["blocks"].items()
        if not (leaf == policy["base"]["blocks"][name]).all()
    }
    assert changed == {"q", "v", "down"}


def test_an_exported_adapter_is_a_start(run, exported, config, recipe, tmp_path):
    """Read back through a recipe it is the run's, and `begin` takes it in the place of zeros."""
    start = tmp_path / "start.gin"
    kept = [line for line in recipe.read_text().splitlines() if "lora" not in line]
    kept.insert(2, "from dppo_jax.models import peft")
    kept += ["train.train.lora = @peft.adapter()", f'peft.adapter.path = "{exported[1]}"', ""]
    start.write_text("\n".join(kept))
    lora = load_recipe(start, train, (), GIVEN).arguments("lora")["lora"]
    assert (lora.rank, lora.alpha, lora.names) == (2, 32.0, ("q", "v", "down"))
    mesh = MeshConfig().build()
    model, policy = load_adapters(run, config, mesh)
    again = LoraModel(config, lora)
    begun = begin(again, policy["base"], jax.random.key(0), mesh)
    close(begun.trained, policy["adapters"])
    assert begun.base is policy["base"]


def test_import_merges_an_adapter(dppo, exported, config, tmp_path):
    """The adapter on top of the weights that already hold it: W + 2·s·A·B."""
    whole, adapter = exported
    done = dppo("import-hf", whole, tmp_path / "out", "--adapter", adapter)
    assert done.status == 0, done.err
    plain, mesh = Model(config), MeshConfig().build()
    shardings = shardings_of(plain.logical_axes, mesh)
    model = LoraModel(config, peft.adapter(str(adapter)))
    adapters = peft.read_adapters(adapter, model, shardings_of(model.adapter_axes, mesh))
    once = read_params(whole, plain, shardings)
    twice = load_model(tmp_path / "out", plain, mesh)
    close(twice, merged(model, model.policy(adapters, once)), 1e-6)


def test_a_run_without_adapters_has_none_to_export(dppo, exported, tmp_path):
    assert dppo("import-hf", exported[0], tmp_path / "plain").status == 0
    done = dppo("export-hf", tmp_path / "plain", tmp_path / "out", "--adapter")
    assert done.status == 2 and "holds no adapters" in done.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama3", ("[qkvo]", "gate|up|down")), ("qwen3_moe", ("q|o", "gate|up|down", "unembedding"))],
)
def test_peft_loads_what_we_write(family, targets, tmp_path):
    """Logits of PEFT over transformers are ours, with large random adapters, to 1e-4."""
    theirs = pytest.importorskip("peft", reason="parity needs the extra `parity`: peft")
    import torch

    base = transformers_model(family)
    saved(base, tmp_path / "base")
    config, mesh = config_of(str(tmp_path / "base")), MeshConfig().build()
    lora = LoraConfig(rank=3, alpha=4.5, targets=targets, rslora=family == "qwen3_moe")
    model = LoraModel(config, lora)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32),
        model.abstract_adapters,
    )
    (tmp_path / "adapter").mkdir()
    peft.write_adapters(tmp_path / "adapter", model, adapters, base=None, dtype="float32")
    again = LoraModel(config, peft.adapter(str(tmp_path / "adapter")))
    assert again.lora.names == lora.names and again.lora.scale == pytest.approx(lora.scale)
    read = peft.read_adapters(tmp_path / "adapter", again, shardings_of(again.adapter_axes, mesh))
    close(read, adapters)
    params = read_params(tmp_path / "base", model, shardings_of(model.logical_axes, mesh))
    tokens, mask = left_padded(config.vocab_size)

    @jax.jit
    def logits_of(policy):
        decoder = again.bind(policy)
        hidden, _ = full_forward(decoder, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
        return decoder.logits(hidden)

    ours = np.asarray(logits_of(again.policy(read, params)))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        plain = torch_logits(base, tokens, mask).numpy()
        adapted = theirs.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        wanted = torch_logits(adapted, tokens, mask).numpy()
    assert np.abs(ours - wanted)[mask].max() < 1e-4 < 0.1 < np.abs(plain - wanted)[mask].max()


def test_we_load_the_fused_experts_that_peft_writes(tmp_path):
    """`target_parameters` of a mixture: one adapter of gates and ups, one of downs, a layer."""
    theirs = pytest.importorskip("peft", reason="parity needs the extra `parity`: peft")
    import torch

    base = transformers_model("qwen3_moe")
    saved(base, tmp_path / "base")
    described = theirs.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], task_type="CAUSAL_LM",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        adapted = theirs.get_peft_model(base, described).eval()
        generator = torch.Generator().manual_seed(0)
        for name, leaf in adapted.named_parameters():
            if ".lora_" in name:
                leaf.copy_(0.2 * torch.randn(leaf.shape, generator=generator))
        adapted.save_pretrained(tmp_path / "adapter")
        config = config_of(str(tmp_path / "base"))
        tokens, mask = left_padded(config.vocab_size)
        wanted = torch_logits(adapted, tokens, mask).numpy()
    lora = peft.adapter(str(tmp_path / "adapter"))
    assert (lora.names, lora.rank, lora.scale) == (("q", "gate", "up", "down"), 3, 5 / 3)
    model, mesh = LoraModel(config, lora), MeshConfig().build()
    adapters = peft.read_adapters(
        tmp_path / "adapter", model, shardings_of(model.adapter_axes, mesh)
    )
    params = read_params(tmp_path / "base", model, shardings_of(model.logical_axes, mesh))

    @jax.jit
    def logits_of(policy):
        decoder = model.bind(policy)
        hidden, _ = full_forward(decoder, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
        return decoder.logits(hidden)

    ours, plain = (logits_of(p) for p in (model.policy(adapters, params), params))
    assert np.abs(ours - wanted)[mask].max() < 1e-4 < 0.1 < np.abs(ours - plain)[mask].max()


@pytest.mark.parametrize(
    ("targets", "shapes", "message"),
    [
        (["mlp.experts.down_proj"], {"A": (12, 6), "B": (8, 12)}, None),
        (["mlp.experts.down_proj"], {"A": (11, 6), "B": (8, 12)}, "no down_proj of experts at"),
        (["mlp.gate.weight"], {"A": (12, 6), "B": (8, 12)}, "names mlp.gate.weight; known are"),
    ],
)
def test_fused_experts_alone_and_wrong(tmp_path, targets, shapes, message):
    """Four experts at rank 3, downs from 6 to 8: a single parameter is not nested."""
    module = "base_model.model.model.layers.0.mlp.experts"
    values = {
        letter: np.arange(np.prod(shape), dtype="float32") for letter, shape in shapes.items()
    }
    write_file(
        tmp_path / peft.WEIGHTS,
        {f"{module}.lora_{letter}.weight": shape for letter, shape in shapes.items()},
        (values[letter].reshape(shape) for letter, shape in shapes.items()),
        np.dtype("float32"),
        "F32",
    )
    described = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_parameters": targets}
    (tmp_path / peft.CONFIG).write_text(json.dumps(described))
    if message:
        with pytest.raises(ValueError, match=message) as caught:
            peft.adapter(str(tmp_path))
        assert "\n" not in str(caught.value)
    else:
        assert peft.adapter(str(tmp_path)).names == ("down",)


@pytest.fixture(scope="module")
def folder(exported, tmp_path_factory):
    """A PEFT folder to break: its adapter_config.json as a dict, its tensors by name."""
    adapter = exported[1]
    tensors = {name: np.array(at.view()) for name, at in tensors_of(adapter / peft.WEIGHTS).items()}
    return json.loads((adapter / peft.CONFIG).read_text()), tensors


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "tensor", "message"),
    [
        (dict(peft_type="IA3"), None, "peft_type IA3 is not LORA"),
        (dict(use_dora=True), None, "sets use_dora, which is not supported here"),
        (dict(rank_pattern={"q_proj": 4}), None, "sets rank_pattern"),
        (dict(bias="all"), None, "sets bias to all: only none is known"),
        (dict(r=None), None, "r or lora_alpha is missing or no number"),
        ({}, (NAME, None), f"lacks {NAME}"),
        (
            {},
            (NAME, (3, 16)),
            r"q_proj.lora_A.weight has shape \(3, 16\); model and rank 2 make it",
        ),
        (
            {},
            (NAME.replace(".0.", ".7."), (2, 16)),
            "layers.7.self_attn.q_proj.lora_A.weight, which",
        ),
        ({}, (NAME.replace("q_proj", "fc1"), (2, 16)), "adapts fc1; known are q_proj, k_proj"),
    ],
)
def test_damaged_folders_are_told_in_one_line(folder, config, tmp_path, changes, tensor, message):
    described, tensors = folder
    (tmp_path / peft.CONFIG).write_text(json.dumps(described | changes))
    if tensor is not None:
        name, shape = tensor
        tensors = {k: v for k, v in tensors.items() if k != name}
        if shape is not None:
            tensors[name] = np.zeros(shape, np.float32)
    shapes = {name: value.shape for name, value in tensors.items()}
    write_file(tmp_path / peft.WEIGHTS, shapes, iter(tensors.values()), np.dtype("float32"), "F32")
    with pytest.raises(ValueError, match=message) as caught:
        model = LoraModel(config, peft.adapter(str(tmp_path)))
        peft.read_adapters(tmp_path, model, model.adapter_axes)
    assert "\n" not in str(caught.value)
