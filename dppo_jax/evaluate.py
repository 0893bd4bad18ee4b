"""Evaluation over named sets of problems: sampled and graded as training does it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dppo_jax.answers import Answered, Answers, by_problem, evaluation_of, read_answers, regrade
from dppo_jax.collect import answers_later, prompts_of
from dppo_jax.evaluation_scores import Evaluation
from dppo_jax.hf_exchange import load_model
from dppo_jax.metrics import JsonLines
from dppo_jax.models.decoder import DecoderConfig, Model, Params
from dppo_jax.multihost import own_file, row_share
from dppo_jax.prompts.examples import Example, PromptFileError
from dppo_jax.prompts.mixture import Dataset
from dppo_jax.prompts.pipeline import PromptBatch, TooLong, evaluation_batches
from dppo_jax.prompts.store import load
from dppo_jax.prompts.tokenizers import Tokenizer
from dppo_jax.rewards.verdicts import Verifier, check_examples
from dppo_jax.sampling.generate import SamplingConfig
from dppo_jax.sampling.rollouts import MakeRollouts, RolloutContext, RolloutSource
from dppo_jax.sharding import MeshConfig, check_divides


@dataclass(frozen=True)
class EvalSet:
    """Problems to evaluate on. What is None is as in training."""

    dataset: str
    split: str = "test"
    prompts: int | None = None  # the first so many; all where None
    sampling: SamplingConfig | None = None
    verifier: Verifier | None = None
    prompts_per_batch: int | None = None
    name: str = ""  # in metrics and tables; the data set's where empty


class Evaluated(NamedTuple):
    """Each set's numbers, over all processes, and this process's answers."""

    sets: dict[str, Evaluation]
    answers: list[Answered]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        return {name: each.as_dict() for name, each in self.sets.items()}

    def as_metrics(self) -> dict[str, float]:
        return {
            name: value
            for each in self.sets
            for name, value in self.sets[each].as_metrics(each).items()
        }

    def write(self, log: JsonLines, step: int) -> None:
        """A line for each problem, with the number of training steps done before."""
        for row in self.answers:
            log.write(step=step, **row.as_dict())


def open_answers(directory: Path, keep_before: int) -> JsonLines:
    """The run's `answers.jsonl`, `answers-1.jsonl`, ...: each process keeps its own answers."""
    directory.mkdir(parents=True, exist_ok=True)
    return JsonLines(own_file(directory / "answers.jsonl"), resume_at=keep_before)


class Evaluator:
    """Sampling and grading of evaluation sets, the same problems and keys each time.

    `prompts_per_batch` is for sets that bind none.
    """

    def __init__(
        self,
        source: RolloutSource,
        sets: Sequence[EvalSet],
        *,
        vocab_size: int,
        mesh: Mesh,
        tokenizer: Tokenizer,
        verifier: Verifier,
        sampling: SamplingConfig,
        data_dir: str,
        prompts_per_batch: int,
        max_prompt_tokens: int,
        too_long: TooLong,
        seed: int,
    ):
        self._source, self._mesh, self._tokenizer, self._seed = source, mesh, tokenizer, seed
        self._share = row_share(mesh)
        self._batches: dict[str, list[PromptBatch]] = {}
        self._sets: dict[str, EvalSet] = {}
        self.held_out: dict[str, list[Example]] = {}
        self.unfit: list[str] = []  # of sets with answers that their verifiers cannot use, a line
        for each in sets:
            name = each.name or each.dataset
            if name in self._sets:
                raise ValueError(f"two evaluation sets are called {name!r}: bind EvalSet.name")
            settings = dataclasses.replace(
                each.sampling or sampling,
                end_ids=(tokenizer.end_id,),
                truncated_sampling="refuse",  # nobody scores these: no kept set need be recorded
            )
            settings.check(vocab_size)
            batch = each.prompts_per_batch or prompts_per_batch
            check_divides(mesh, "batch", {f"prompts_per_batch of {name}": batch})
            self._sets[name] = dataclasses.replace(
                each,
                sampling=settings,
                verifier=each.verifier or verifier,
                prompts_per_batch=batch,
            )
            self.held_out[name] = _first(each, data_dir)
            self._batches[name] = list(
                evaluation_batches(
                    self.held_out[name],
                    tokenizer,
                    prompts_per_step=batch,
                    max_prompt_tokens=max_prompt_tokens,
                    process_index=self._share.index,
                    process_count=self._share.count,
                    too_long=too_long,
                )
            )
            judge = each.verifier or verifier
            self.unfit += check_examples(judge, self.held_out[name], name)

    def __call__(self, params: Params) -> Evaluated:
        """Answers to every problem of every set, graded."""
        done, share = Evaluated({}, []), self._share
        for index, (name, each) in enumerate(self._sets.items()):
            assert each.sampling and each.verifier
            key = jax.random.fold_in(jax.random.key(self._seed), 2**31 - 1 - index)
            answered: list[Answered] = []
            places: list[int] = []
            # A batch is graded while the next one is sampled.
            graded: list[tuple[PromptBatch, Callable[[], Answers]]] = []
            for number, batch in enumerate(self._batches[name]):
                rollout = self._source.rollout(
                    params,
                    prompts_of(batch, self._mesh),
                    jax.random.fold_in(key, number),
                    each.sampling,
                )
                answers = answers_later(
                    rollout,
                    batch.examples,
                    mesh=self._mesh,
                    tokenizer=self._tokenizer,
                    verifier=each.verifier,
                )
                graded.append((batch, answers))
            for number, (batch, answers) in enumerate(graded if share.leads else ()):
                answered += by_problem(name, batch.examples, batch.valid, answers())
                first = (number * share.count + share.index) * len(batch.valid)
                places += (first + np.flatnonzero(batch.valid)).tolist()
            k = each.sampling.samples_per_prompt
            numbers = evaluation_of(answered, k, self.held_out[name], places)
            left_out = len(self.held_out[name]) - numbers.prompts
            done.sets[name] = dataclasses.replace(numbers, left_out=left_out)
            done.answers.extend(answered)
        return done


def eval_sets_or_default(
    sets: Sequence[EvalSet] | None, dataset: Dataset, split: str, prompts: int | None
) -> Sequence[EvalSet]:
    """The sets that a recipe binds, else the training set's own split, or that of each."""
    if sets is not None:
        return sets
    names = [dataset] if isinstance(dataset, str) else list(dataset)
    return [EvalSet(name, split, prompts) for name in names]


def evaluate_checkpoint(
    directory: Path,
    *,
    model: DecoderConfig,
    tokenizer: Tokenizer,
    dataset: Dataset,
    data_dir: str,
    verifier: Verifier,
    sampling: SamplingConfig,
    prompts_per_step: int,
    max_prompt_tokens: int,
    too_long: TooLong,
    mesh: MeshConfig,
    rollouts: MakeRollouts,
    eval_split: str,
    eval_prompts: int | None,
    eval_sets: Sequence[EvalSet] | None,
    seed: int,
) -> Evaluated:
    """Evaluates a run's newest checkpoint or a Hugging Face folder; arguments as of `train`."""
    network, devices = Model(model), mesh.build()
    evaluator = Evaluator(
        rollouts(RolloutContext(network, devices, tokenizer, max_prompt_tokens, sampling)),
        eval_sets_or_default(eval_sets, dataset, eval_split, eval_prompts),
        vocab_size=model.vocab_size,
        mesh=devices,
        tokenizer=tokenizer,
        verifier=verifier,
        sampling=sampling,
        data_dir=data_dir,
        prompts_per_batch=prompts_per_step,
        max_prompt_tokens=max_prompt_tokens,
        too_long=too_long,
        seed=seed,
    )
    if not evaluator.held_out:
        raise ValueError("the recipe has no evaluation set: bind train.train.eval_sets")
    params = load_model(directory, network, devices)
    with jax.set_mesh(devices):
        return evaluator(params)


def accuracies(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """What to call each set's accuracy, of `Evaluated.as_dict()`: one set needs no name."""
    return {
        "held-out accuracy" if len(sets) == 1 else f"{name} avg@{each['k']}": each
        for name, each in sets.items()
    }


def first_accuracy(sets: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The accuracy of the first set, which a run's summary leads with; None without a set."""
    return next((each["accuracy"] for each in sets.values()), None)


class Regraded(NamedTuple):
    """One set at one step, graded again."""

    step: int
    set: str
    evaluation: Evaluation
    changed: int  # answers whose score is another now

    def as_dict(self) -> dict[str, Any]:
        place = {"step": self.step, "set": self.set, "changed": self.changed}
        return place | self.evaluation.as_dict()


def regrade_files(
    paths: Sequence[Path], *, verifier: Verifier, eval_sets: Sequence[EvalSet] | None
) -> tuple[list[Regraded], list[tuple[int, Answered]]]:
    """Answers files under the verifiers of a recipe, without sampling: numbers, and new rows."""
    verifiers = {each.name or each.dataset: each.verifier for each in eval_sets or ()}
    groups: dict[tuple[int, str], list[Answered]] = {}
    for step, row in read_answers(paths):
        groups.setdefault((step, row.set), []).append(row)
    results: list[Regraded] = []
    rows: list[tuple[int, Answered]] = []
    for (step, name), old in groups.items():
        counts = {len(row.responses) for row in old}
        if len(counts) > 1:
            raise ValueError(
                f"{name} at step {step} has {min(counts)} answers to some problems and"
                f" {max(counts)} to others: give the files of one evaluation"
            )
        new = regrade(old, verifiers.get(name) or verifier)
        changed = sum(
            before.score != after.score
            for pair in zip(old, new, strict=True)
            for before, after in zip(*(row.verdicts for row in pair), strict=True)
        )
        evaluation = evaluation_of(new, counts.pop(), [row.example for row in new])
        results.append(Regraded(step, name, evaluation, changed))
        rows += [(step, row) for row in new]
    return results, rows


def _first(each: EvalSet, data_dir: str) -> list[Example]:
    """The first `prompts` examples of the set's split, all of them where None."""
    try:
        source = load(each.dataset, data_dir, each.split)
    except PromptFileError as error:
        if "no split" in str(error):
            hint = "bind train.train.eval_sets to what there is, or to () for no evaluation"
            raise PromptFileError(f"{error}; {hint}") from error
        raise
    if each.prompts is not None and each.prompts < 1:
        raise ValueError(
            f"{each.prompts} prompts of {each.dataset}: an evaluation needs at least 1"
        )
    return [source[i] for i in range(min(len(source), each.prompts or len(source)))]
