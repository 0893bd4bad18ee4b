"""Mistakes of users: one line that says what to do, status 2, no traceback, nothing left behind."""

import gzip
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dppo_jax.models.decoder import DecoderConfig
from dppo_jax.preflight import check_sizes
from dppo_jax.prompts.arithmetic import ALPHABET
from dppo_jax.prompts.tokenizers import train_sentencepiece
from dppo_jax.sampling.generate import SamplingConfig
from dppo_jax.sharding import MESH_AXES

RECIPES = [
    ("misspelt macro", ["--gin.SETPS=3"], "did you mean STEPS"),
    ("misspelt parameter", ["--gin.train.train.stepz=3"], "stepz"),
    ("misspelt module", ["--gin.optimiser.adamw.b1=0.8"], "optimiser"),
    ("wrong type", ["--gin.STEPS='ten'"], "wants int, not str"),
    ("wrong literal", ["--gin.train.train.too_long='skip'"], "'drop'"),
    ("a list for a number", ["--gin.LEARNING_RATE=[1e-3]"], "wants float, not list"),
    ("uphill", ["--gin.LEARNING_RATE=-1.0"], "learning_rate=-1.0, warmup_steps=20: neither is neg"),
    ("no value", ["--gin.STEPS"], "--gin.NAME=VALUE"),
    ("required", ["--gin.STEPS=%gin.REQUIRED"], "required"),
    ("no such objective", ["--gin.train.train.objective=@objectives.dppo()"], "required"),
    ("prompt too long", ["--gin.MAX_PROMPT_TOKENS=5"], "set max_prompt_tokens to 6 or more"),
    ("K above the vocabulary", ["--gin.TOP_K_CAPTURE=17"], "top_k_capture=17 is not within 1..16"),
    ("K of nothing", ["--gin.TOP_K_CAPTURE=0"], "top_k_capture=0 is not within 1..16"),
    ("mesh", ["--gin.sharding.MeshConfig.tensor=3"], "does not fit 1 devices"),
    ("mesh of zero", ["--gin.sharding.MeshConfig.data=0"], "sizes are positive"),
    ("minibatches", ["--gin.MINIBATCHES=5"], "does not divide into minibatches=5"),
    ("microbatches", ["--gin.MICROBATCHES=7"], "x microbatches=7"),
    ("no minibatch", ["--gin.MINIBATCHES=0"], "at least 1"),
    ("no microbatch", ["--gin.MICROBATCHES=0"], "at least 1"),
    ("no prompts", ["--gin.PROMPTS_PER_STEP=0"], "prompts_per_step"),
    ("negative steps", ["--gin.STEPS=-1"], "steps=-1"),
    ("negative period", ["--gin.train.train.eval_every=-1"], "eval_every=-1 must not be negative"),
    ("negative seed", ["--gin.SEED=-1"], "seed=-1: take one of 0 to 4294967295"),
    ("a seed beyond 32 bits", ["--gin.SEED=99999999999999999999"], "seed=99999999999999999999"),
    ("no samples", ["--gin.SAMPLES_PER_PROMPT=0"], "at least 1"),
    ("temperature zero", ["--gin.TEMPERATURE=0.0"], "set a positive sampling temperature"),
    ("filtered training", ["--gin.generate.SamplingConfig.top_p=0.95",
                           "--gin.generate.SamplingConfig.truncated_sampling='refuse'"],
     "training samples from the whole distribution"),
    ("the mean of minus infinity", ["--gin.train.train.objective=@objectives.rover()",
                                    "--gin.generate.SamplingConfig.min_p=0.1"],
     "mean log-probability over the vocabulary, which is -inf"),
    ("one sample that is its own mean", ["--gin.SAMPLES_PER_PROMPT=1"],
     "set samples_per_prompt to 2 or more"),
    ("one sample to compare", ["--gin.train.train.objective=@objectives.rebel()",
                               "--gin.SAMPLES_PER_PROMPT=1"], "samples_per_prompt to 2 or more"),
    ("more kept than recorded", ["--gin.generate.SamplingConfig.top_k=30"],
     "top_k=30 keeps more than the top_k_capture="),
    ("no nucleus", ["--gin.generate.SamplingConfig.top_p=0.0"], "top_p=0.0 must be above 0"),
    ("small vocabulary", ["--gin.decoder.DecoderConfig.vocab_size=9"], "tokenizer has 16 ids"),
    ("odd heads", ["--gin.decoder.DecoderConfig.head_size=5"], "head_size=5 must be even"),
    ("delta", ["--gin.objectives.dppo_binary_tv.delta=-1.0"], "thresholds must be"),
    ("split", ["--gin.train.train.eval_split='dev'"], "no split 'dev'; there is test, train"),
    ("data set", ["--gin.train.train.dataset='gsm8q'"], "no data set is called 'gsm8q'"),
    ("data not prepared", ["--gin.train.train.dataset='gsm8k'"], "run: dppo data prepare gsm8k"),
    ("weights", ["--gin.train.train.initial_policy=@initial_policy.llama2c_policy()",
                 "--gin.initial_policy.llama2c_policy.path='no.bin'"], "no.bin: no such file"),
    ("no checkpoint", ["--gin.train.train.initial_policy=@initial_policy.checkpoint_policy()",
                       "--gin.initial_policy.checkpoint_policy.directory='no-run'"],
     "no-run holds no checkpoint"),
]  # fmt: skip


def assert_refused(finished, message):
    assert finished.status == 2, finished
    assert finished.err.startswith("dppo: ") and finished.err.count("\n") == 1, finished.err
    assert message in finished.err
    assert "Traceback" not in finished.err
    assert finished.out == ""


@pytest.mark.parametrize(
    ("overrides", "message"), [row[1:] for row in RECIPES], ids=[row[0] for row in RECIPES]
)
def test_train_refuses(dppo, toy_recipe, tmp_path, overrides, message):
    workdir = tmp_path / "run"
    assert_refused(dppo("train", toy_recipe, "--workdir", workdir, *overrides), message)
    assert not workdir.exists()


def test_unknown_recipe(dppo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(dppo("train", "configs/recipes/arithmetic_gpu.gin"), "arithmetic_cpu.gin")
    assert not list(tmp_path.iterdir())


def test_a_recipe_without_what_is_required(dppo, tmp_path):
    recipe = tmp_path / "bare.gin"
    recipe.write_text(
        "from __gin__ import dynamic_registration\n"
        "from dppo_jax import train\n"
        'include "configs/base.gin"\n'
        'include "configs/models/arithmetic.gin"\n'
    )
    refused = dppo("train", recipe, "--workdir", tmp_path / "run")
    assert_refused(refused, "required")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run(dppo, toy_recipe, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert_refused(dppo("train", toy_recipe, "--workdir", tmp_path), "choose another --workdir")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_for_a_folder(dppo, toy_recipe, tmp_path):
    (tmp_path / "run").write_text("a file")
    assert_refused(dppo("train", toy_recipe, "--workdir", tmp_path / "run"), str(tmp_path / "run"))


def test_the_run_of_another_configuration(dppo, toy_recipe, tmp_path):
    (tmp_path / "config.gin").write_text("STEPS = 7\n")
    refused = dppo("train", toy_recipe, "--workdir", tmp_path)
    assert_refused(refused, "holds a run of another configuration: ")
    assert [path.name for path in tmp_path.iterdir()] == ["config.gin"]


@pytest.mark.parametrize("place", ["/proc/run", "/dev/null/run"])
def test_a_directory_that_cannot_be_written(dppo, toy_recipe, place):
    """Before a policy is made, which may take long."""
    assert_refused(dppo("train", toy_recipe, "--workdir", place), f"{place} cannot be written")


@pytest.mark.parametrize("text", [b"\xff\xfe", b"STEPS = = 7\n"])
def test_a_run_whose_configuration_is_damaged(dppo, toy_recipe, tmp_path, text):
    (tmp_path / "config.gin").write_bytes(text)
    refused = dppo("train", toy_recipe, "--workdir", tmp_path)
    assert_refused(refused, f"{tmp_path / 'config.gin'} cannot be read (")


@pytest.mark.parametrize("checkpoint", ["nowhere", "."])
def test_eval_of_nothing(dppo, toy_recipe, tmp_path, checkpoint):
    refused = dppo("eval", toy_recipe, "--checkpoint", tmp_path / checkpoint, "--json")
    assert_refused(refused, "holds no checkpoint: give a run directory")
    assert not list(tmp_path.iterdir())


GOOD = json.dumps({"question": "1 + 1?", "answer": "2\n#### 2"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
        (f"{GOOD}\n{GOOD[:-9]}".encode(), "line 2: not JSON"),
        (f"{GOOD}\n\n[1]\n".encode(), "line 3: a JSON list"),
        (f'{GOOD}\n{{"question": "1 + 2?"}}\n'.encode(), "line 2: field 'answer' is missing"),
        (f'{{"question": "", "answer": "#### 3"}}\n{GOOD}'.encode(), "line 1: field 'question'"),
        (b"\xff\xfe\n", "line 1: not JSON"),
    ],
)
def test_prompt_files(dppo, tmp_path, text, message):
    source = tmp_path / "train.jsonl"
    source.write_bytes(text)
    (tmp_path / "test.jsonl").write_text(GOOD + "\n")
    data = tmp_path / "data"
    refused = dppo("data", "prepare", "gsm8k", "--from", tmp_path, "--data-dir", data, "--json")
    assert_refused(refused, message)
    assert str(source) in refused.err and not data.exists()


def test_a_prompt_file_that_is_cut_off(dppo, tmp_path):
    whole = gzip.compress(f"{GOOD}\n".encode() * 50)
    (tmp_path / "train.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "test.jsonl").write_text(GOOD + "\n")
    refused = dppo("data", "prepare", "gsm8k", "--from", tmp_path, "--data-dir", tmp_path / "data")
    assert_refused(refused, "the file is damaged or cut off")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "recipe"),
        (["train", "a.gin", "--wrkdir", "x"], "--wrkdir"),
        (["eval", "a.gin"], "--checkpoint"),
        (["bench", "step", "--vocab", "many"], "invalid int value: 'many'"),
    ],
)
def test_usage(dppo, arguments, message):
    """argparse's own two lines."""
    refused = dppo(*arguments)
    assert refused.status == 2 and message in refused.err and "Traceback" not in refused.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width", "60"], "width=60"),
        (["--top-k", "2000"], "top_k_capture=2000"),
        (["--microbatches", "7"], "microbatches=7"),
        (["--repeats", "0"], "repeats=0"),
        (["--prompts", "0"], "prompts=0"),
    ],
)
def test_bench_refuses(dppo, flags, message):
    assert_refused(dppo("bench", "step", *flags), message)


# ---- a mesh of more devices than this process has -----------------------------------------------


FITTING = dict(
    model=DecoderConfig(
        vocab_size=16, width=16, layers=1, heads=4, kv_heads=2, head_size=8, mlp_width=32
    ),
    sampling=SamplingConfig(max_new_tokens=8, samples_per_prompt=4, top_k_capture=4),
    prompts_per_step=64,
    minibatches=2,
    microbatches=2,
    max_prompt_tokens=6,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece([ALPHABET], tmp_path_factory.mktemp("tokenizer") / "t.model")


def check(tokenizer, sizes, **change):
    """`train`'s own check on a mesh of these sizes, model sizes by name."""
    arguments = FITTING | {k: v for k, v in change.items() if k in FITTING}
    model = dict(vars(FITTING["model"])) | {k: v for k, v in change.items() if k not in FITTING}
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    mesh = Mesh(np.full(shape, jax.devices()[0]), MESH_AXES)  # the check reads only its shape
    sized = arguments | {"model": DecoderConfig(**model), "steps": 1}
    check_sizes(**sized, tokenizer=tokenizer, mesh=mesh)


def test_an_exit_is_a_failure_of_all(dppo, monkeypatch):
    """Rich exits where nobody reads standard output; other processes would wait for this one."""
    monkeypatch.setattr("dppo_jax.verbs.methods._methods", lambda _: exit(1))
    done = dppo("methods")
    assert done.status == 1 and done.err.startswith("dppo: stopped by exit(1)")


def test_meshes_that_fit(tokenizer):
    for sizes in ({}, dict(data=2, fsdp=4, tensor=2), dict(fsdp=8), dict(data=16)):
        check(tokenizer, sizes)
    check(tokenizer, dict(fsdp=2, expert=4), experts=8, experts_per_token=2)


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        (dict(data=2, fsdp=3), {}, "prompts_per_step=64 is not divisible by the mesh's data=2 x f"),
        (dict(data=2, fsdp=8), dict(microbatches=8), "prompts of a microbatch=4 is not divisible"),
        (dict(fsdp=8), dict(width=12), "width=12 is not divisible by the mesh's fsdp=8"),
        (dict(tensor=4), {}, "kv_heads=2 is not divisible by the mesh's tensor=4"),
        (dict(tensor=2), dict(mlp_width=33), "mlp_width=33 is not divisible"),
        (dict(tensor=2), dict(vocab_size=17), "vocab_size=17 is not divisible"),
        (dict(sequence=4), {}, "max_prompt_tokens=6 is not divisible by the mesh's sequence=4"),
        (dict(sequence=3), {}, "max_new_tokens=8 is not divisible by the mesh's sequence=3"),
        (dict(expert=2), {}, "the mesh has expert=2, the model no experts"),
        (
            dict(expert=4),
            dict(experts=6, experts_per_token=2),
            "experts=6 is not divisible by the mesh's expert=4",
        ),
    ],
)
def test_meshes_that_do_not_divide(tokenizer, sizes, change, message):
    with pytest.raises(ValueError, match=message) as error:
        check(tokenizer, sizes, **change)
    assert "\n" not in str(error.value)
