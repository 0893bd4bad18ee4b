"""Hugging Face folders: the format, the streaming, the verbs, and what is refused."""

import dataclasses
import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import REPOSITORY

from dppo_jax.models import hf_config, hf_weights
from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model
from dppo_jax.models.hf_files import INDEX, SINGLE, stored_tensors, write_tensors
from dppo_jax.models.rope import Llama3, Yarn
from dppo_jax.sharding import MeshConfig, shardings_of

LLAMA = DecoderConfig(
    vocab_size=16, width=24, layers=2, heads=4, kv_heads=2, head_size=6, mlp_width=20
)
GEMMA = dict(
    post_norms=True, unit_offset_norms=True, scaled_embeddings=True, activation="gelu_tanh"
)
EXPRESSIBLE = {
    "llama": dict(rope_scaling=Llama3(8.0, 1.0, 4.0, 64), tied_embeddings=False),
    "mistral": dict(window=5),
    "qwen2": dict(qkv_bias=True, window=3, local_layers=(False, True)),
    "qwen3": dict(qk_norm=True, rope_scaling=Yarn(4.0, 32, attention_factor=1.1)),
    "qwen3_moe": dict(qk_norm=True, experts=5, experts_per_token=2, normalised_gates=True),
    "gemma2": GEMMA | dict(attention_soft_cap=5.0, final_soft_cap=3.0, window=4),
    "gemma3_text": GEMMA
    | dict(qk_norm=True, window=4, local_layers=(True, False), local_rope_theta=99.0),
}


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape), jax.numpy.float32),
        model.abstract_params,
    )


def read(folder, model, devices=1):
    mesh = MeshConfig().build(jax.devices()[:devices])
    return hf_weights.read_params(folder, model, shardings_of(model.logical_axes, mesh))


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of a tiny Llama, and its parameters."""
    model = Model(LLAMA)
    params = random_params(model)
    (tmp_path / "in").mkdir()
    hf_weights.write_params(tmp_path / "in", model, params, "float32")
    (tmp_path / "in/config.json").write_text(json.dumps(hf_config.to_json(LLAMA, "float32")))
    (tmp_path / "in/tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return tmp_path / "in", params


@pytest.mark.parametrize("kind", EXPRESSIBLE)
def test_every_configuration_survives_config_json(kind):
    config = dataclasses.replace(LLAMA, **EXPRESSIBLE[kind])
    described = json.loads(json.dumps(hf_config.to_json(config, "bfloat16")))
    assert described["model_type"] == kind
    assert hf_config.same_weights(hf_config.parse(described), config)


def test_a_combination_that_no_architecture_has():
    with pytest.raises(ValueError, match="Qwen3ForCausalLM it would be final_soft_cap=None for 3"):
        hf_config.to_json(dataclasses.replace(LLAMA, qk_norm=True, final_soft_cap=3.0), "float32")


def test_configurations_as_they_were_written_before_transformers_5():
    """Keys of the published files: Llama-3.1-8B's rope, Gemma 2's and Mistral's windows."""
    sizes = dict(
        vocab_size=16, hidden_size=24, intermediate_size=20, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    llama = hf_config.parse(
        sizes
        | dict(
            architectures=["LlamaForCausalLM"],
            rope_theta=500000.0,
            rope_scaling=dict(
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
                rope_type="llama3",
            ),
        )
    )
    assert (llama.rope_theta, llama.rope_scaling) == (5e5, Llama3(8.0, 1.0, 4.0, 8192))
    assert not llama.tied_embeddings and llama.head_size == 6
    gemma = hf_config.parse(sizes | dict(architectures=["Gemma2ForCausalLM"], head_dim=8))
    assert gemma.windows == (4096, None, 4096, None) and gemma.tied_embeddings
    assert (gemma.attention_soft_cap, gemma.final_soft_cap) == (50.0, 30.0)
    mistral = hf_config.parse(
        sizes | dict(architectures=["MistralForCausalLM"], sliding_window=None)
    )
    assert mistral.window is None
    qwen = hf_config.parse(
        sizes
        | dict(
            architectures=["Qwen2ForCausalLM"],
            sliding_window=32768,
            use_sliding_window=False,
            max_window_layers=2,
        )
    )
    assert qwen.window is None and qwen.qkv_bias


def test_files_are_those_of_the_safetensors_package(folder):
    """Written here and read there, written there and read here; bfloat16, several files."""
    from safetensors.numpy import load_file, save_file

    where, params = folder
    ours = load_file(where / SINGLE)
    q = np.asarray(params["blocks"]["q"])
    np.testing.assert_array_equal(ours["model.layers.1.self_attn.q_proj.weight"], q[1].T)
    (where / SINGLE).unlink()
    names = sorted(ours)
    for part, chosen in enumerate((names[:9], names[9:])):
        half = {name: ours[name].astype(ml_dtypes.bfloat16) for name in chosen}
        save_file(half, where / f"{part}.safetensors")
    places = {name: f"{int(i >= 9)}.safetensors" for i, name in enumerate(names)}
    (where / INDEX).write_text(json.dumps({"weight_map": places}))
    again = read(where, Model(LLAMA))
    for mine, given in zip(*map(jax.tree.leaves, (again, params)), strict=True):
        np.testing.assert_array_equal(mine, np.asarray(given).astype(ml_dtypes.bfloat16))


def test_several_files_are_written_with_an_index(tmp_path):
    model = Model(LLAMA)
    params = random_params(model)
    hf_weights.write_params(tmp_path, model, params, "float32", largest_file=4000)
    assert len(list(tmp_path.glob("model-0*-of-0*.safetensors"))) > 3
    for ours, given in zip(*map(jax.tree.leaves, (read(tmp_path, model), params)), strict=True):
        np.testing.assert_array_equal(ours, given)


def test_import_and_export_give_the_same_file(folder, tmp_path, dppo):
    where, _ = folder
    imported = dppo("import-hf", where, tmp_path / "checkpoint", "--json")
    assert imported.status == 0, imported.err
    assert json.loads(imported.out)["architecture"] == "LlamaForCausalLM"
    exported = dppo("export-hf", tmp_path / "checkpoint", tmp_path / "out", "--json")
    assert exported.status == 0, exported.err
    assert json.loads(exported.out)["dtype"] == "float32"
    for name in (SINGLE, "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (where / name).read_bytes()
    assert hf_config.config_of(str(tmp_path / "out")) == LLAMA
    assert (tmp_path / "out/generation_config.json").is_file()


def test_an_output_that_tied_models_may_hold(folder):
    where, params = folder
    embedding = np.asarray(params["embedding"])
    stored = {name: t.view() for name, t in stored_tensors(where).items()}
    tensors = {name: np.array(view) for name, view in stored.items()}
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors |= {"lm_head.weight": embedding, buffer: np.zeros(3, np.float32)}
    shapes = {name: t.shape for name, t in tensors.items()}
    write_tensors(where, shapes, tensors.values(), "float32")
    np.testing.assert_array_equal(read(where, Model(LLAMA))["embedding"], embedding)
    write_tensors(where, shapes, (tensors | {"lm_head.weight": embedding + 1}).values(), "float32")
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        read(where, Model(LLAMA))


def change_config(**changes):
    def damage(where):
        config = json.loads((where / "config.json").read_text())
        (where / "config.json").write_text(json.dumps(config | changes))

    return damage


def cut(bytes_left):
    def damage(where):
        raw = (where / SINGLE).read_bytes()
        (where / SINGLE).write_bytes(raw[:bytes_left])

    return damage


def replace_in_header(old, new):
    def damage(where):
        raw = (where / SINGLE).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        text = raw[8 : 8 + length].replace(old, new)
        (where / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return damage


def not_finite(name, value):
    def damage(where):
        (where / SINGLE).unlink()
        model = Model(LLAMA)
        params = random_params(model)
        holder = params["blocks"] if name in params["blocks"] else params
        holder[name] = holder[name].at[1, 3].set(value)
        hf_weights.write_params(where, model, params, "float32")

    return damage


def index_of(**weight_map):
    return lambda where: (where / INDEX).write_text(json.dumps({"weight_map": weight_map}))


NORM = "model.layers.1.post_attention_layernorm.weight"
DAMAGES = {
    "architecture": (change_config(architectures=["GPT2LMHeadModel"]), "architecture GPT2LMHead"),
    "not json": (lambda where: (where / "config.json").write_text("{"), "is not JSON"),
    "no config": (lambda where: (where / "config.json").unlink(), "no such file"),
    "no weights": (lambda where: (where / SINGLE).unlink(), "holds neither"),
    "bias": (change_config(attention_bias=True), "attention_bias=true is not supported"),
    "rope": (change_config(rope_parameters=dict(rope_type="longrope")), "known are default"),
    "no factor": (change_config(rope_parameters=dict(rope_type="linear")), "lacks 'factor'"),
    "a size": (change_config(hidden_size="24"), "hidden_size='24' should be a whole number"),
    "a number": (change_config(rms_norm_eps="small"), "json: rms_norm_eps='small' should be a"),
    "heads": (change_config(num_key_value_heads=3), "heads=4 is not a multiple of kv_heads=3"),
    "fewer layers": (change_config(num_hidden_layers=1), "has no place for"),
    "more layers": (change_config(num_hidden_layers=3), "lacks the tensor model.layers.2."),
    "shape": (change_config(intermediate_size=21), "down_proj.weight has shape (24, 20)"),
    "torn": (cut(-1), "cut off: it ends inside or before model.norm.weight"),
    "torn header": (cut(100), "inside its header"),
    "empty": (cut(0), "inside its header"),
    "renamed": (replace_in_header(b"layers.1.post", b"layers.9.post"), f"lacks the tensor {NORM}"),
    "type": (replace_in_header(b'"F32"', b'"F8_E4M3"'), "is of type F8_E4M3"),
    "offsets": (replace_in_header(b"[16, 24]", b"[16, 25]"), "offsets that do not fit its shape"),
    "a list of types": (replace_in_header(b'"F32"', b'["F32"]'), "is of type ['F32']"),
    "endless": (replace_in_header(b"[16, 24]", b"[16, 1e999]"), "is damaged"),
    "huge": (replace_in_header(b"[16, 24]", b"[4294967296, 4294967296]"), "do not fit its shape"),
    "nested": (replace_in_header(b"[16, 24]", b"[" * 100_000), "header that is not JSON"),
    "no such file": (index_of(**{NORM: "gone.safetensors"}), f"should hold {NORM}"),
    "elsewhere": (index_of(nothing=SINGLE), "lacks nothing, which"),
    "a number for a file": (index_of(nothing=3), "lacks 3, which should hold"),
    "index": (lambda where: (where / INDEX).write_text("[]"), "is not an index"),
    "a matrix's NaN": (not_finite("up", np.nan), "model.layers.1.mlp.up_proj.weight holds NaN"),
    "a norm's NaN": (not_finite("mlp_norm", np.nan), f"{NORM} holds NaN or infinity"),
    "infinity": (not_finite("embedding", -np.inf), "model.embed_tokens.weight holds NaN or inf"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_refused_is_named_in_one_line(folder, tmp_path, dppo, damage):
    where, _ = folder
    harm, message = DAMAGES[damage]
    harm(where)
    result = dppo("import-hf", where, tmp_path / "out")
    assert result.status == 2
    assert message in result.err and result.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"], "nothing is written"


def test_an_existing_folder_is_not_written_into(folder, tmp_path, dppo):
    where, _ = folder
    result = dppo("import-hf", where, where)
    assert result.status == 2 and "exists: give a folder" in result.err


MEMORY = """
import sys, numpy as np, jax, re
from pathlib import Path
from dppo_jax.models import hf_weights
from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model
from dppo_jax.models.hf_files import stored_tensors, write_tensors
from dppo_jax.sharding import MeshConfig, shardings_of

folder = Path(sys.argv[1])
model = Model(DecoderConfig(
    vocab_size=20_000, width=512, layers=8, heads=8, kv_heads=8, head_size=64, mlp_width=2048))
leaves = hf_weights.leaves_of(model)
shapes = {name: leaf.shape for leaf in leaves for name in leaf.names}
write_tensors(folder, shapes, (np.full(s, i, np.float32) for i, s in enumerate(shapes.values())),
              "bfloat16")
mesh = MeshConfig().build()
jax.block_until_ready(jax.jit(lambda x: x + 1)(np.zeros(8)))  # the compiler is there

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

Path("/proc/self/clear_refs").write_text("5")
before = peak()
params = hf_weights.read_params(folder, model, shardings_of(model.logical_axes, mesh))
jax.block_until_ready(params)
used = peak() - before
shards = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
largest = max(4 * int(np.prod(s)) for s in shapes.values())
assert params["embedding"].sharding.num_devices == 2
assert params["embedding"].addressable_shards[0].data.shape == (20_000, 256)
names = list(shapes)
for layer in (0, 7):
    number = names.index(f"model.layers.{layer}.mlp.up_proj.weight")
    assert (np.asarray(params["blocks"]["up"][layer]) == number).all()
print(f"{used / 1e6:.0f} MB for {shards / 1e6:.0f} MB of parameters, "
      f"the largest tensor {largest / 1e6:.0f} MB")
assert shards <= used + 16e6, "the measurement misses the parameters"
assert used < shards + 2 * largest
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_weights_are_streamed(tmp_path):
    """Peak memory: the shards and less than twice the largest tensor (as float32)."""
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)


RECIPE = """
from __gin__ import dynamic_registration
from dppo_jax import initial_policy
from dppo_jax import train
from dppo_jax.models import hf_config
include "{toy}"
train.train.model = @hf_config.config_of()
hf_config.config_of.path = "{folder}"
train.train.initial_policy = @initial_policy.hf_policy()
initial_policy.hf_policy.path = "{folder}"
STEPS = 1
train.train.minibatches = 1
"""


def test_a_run_starts_from_a_folder_and_is_exported(folder, tmp_path, toy_recipe, dppo):
    where, params = folder
    toy = toy_recipe.read_text().replace("decoder.DecoderConfig", "# decoder.DecoderConfig")
    (tmp_path / "toy.gin").write_text(toy)
    recipe = tmp_path / "hf.gin"
    recipe.write_text(RECIPE.format(toy=tmp_path / "toy.gin", folder=where))
    run = dppo("train", recipe, "--workdir", tmp_path / "run")
    assert run.status == 0, run.err
    answers = ("--answers", tmp_path / "answers.jsonl", "--json")
    evaluated = dppo("eval", recipe, "--checkpoint", where, *answers)
    assert evaluated.status == 0, evaluated.err
    before = json.loads((tmp_path / "run/summary.json").read_text())["before"]
    assert before == json.loads(evaluated.out)["sets"]
    done = dppo("export-hf", tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16")
    assert done.status == 0, done.err
    assert (tmp_path / "out/tokenizer_config.json").is_file(), "of the folder it started from"
    model = Model(hf_config.config_of(str(tmp_path / "out")))
    trained = read(tmp_path / "out", model)
    moved = np.abs(np.asarray(trained["embedding"]) - np.asarray(params["embedding"])).max()
    assert 1e-4 < moved < 0.1
