"""A step's rollouts: divided, graded while the next is sampled, and replaced where idle."""

import json
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_rewards
from hypothesis import given
from hypothesis import strategies as st
from test_pipeline import Words

from dppo_jax.batches import check_ids
from dppo_jax.collect import Asking, Collector
from dppo_jax.dynamic_sampling import DynamicSampling, joined, places, replaced, with_spread
from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.pipeline import PromptIterator
from dppo_jax.records import FINISH_STOP
from dppo_jax.rewards.verdicts import Verdict
from dppo_jax.sampling.generate import SamplingConfig
from dppo_jax.sampling.requests import Completion, Timings
from dppo_jax.sampling.rollouts import from_completions, prompt_ids
from dppo_jax.sharding import MeshConfig
from dppo_jax.timing import Stopwatch

SETTINGS = SamplingConfig(max_new_tokens=3, samples_per_prompt=2, top_k_capture=1)
MESH = MeshConfig().build()


def completion(tokens):
    count = len(tokens)
    zeros = np.zeros(count, np.float32)
    return Completion(
        np.array(tokens, np.int32), zeros - 1, np.zeros((count, 1), np.int32),
        zeros[:, None] - 0.5, zeros + 2, np.full(count, 7, np.int32), FINISH_STOP,
        Timings(0.0, 0.0, 0.0),
    )  # fmt: skip


class Echo:
    """Answers prompt `n` with (n), (n + 1): a source without a model. Notes what it was asked."""

    def __init__(self, folder=None):
        self.asked, self.folder = [], folder

    def rollout(self, params, prompts, key, settings, *, first=0, version=0):
        ids = prompt_ids(prompts, MESH)
        self.asked.append((first, version, [row[0] for row in ids]))
        if self.folder is not None:
            (self.folder / f"{first}").touch()
        answers = [completion([row[0] + g] * (1 + g)) for row in ids for g in range(2)]
        return from_completions(prompts, answers, settings, MESH)


def differ(example, response, finished):
    """Groups of the prompts 10, 13, 16, ... have a spread: (n) passes, (n + 1, n + 1) does not."""
    first, *more = map(int, response.split())
    return Verdict(float(first % 3 == 1 and not more), response, "")


def collector(source, *, verifier=differ, count=40, prompts=4, answers=None, **options):
    examples = [
        Example(str(n), str(n + 10), "" if answers is None else answers(n), "")
        for n in range(count)
    ]
    iterator = PromptIterator(
        examples, Words(), prompts_per_step=prompts, max_prompt_tokens=1, seed=3
    )
    asking = Asking(MESH, Words(), verifier, SETTINGS, prompts)
    return Collector(source, iterator, asking, **options), iterator


def collect(made, version=0):
    return made({}, jax.random.key(0), Stopwatch(), version=version)


def prompts_in(collected):
    return np.asarray(collected.rollout.prompt_tokens)[:, -1].tolist()


def test_a_divided_step_is_the_whole_one():
    """Every array, reward and number; the same prompts in the same order, step after step."""
    found = []
    for batches in (1, 2, 4):
        source = Echo()
        made, iterator = collector(source, batches=batches)
        found.append([collect(made, version) for version in range(2)])
        assert [(first, version) for first, version, _ in source.asked] == [
            (number * 4 // batches, version) for version in range(2) for number in range(batches)
        ]
        assert iterator.get_state()["step"] == 2 and iterator.get_state()["ahead"] == 0
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            for a, b in zip(*map(jax.tree.leaves, (ours.rollout, theirs.rollout)), strict=True):
                assert np.array_equal(a, b)
            assert np.array_equal(ours.rewards, theirs.rewards)
            assert ours.numbers == theirs.numbers and ours.answers.texts == theirs.answers.texts
    rollout = found[0][0].rollout
    assert np.asarray(rollout.response_mask).sum(axis=1).tolist() == [1, 2] * 4
    assert set(np.asarray(rollout.policy_version)[np.asarray(rollout.response_mask)]) == {7}


def test_answers_are_graded_while_the_next_are_sampled(tmp_path):
    """Each verifier waits for the next batch to be asked for: graded one after the other, none but
    the last would ever see it."""
    size, batches = 2, 3
    source = Echo(tmp_path)
    made, iterator = collector(source, count=6, prompts=6)  # learns the order
    order = [int(e.id) for e in iterator.take(6).examples]

    def next_batch(n):
        place = order.index(n) // size + 1
        return str(tmp_path / str(place * size)) if place < batches else ""

    made, _ = collector(
        source, verifier=toy_rewards.waits_for_the_next, count=6, prompts=6, answers=next_batch,
        batches=batches,
    )  # fmt: skip
    assert collect(made).numbers["reward/mean"] == 1.0


def test_idle_groups_are_replaced_by_new_prompts():
    """By hand: the stream's prompts with n % 3 == 1, in their order, and what was drawn for it."""
    source = Echo()
    made, iterator = collector(source, batches=2, dynamic=DynamicSampling(max_batches=4))
    first = collect(made)
    stream = [n for _, _, asked in source.asked for n in asked]
    assert [n % 3 == 1 for n in prompts_in(first)] == [True] * 4
    assert with_spread(np.asarray(first.rewards)).all()
    # who was right from the start keeps its place; the others' are filled in the stream's order
    kept = [n if n % 3 == 1 else None for n in stream[:4]]
    new = iter(n for n in stream[4:] if n % 3 == 1)
    assert prompts_in(first) == [n or next(new) for n in kept]
    numbers, idle = first.numbers, kept.count(None)
    useful = sum(n % 3 == 1 for n in stream)
    assert numbers["groups/replaced"] == idle > 0 and numbers["groups/without_spread"] == 0
    assert numbers["groups/unused"] == useful - 4
    assert numbers["rollout/batches"] == len(stream) / 4
    assert numbers["prompts/consumed"] == len(stream) == iterator.get_state()["ahead"] + 4
    # the log is of everything that was sampled, the batch of what is trained on
    assert numbers["reward/groups_with_spread"] == pytest.approx(useful / len(stream))
    assert numbers["reward/trained_mean"] == 0.5
    tokens = np.asarray(first.rollout.response_tokens)[::2, 0]
    assert tokens.tolist() == prompts_in(first)  # responses moved with their prompts

    # the next step goes on where this one ended, and so does a run resumed there
    resumed, position = collector(Echo(), batches=2, dynamic=DynamicSampling(max_batches=4))
    position.set_state(json.loads(json.dumps(iterator.get_state())))
    ours, theirs = collect(made, 1), collect(resumed, 1)
    assert prompts_in(ours) == prompts_in(theirs) and ours.numbers == theirs.numbers
    asked = [n for _, _, each in source.asked for n in each]
    assert max(Counter(asked[:40]).values()) == 1  # no prompt twice in a pass


def test_replacement_ends_at_its_limit():
    source = Echo()
    never = lambda example, response, finished: Verdict(0.0, None, "")  # noqa: E731
    made, _ = collector(source, verifier=never, dynamic=DynamicSampling(max_batches=3))
    found = collect(made)
    assert len(source.asked) == 3 and found.numbers["groups/without_spread"] == 4
    assert found.numbers["groups/replaced"] == 0 and prompts_in(found) == source.asked[0][2]
    with pytest.raises(ValueError, match="max_batches=1"):
        DynamicSampling(max_batches=1)


@given(st.lists(st.booleans(), min_size=1), st.lists(st.booleans()))
def test_places_are_filled_in_order(wanting, offered):
    taken = places(np.array(wanting), np.array(offered, bool))
    assert all(wanting[p] for p in np.flatnonzero(taken >= 0))
    used = taken[taken >= 0].tolist()
    assert used == [n for n, good in enumerate(offered) if good][: len(used)]
    assert len(used) == min(sum(wanting), sum(offered))


def test_groups_move_whole():
    """`replaced` on every leaf, prompts and samples alike; `joined` keeps the order."""
    source = Echo()
    made, _ = collector(source, prompts=3)
    one, other = collect(made).rollout, collect(made).rollout
    moved = replaced(one, other, jnp.array([-1, 2, 0]))
    whole = joined([one, other])
    picked = [0, 3 + 2, 3 + 0]
    for leaf, both in zip(*map(jax.tree.leaves, (moved, whole)), strict=True):
        groups = np.asarray(both).reshape(6, -1)
        assert np.array_equal(np.asarray(leaf).reshape(3, -1), groups[picked])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made[:-1], "3 completions came back for 4 samples"),
        (lambda made: [completion([1] * 4), *made[1:]], "4 tokens .* 1 to 3 tokens"),
        (lambda made: [completion([]), *made[1:]], "a completion of 0 tokens"),
    ],
)
def test_what_a_source_may_not_answer(change, message):
    class Wrong(Echo):
        def rollout(self, params, prompts, key, settings, *, first=0, version=0):
            made = [completion([1])] * 4
            return from_completions(prompts, change(made), settings, MESH)

    made, _ = collector(Wrong(), prompts=2)
    with pytest.raises(ValueError, match=message):
        collect(made)


@pytest.mark.parametrize(
    ("field", "id"), [("response_tokens", 50), ("topk_ids", -1), ("prompt_tokens", 99)]
)
def test_ids_that_the_model_does_not_have(field, id):
    made, _ = collector(Echo(), prompts=2)
    rollout = collect(made).rollout
    check_ids(rollout, 50)
    mask = {"prompt_tokens": rollout.prompt_mask}.get(field, rollout.response_mask)
    ids = getattr(rollout, field)
    padding = jnp.where(mask if ids.ndim == 2 else mask[..., None], ids, id)
    check_ids(replace(rollout, **{field: padding}), 50)
    wrong = replace(rollout, **{field: ids.at[1, 0].set(id)})
    with pytest.raises(ValueError, match=f"{field} holds token id {id}, outside .* of 50"):
        check_ids(wrong, 50)
