"""Warm starts: demonstrations in the form that the scorer reads, and a likelihood that rises."""

import dataclasses

import jax
import numpy as np
import pytest

from dppo_jax.initial_policy import InitialContext, careless_arithmetic, warm_started_policy
from dppo_jax.models.decoder import Model
from dppo_jax.optimizer import adamw
from dppo_jax.prompts import arithmetic
from dppo_jax.prompts.tokenizers import train_sentencepiece
from dppo_jax.sharding import MeshConfig
from dppo_jax.supervised import demonstration_rows, worked_solution

EXAMPLES = arithmetic.examples()["train"][:40]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(
        [arithmetic.ALPHABET], tmp_path_factory.mktemp("tokenizer") / "t.model"
    )


def rows_of(tokenizer, examples, **limits):
    texts = [example.solution for example in examples]
    limits = dict(max_prompt_tokens=8, max_response_tokens=16) | limits
    return demonstration_rows(examples, texts, tokenizer, **limits)


def test_demonstrations_are_laid_out_as_rollouts(tokenizer):
    rows = rows_of(tokenizer, EXAMPLES[:3])
    for row, example in enumerate(EXAMPLES[:3]):
        prompt = rows["prompt_tokens"][row][rows["prompt_mask"][row]].tolist()
        response = rows["response_tokens"][row][rows["response_mask"][row]].tolist()
        assert prompt == tokenizer.encode(example.prompt) and rows["prompt_mask"][row, -1]
        assert response == [*tokenizer.encode(example.solution), tokenizer.end_id]
        assert rows["response_mask"][row, : len(response)].all()
    assert rows["topk_ids"].shape == (3, 16, 0)


def test_a_demonstration_that_could_not_be_sampled(tokenizer):
    with pytest.raises(ValueError, match="more than max_new_tokens=5: raise it"):
        rows_of(tokenizer, EXAMPLES[:1], max_response_tokens=5)


def test_a_careless_teacher_slips_at_its_rate():
    rng, example = np.random.default_rng(0), EXAMPLES[0]
    teacher = careless_arithmetic(0.3)
    slips = sum(teacher(example, rng) != example.solution for _ in range(1000))
    assert 250 < slips < 350
    assert worked_solution(example, rng) == example.solution


def test_a_warm_start_learns(tiny, tokenizer):
    model = Model(dataclasses.replace(tiny[0].config, layers=1))
    losses = []
    context = InitialContext(
        model=model,
        mesh=MeshConfig().build(),
        key=jax.random.key(3),
        tokenizer=tokenizer,
        source=EXAMPLES,
        max_prompt_tokens=6,
        max_new_tokens=16,
        report=lambda step, steps, loss: losses.append((step, steps, loss)),
    )
    make = warm_started_policy(
        demonstrate=worked_solution,
        optimizer=adamw(learning_rate=1e-2),
        steps=45,
        batch_size=8,
    )
    params = make(context)
    assert [entry[:2] for entry in losses] == [(20, 45), (40, 45), (45, 45)]
    assert losses[2][2] < losses[0][2] < np.log(37)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, model.abstract_params)
