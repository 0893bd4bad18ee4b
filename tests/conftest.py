"""Shared by all tests: a tiny model, a tiny recipe, and the command line called in process."""

import contextlib
import gc
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dppo_jax import cli
from dppo_jax.models.decoder import DecoderConfig, Model
from dppo_jax.prompts.store import prepare
from dppo_jax.records import Prompts
from dppo_jax.verbs import command

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"

# Most of the tests' time is the compiler's, on programs that run once. Its older emitters take
# half of it, where it still has them, and code in one piece costs less than in many. Read when
# JAX first computes; XLA stops at a flag that it does not know.
QUICK = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", QUICK)

# The first example of a property compiles; how long that takes says nothing.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

# Two steps' worth of everything: a run of it takes seconds, most of them XLA's.
TOY_RECIPE = """
from __gin__ import dynamic_registration
from dppo_jax import initial_policy
from dppo_jax import train
from dppo_jax.models import decoder
from dppo_jax.prompts import tokenizers
import toy_rewards
include "configs/recipes/arithmetic_cpu.gin"
STEPS = 4
PROMPTS_PER_STEP = 8
SAMPLES_PER_PROMPT = 4
MINIBATCHES = 2
MAX_NEW_TOKENS = 8
TOP_K_CAPTURE = 4
LEARNING_RATE = 3e-3
DATA_DIR = "{data}"
tokenizers.train_sentencepiece.path = "{data}/tokenizer.model"
decoder.DecoderConfig.width = 16
decoder.DecoderConfig.layers = 1
decoder.DecoderConfig.heads = 2
decoder.DecoderConfig.kv_heads = 2
decoder.DecoderConfig.head_size = 8
decoder.DecoderConfig.mlp_width = 32
train.train.verifier = @toy_rewards.even_digits
train.train.initial_policy = @initial_policy.random_policy()
train.train.eval_prompts = 12
train.train.checkpoint_every = 2
"""

# Every kind of term at once, on the toy, around an objective with a state of its own.
EVERY_TERM = """
from __gin__ import dynamic_registration
from dppo_jax import objectives
from dppo_jax import train
include "{toy}"
include "configs/algorithms/ppo_critic.gin"
train.train.objective = @objectives.with_reference_kl()
objectives.with_reference_kl.objective = @objectives.with_entropy_bonus()
objectives.with_entropy_bonus.objective = @objectives.with_value_loss()
objectives.with_value_loss.objective = @objectives.r2vpo()
objectives.with_entropy_bonus.coefficient = 0.01
objectives.with_reference_kl.coefficient = 0.1
objectives.with_reference_kl.estimator = @objectives.k3_plus
train.train.reward_penalty = @objectives.reference_kl_penalty
objectives.reference_kl_penalty.coefficient = 0.1
"""


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped():
    """Compiled programs map memory; past the 65,530 maps of a Linux process it crashes."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def toy_recipe(tmp_path_factory) -> Path:
    """arithmetic_cpu.gin made tiny, with data of its own and a reward that has a spread."""
    folder = tmp_path_factory.mktemp("toy")
    # Of 900 problems, not 8100: each run reads all of them, twice.
    prepare("arithmetic", folder / "data", largest=39, held_out=100)
    (folder / "toy.gin").write_text(TOY_RECIPE.format(data=folder / "data"))
    return folder / "toy.gin"


@pytest.fixture(scope="session")
def every_term_recipe(toy_recipe, tmp_path_factory) -> Path:
    """The toy with a critic, an entropy bonus, and KL both in the loss and in the reward."""
    path = tmp_path_factory.mktemp("every_term") / "every_term.gin"
    path.write_text(EVERY_TERM.format(toy=toy_recipe))
    return path


# Of XLA's search for faster programs, from -1 to 1.
EFFORT = "JAX_EXEC_TIME_OPTIMIZATION_EFFORT"


@pytest.fixture
def least_effort(monkeypatch):
    """Subprocesses that compile for TPUs make all machine code, and look for no faster one.

    Not where bytes that a program moves are counted, which the search saves;
    tpu_aot/test_head_aot.py compares the memory.
    """
    monkeypatch.setenv(EFFORT, "-1")


class Finished(NamedTuple):
    """What a user sees of a command."""

    status: int
    out: str
    err: str


@contextlib.contextmanager
def programs_kept_in(folder: Path):
    """What JAX compiles meanwhile is read from there, where it has been compiled before."""
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def dppo(tmp_path_factory) -> Callable[..., Finished]:
    """The command line in this process: dppo("train", recipe, ...) -> status and output.

    Every run compiles anew, and mostly the same programs: they are kept for the next.
    """

    command.start_jax = lambda *_, **__: None  # its settings are the process's
    programs = tmp_path_factory.mktemp("programs")

    def run(*arguments: object) -> Finished:
        out, err, status = io.StringIO(), io.StringIO(), 0
        told = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with programs_kept_in(programs), told[0], told[1]:
            try:
                cli.main([str(argument) for argument in arguments])
            except SystemExit as end:
                status = int(end.code or 0)
        return Finished(status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; users do not have it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data, which is not part of the project")
    return SHARED / "data"


@pytest.fixture(scope="session")
def tiny():
    """A decoder with grouped heads and odd sizes, and its parameters."""
    config = DecoderConfig(
        vocab_size=37,
        width=24,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=6,
        mlp_width=40,
        qk_norm=True,
    )
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    # Larger weights than at initialisation make the distributions uneven.
    return model, jax.tree.map(lambda p: p * 1.6, params)


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    """Three prompts of 5, 3 and 1 tokens, left-padded with an id that means something elsewhere."""
    tokens = jax.random.randint(jax.random.key(1), (3, 5), 0, 37)
    lengths = jnp.array([5, 3, 1])
    mask = jnp.arange(5)[None, :] >= 5 - lengths[:, None]
    return Prompts(jnp.where(mask, tokens, 7), mask)
