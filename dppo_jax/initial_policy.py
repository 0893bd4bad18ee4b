"""Where a run's first parameters come from; each factory makes a function of an InitialContext."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dppo_jax.clusters import Preempted
from dppo_jax.console import Console
from dppo_jax.hosts import Preemption
from dppo_jax.lora_run import load_policy
from dppo_jax.models.decoder import Model, Params
from dppo_jax.models.hf_config import check_same
from dppo_jax.models.hf_weights import read_params
from dppo_jax.models.llama2c import read_llama2c
from dppo_jax.prompts import arithmetic
from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.tokenizers import Tokenizer
from dppo_jax.sharding import shardings_of
from dppo_jax.supervised import Demonstrate, train_supervised

Report = Callable[[int, int, float], None]  # step, steps, loss


@dataclass(frozen=True)
class InitialContext:
    """What a run knows before it has parameters."""

    model: Model
    mesh: Mesh
    key: jax.Array
    tokenizer: Tokenizer
    source: Sequence[Example]  # the training split
    max_prompt_tokens: int
    max_new_tokens: int
    report: Report

    @property
    def shardings(self) -> Any:
        return shardings_of(self.model.logical_axes, self.mesh)


InitialPolicy = Callable[[InitialContext], Params]


def shown_on(console: Console) -> Report:
    """Shows a warm start's steps."""
    started = time.monotonic()

    def report(step: int, steps: int, loss: float) -> None:
        left = (time.monotonic() - started) / step * (steps - step)
        console.step("warm start", step, steps, {"nll": f"{loss:.3f}"}, seconds_left=left)

    return report


def reporter(console: Console, preemption: Preemption) -> Report:
    """Shows them, and ends the warm start in all processes where one was asked to stop."""
    show = shown_on(console)

    def report(step: int, steps: int, loss: float) -> None:
        show(step, steps, loss)
        if preemption.anywhere():
            raise Preempted(
                f"asked to stop in step {step} of {steps} of the warm start: nothing is kept of it,"
                " and the same command begins again"
            )

    return report


def random_policy() -> InitialPolicy:
    """Fresh random parameters, born sharded."""
    return lambda c: jax.jit(c.model.init, out_shardings=c.shardings)(c.key)


def llama2c_policy(path: str) -> InitialPolicy:
    """The weights of a llama2.c `.bin` file."""
    return lambda c: jax.device_put(read_llama2c(path, c.model.config), c.shardings)


@dataclass(frozen=True)
class HuggingFacePolicy:
    """The weights of a Hugging Face folder; made by `hf_policy`."""

    path: str

    def __call__(self, c: InitialContext) -> Params:
        check_same(self.path, c.model.config)
        return read_params(self.path, c.model, c.shardings)


def hf_policy(path: str) -> InitialPolicy:
    """The weights of a Hugging Face folder, streamed tensor by tensor into their shards."""
    return HuggingFacePolicy(path)


def hf_folder(policy: InitialPolicy) -> str | None:
    """The Hugging Face folder that these parameters can be read from again, if any."""
    if isinstance(policy, HuggingFacePolicy):
        return str(Path(policy.path).expanduser().absolute())
    return None


@dataclass(frozen=True)
class CheckpointPolicy:
    """The newest checkpoint of another run; made by `checkpoint_policy`."""

    directory: str

    def __call__(self, c: InitialContext) -> Params:
        return load_policy(Path(self.directory).expanduser(), c.model, c.mesh)


def checkpoint_policy(directory: str) -> InitialPolicy:
    """The newest checkpoint of another run (adapters merged), or what `dppo import-hf` wrote."""
    return CheckpointPolicy(directory)


def careless_arithmetic(slip_rate: float) -> Demonstrate:
    """A teacher of the arithmetic task whose demonstrations hold a slip at this rate."""

    def demonstrate(example: Example, rng: np.random.Generator) -> str:
        a, b = map(int, example.id.split("*"))
        return arithmetic.careless_solution(a, b, rng, slip_rate)

    return demonstrate


def warm_started_policy(
    *,
    demonstrate: Demonstrate,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch_size: int,
) -> InitialPolicy:
    """A random policy trained to imitate demonstrations of the training split."""

    def make(c: InitialContext) -> Params:
        return train_supervised(
            c.model,
            random_policy()(c),
            c.source,
            c.tokenizer,
            mesh=c.mesh,
            demonstrate=demonstrate,
            optimizer=optimizer,
            steps=steps,
            batch_size=batch_size,
            max_prompt_tokens=c.max_prompt_tokens,
            max_response_tokens=c.max_new_tokens,
            seed=int(jax.random.bits(c.key)),
            report=lambda step, loss: c.report(step, steps, loss),
        )

    return make
