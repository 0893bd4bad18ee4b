"""Sampling with rewards, as training does it, and accuracy over a held-out set."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dppo_jax.checkpoint import load_params
from dppo_jax.models.decoder import DecoderConfig, Model, Params
from dppo_jax.multihost import gather_rows, to_global_rows, to_local_rows
from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.pipeline import PromptBatch, TooLong, evaluation_batches
from dppo_jax.prompts.store import load
from dppo_jax.prompts.tokenizers import Tokenizer
from dppo_jax.records import FINISH_STOP, Prompts, Rollout
from dppo_jax.rewards.verdicts import Verdict, Verifier, grade
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.sharding import MeshConfig, batch_sharding, shardings_of


class Answers(NamedTuple):
    """This process's graded responses, on the host; row p*G + g answers prompt p."""

    texts: list[str]
    finished: list[bool]
    lengths: np.ndarray  # [B] response tokens
    verdicts: list[Verdict]

    def rewards(self, samples_per_prompt: int) -> np.ndarray:
        """The scores [P, G]."""
        scores = np.array([verdict.score for verdict in self.verdicts], np.float32)
        return scores.reshape(-1, samples_per_prompt)


def sample(
    model: Model,
    params: Params,
    batch: PromptBatch,
    key: jax.Array,
    *,
    mesh: Mesh,
    settings: SamplingConfig,
) -> Rollout:
    """Responses to every prompt of the batch, on the devices."""
    prompts = Prompts(*to_global_rows((batch.tokens, batch.mask), batch_sharding(mesh)))
    return generate(model, params, prompts, key, settings=settings)


def answers_of(
    rollout: Rollout,
    examples: Sequence[Example],
    *,
    mesh: Mesh,
    tokenizer: Tokenizer,
    verifier: Verifier,
) -> Answers:
    """The rollout's texts and what the verifier says of them."""
    tokens, mask, reason = to_local_rows(
        (rollout.response_tokens, rollout.response_mask, rollout.finish_reason),
        batch_sharding(mesh),
    )
    samples = len(tokens) // len(examples)
    texts = [tokenizer.decode(row[kept].tolist()) for row, kept in zip(tokens, mask, strict=True)]
    finished = [bool(r == FINISH_STOP) for r in reason]
    each = [example for example in examples for _ in range(samples)]
    return Answers(texts, finished, mask.sum(axis=1), grade(verifier, each, texts, finished))


@dataclass(frozen=True)
class Evaluation:
    """Accuracy over a set of prompts, k samples each."""

    accuracy: float  # avg@k: the mean score of all samples
    accuracy_low: float  # 95 % bootstrap interval over prompts
    accuracy_high: float
    pass_at_k: float  # share of prompts that some sample solves (score > 0.5)
    k: int
    prompts: int
    response_length: float  # tokens
    finished: float  # share of responses that ended themselves

    def as_dict(self) -> dict[str, float | int]:
        return dataclasses.asdict(self)


def bootstrap_interval(scores: np.ndarray, *, resamples: int = 1000, seed: int = 0):
    """95 % percentile interval of the mean of `scores` [prompts], resampling prompts."""
    rng = np.random.default_rng(seed)
    means = rng.choice(scores, (resamples, len(scores))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def evaluate(
    model: Model,
    params: Params,
    source: Sequence[Example],
    key: jax.Array,
    *,
    mesh: Mesh,
    tokenizer: Tokenizer,
    verifier: Verifier,
    settings: SamplingConfig,
    prompts_per_batch: int,
    max_prompt_tokens: int,
    too_long: TooLong = "error",
) -> Evaluation:
    """Samples `settings.samples_per_prompt` answers to every prompt of `source` and grades them."""
    scores, lengths, finished = [], [], []
    batches = evaluation_batches(
        source,
        tokenizer,
        prompts_per_step=prompts_per_batch,
        max_prompt_tokens=max_prompt_tokens,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        too_long=too_long,
    )
    for index, batch in enumerate(batches):
        rollout = sample(
            model, params, batch, jax.random.fold_in(key, index), mesh=mesh, settings=settings
        )
        answers = answers_of(
            rollout, batch.examples, mesh=mesh, tokenizer=tokenizer, verifier=verifier
        )
        samples = settings.samples_per_prompt
        scores.append(answers.rewards(samples)[batch.valid])
        lengths.append(answers.lengths.reshape(-1, samples)[batch.valid])
        finished.append(np.reshape(answers.finished, (-1, samples))[batch.valid])
    by_prompt, length, ended = (gather_rows(np.concatenate(x)) for x in (scores, lengths, finished))
    low, high = bootstrap_interval(by_prompt.mean(axis=1))
    return Evaluation(
        accuracy=float(by_prompt.mean()),
        accuracy_low=low,
        accuracy_high=high,
        pass_at_k=float((by_prompt > 0.5).any(axis=1).mean()),
        k=settings.samples_per_prompt,
        prompts=len(by_prompt),
        response_length=float(length.mean()),
        finished=float(ended.mean()),
    )


def evaluate_checkpoint(
    directory: Path,
    *,
    model: DecoderConfig,
    tokenizer: Tokenizer,
    dataset: str,
    data_dir: str,
    verifier: Verifier,
    sampling: SamplingConfig,
    prompts_per_step: int,
    max_prompt_tokens: int,
    too_long: TooLong,
    mesh: MeshConfig,
    eval_split: str,
    eval_prompts: int | None,
    seed: int,
) -> Evaluation:
    """`evaluate` on a run's newest checkpoint; the arguments are those of `train`."""
    network, devices = Model(model), mesh.build()
    settings = dataclasses.replace(sampling, end_ids=(tokenizer.end_id,))
    settings.check(model.vocab_size)
    like = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        network.abstract_params,
        shardings_of(network.logical_axes, devices),
    )
    params = load_params(directory, like)
    with jax.set_mesh(devices):
        return evaluate(
            network,
            params,
            held_out_set(dataset, data_dir, eval_split, eval_prompts),
            evaluation_key(seed),
            mesh=devices,
            tokenizer=tokenizer,
            verifier=verifier,
            settings=settings,
            prompts_per_batch=prompts_per_step,
            max_prompt_tokens=max_prompt_tokens,
            too_long=too_long,
        )


def held_out_set(dataset: str, data_dir: str, split: str, prompts: int | None) -> list[Example]:
    """The first `prompts` examples of a split, all of them where None."""
    source = load(dataset, data_dir, split)
    return [source[i] for i in range(min(len(source), prompts or len(source)))]


def evaluation_key(seed: int) -> jax.Array:
    """The key that a run of this seed evaluates with, the same each time."""
    return jax.random.fold_in(jax.random.key(seed), 2**31 - 1)
