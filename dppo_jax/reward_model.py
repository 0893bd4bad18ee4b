"""A reward model: a decoder with one number for a head, read from a Hugging Face folder.

train.train.reward_model = @reward_model.RewardModel()
reward_model.RewardModel.path = "Skywork-Reward-V2-Qwen3-0.6B"
reward_model.RewardModel.max_tokens = 1024
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.answers import Answers
from dppo_jax.models.decoder import Model, Params, full_forward
from dppo_jax.models.hf_config import FAMILIES, parse, read_json
from dppo_jax.models.hf_files import stored_tensors
from dppo_jax.models.hf_weights import read_params
from dppo_jax.multihost import row_share, split_rows, to_global_rows, to_local_rows
from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.tokenizers import HuggingFaceTokenizer
from dppo_jax.rewards.verdicts import Verdict, failed
from dppo_jax.sharding import batch_sharding, check_divides, shardings_of

HEAD = "score.weight"
CLASSIFIER, CAUSAL = "ForSequenceClassification", "ForCausalLM"


@dataclass(frozen=True)
class RewardModel:
    """reward = verifier_weight · the verifier's score + weight · the model's score.

    The model is a transformers `...ForSequenceClassification` with num_labels 1 of a family that is
    known here (Llama, Mistral, Qwen2, Qwen3 and its experts, Gemma 2 and 3): score = w · h of the
    last token of `template` with the prompt and the response put in, tokenised by the folder's own
    tokenizer. Both scores are logged, as `reward/verifier` and `reward/<name>`. A response that
    makes a text of more than `max_tokens` tokens is not judged, and counted with the verifier's
    errors.
    """

    path: str
    max_tokens: int  # of a text
    weight: float = 1.0
    verifier_weight: float = 1.0
    name: str = "model"
    template: str = "{prompt}{response}"
    rows: int = 8  # texts at a time, over all devices
    dtype: str = "float32"

    def __post_init__(self):
        if self.max_tokens < 1 or self.rows < 1:
            raise ValueError("RewardModel.max_tokens and rows must be at least 1")
        if "{response}" not in self.template:
            raise ValueError(f"RewardModel.template {self.template!r} has no {{response}}")
        if not self.name.isidentifier() or self.name in ("mean", "std", "verifier"):
            raise ValueError(f"RewardModel.name {self.name!r}: reward/{self.name} is taken or odd")


class Scorer:
    """A reward model on the devices."""

    def __init__(self, settings: RewardModel, mesh: Mesh):
        check_divides(mesh, "batch", {"RewardModel.rows": settings.rows})
        folder = Path(settings.path).expanduser()
        self._settings, self._mesh, self._share = settings, mesh, row_share(mesh)
        self._tokenizer = HuggingFaceTokenizer(folder)
        self._model, self._params, self._head = read_classifier(folder, mesh, settings.dtype)
        self._score = jax.jit(self._of_rows)

    def __call__(self, answers: Answers, examples: Sequence[Example]) -> Answers:
        """The answers with both scores in their verdicts; `examples` are one a prompt."""
        samples = len(answers.texts) // len(examples)
        each = [example for example in examples for _ in range(samples)]
        scores = self.scores([example.prompt for example in each], answers.texts)
        verdicts = [
            self._with(verdict, score)
            for verdict, score in zip(answers.verdicts, scores.tolist(), strict=True)
        ]
        return answers._replace(verdicts=verdicts)

    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, " B"]:
        """This process's texts judged; NaN where one is too long. As many in every process."""
        template, columns = self._settings.template, self._settings.max_tokens
        count = self._settings.rows // self._share.count
        ids = [
            self._tokenizer.encode(filled(template, prompt=prompt, response=response))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        found = np.full(len(ids), np.nan, np.float32)
        rows = batch_sharding(self._mesh)
        for start in range(0, len(ids), count):
            tokens, mask = np.zeros((2, count, columns), np.int32)
            some = ids[start : start + count]
            fits = np.array([1 <= len(row) <= columns for row in some])
            for place, row in enumerate(some):
                if fits[place]:
                    tokens[place, columns - len(row) :] = row
                    mask[place, columns - len(row) :] = 1
            with jax.set_mesh(self._mesh):
                arrays = to_global_rows((tokens, mask.astype(bool)), rows)
                whole = self._score(self._params, self._head, *arrays)
            own = np.asarray(to_local_rows(whole, rows))[: len(some)]
            found[start : start + count] = np.where(fits, own, np.nan)
        return found

    def _of_rows(
        self, params: Params, head: Array, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]
    ) -> Float[Array, " B"]:
        hidden, _ = full_forward(self._model.bind(params), tokens, mask)
        return hidden[:, -1].astype(jnp.float32) @ head

    def _with(self, verdict: Verdict, score: float) -> Verdict:
        settings = self._settings
        if verdict.failure:
            return verdict  # half of a reward would teach the wrong thing
        if np.isnan(score):
            return failed(
                "error", f"more than max_tokens={settings.max_tokens} for {settings.name}"
            )
        parts = {**verdict.parts, "verifier": verdict.score, settings.name: score}
        total = settings.verifier_weight * verdict.score + settings.weight * score
        return verdict._replace(score=total, parts=parts)


def filled(template: str, **values: str) -> str:
    """The template with each {name} replaced; what the values hold is left as it is."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def read_classifier(folder: Path, mesh: Mesh, dtype: str) -> tuple[Model, Params, Array]:
    """The decoder, its float32 parameters, and the head [D] of a sequence classifier's folder.

    Raises ValueError, in one line, where the folder holds something else.
    """
    file = folder / "config.json"
    given = read_json(file)
    name = (given.get("architectures") or ["none"])[0]
    causal = name.removesuffix(CLASSIFIER).removesuffix("Text") + CAUSAL  # Gemma3Text...
    if not name.endswith(CLASSIFIER) or causal not in FAMILIES:
        known = ", ".join(family.removesuffix(CAUSAL) + CLASSIFIER for family in FAMILIES)
        raise ValueError(f"{file} is of {name}, no reward model known here; known are {known}")
    # The head of a language model is not there: nothing but the embedding need be looked for.
    asked = given | {"architectures": [causal], "tie_word_embeddings": True}
    model = Model(dataclasses.replace(parse(asked, str(file)), dtype=dtype))
    tensors = stored_tensors(folder)
    if HEAD not in tensors or tensors[HEAD].shape != (1, model.config.width):
        found = tensors[HEAD].shape if HEAD in tensors else "missing"
        raise ValueError(
            f"{folder}: {HEAD} is {found}; a reward model has one of (1, {model.config.width})"
        )
    params = read_params(folder, model, shardings_of(model.logical_axes, mesh), beside=(HEAD,))
    head = np.asarray(tensors[HEAD].view()[0], np.float32)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return model, params, split_rows(head, whole)
