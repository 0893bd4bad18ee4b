"""The order, sharding, padding and resumption of prompt batches."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax.prompts import store
from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.pipeline import PromptIterator, evaluation_batches

# Grain takes milliseconds to place one index in a handful: few cases, and no deadline.
few = settings(max_examples=8, deadline=None)


class Words:
    """A tokenizer for tests: `7 8 9` -> [7, 8, 9]."""

    vocab_size = 1000
    end_id = 1
    pad_id = 0

    def encode(self, text):
        return [int(word) for word in text.split()]

    def encode_response(self, text):
        return [*self.encode(text), self.end_id]

    def decode(self, ids):
        return " ".join(map(str, ids))


def examples(count):
    """Example n is called n and has 1 to 3 tokens, all of them n + 10."""
    return [Example(str(n), " ".join([str(n + 10)] * (1 + n % 3)), "", "") for n in range(count)]


def training(count=10, **options):
    settings = {"prompts_per_step": 4, "max_prompt_tokens": 3, "seed": 0} | options
    return PromptIterator(examples(count), Words(), **settings)


def ids(batch):
    return [example.id for example in batch.examples]


def take(iterator, steps):
    return [id for _ in range(steps) for id in ids(next(iterator))]


def check_rows(batch, columns):
    """Tokens, mask and examples of every row belong together, and prompts end at the right."""
    assert batch.tokens.dtype == np.int32 and batch.mask.dtype == bool
    assert batch.tokens.shape == batch.mask.shape == (len(batch.examples), columns)
    for row, example in enumerate(batch.examples):
        prompt = Words().encode(example.prompt)
        assert batch.tokens[row, batch.mask[row]].tolist() == prompt
        assert batch.mask[row].tolist() == [False] * (columns - len(prompt)) + [True] * len(prompt)


def test_batches_are_left_padded():
    batch = next(training(max_prompt_tokens=5))
    check_rows(batch, 5)
    assert batch.valid.all() and batch.valid.shape == (4,)


@few
@given(st.integers(30, 50), st.integers(1, 5), st.integers(0, 2**32))
def test_every_epoch_is_a_permutation(count, prompts_per_step, seed):
    iterator = training(count, prompts_per_step=prompts_per_step, seed=seed)
    stream = take(iterator, count)  # so many batches hold a whole number of epochs
    for start in range(0, len(stream), count):
        assert sorted(stream[start : start + count]) == sorted(map(str, range(count)))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = []
    for seed in range(3):
        iterator = training(50, prompts_per_step=50, seed=seed)
        orders += [tuple(ids(next(iterator))) for _ in range(3)]
    assert len(set(orders)) == 9
    assert take(training(50, seed=1), 20) == take(training(50, seed=1), 20)


def test_the_order_is_the_same_on_every_python():
    assert " ".join(take(training(20), 3)) == "18 8 16 7 4 13 1 0 19 17 10 9"


def test_epochs_are_counted():
    iterator = training(10)  # batches of 4: the third crosses into the second epoch
    epochs = []
    for _ in range(6):
        epochs.append(iterator.epoch)
        next(iterator)
    assert epochs == [0, 0, 0, 1, 1, 2]
    assert iterator.step == 6


@few
@given(st.integers(30, 50), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9))
def test_processes_share_every_batch(count, process_count, rows, step):
    settings = {"prompts_per_step": rows * process_count, "seed": 3}
    whole = training(count, **settings)
    parts = [
        training(count, **settings, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    for iterator in (whole, *parts):
        iterator.step = step
    batches = [next(part) for part in parts]
    expected = next(whole)
    assert np.array_equal(np.concatenate([batch.tokens for batch in batches]), expected.tokens)
    assert np.array_equal(np.concatenate([batch.mask for batch in batches]), expected.mask)
    assert [id for batch in batches for id in ids(batch)] == ids(expected)


@few
@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_resuming_equals_going_on(before, after, seed):
    uninterrupted = training(100, seed=seed, prompts_per_step=32)
    take(uninterrupted, before)
    state = json.loads(json.dumps(uninterrupted.get_state()))
    resumed = training(100, seed=seed, prompts_per_step=32)
    take(resumed, after)  # wherever it was
    resumed.set_state(state)
    assert (resumed.step, resumed.epoch) == (before, uninterrupted.epoch)
    assert take(resumed, 4) == take(uninterrupted, 4)  # and across an epoch's end


def test_resuming_on_another_number_of_processes():
    one = training()
    take(one, 5)
    two = [training(process_index=index, process_count=2) for index in range(2)]
    for part in two:
        part.set_state(one.get_state())
    assert ids(next(one)) == ids(next(two[0])) + ids(next(two[1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed has changed"),
        ({"prompts_per_step": 2}, r"prompts_per_step has changed \(4 when saved, 2 now\)"),
        ({"count": 11}, "the prompts have changed"),
    ],
)
def test_a_position_of_another_run_is_refused(options, message):
    other = training(**options)
    with pytest.raises(ValueError, match=message):
        other.set_state(training().get_state())
    assert other.step == 0


def test_what_is_no_position_is_refused():
    with pytest.raises(ValueError, match="not a prompt position"):
        training().set_state({"next_index": 3})


def test_long_prompts_are_found_at_the_start():
    with pytest.raises(ValueError, match="prompt 2 has 3 tokens.*max_prompt_tokens = 2.*'drop'"):
        training(max_prompt_tokens=2)
    with pytest.raises(ValueError, match="prompt 2 has 3 tokens"):
        evaluation_batches(examples(3), Words(), prompts_per_step=1, max_prompt_tokens=2)


def test_long_prompts_can_be_dropped(caplog):
    iterator = training(max_prompt_tokens=2, too_long="drop")
    assert iterator.dropped == 3 and "left out 3 of 10 prompts" in caplog.text
    seen = take(iterator, 7)  # four epochs of seven
    assert sorted(seen) == sorted([str(n) for n in range(10) if n % 3 != 2] * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts_per_step": 5, "process_count": 2}, "multiple of the 2 processes"),
        ({"prompts_per_step": 0}, "positive multiple"),
        ({"process_index": 2, "process_count": 2}, "not below 2"),
        ({"count": 0}, "none of the 0 prompts"),
        ({"max_prompt_tokens": 0, "too_long": "drop"}, "none of the 10 .*max_prompt_tokens = 0"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        training(**options)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="prompt empty has no tokens"):
        PromptIterator(
            [Example("empty", "", "", "")],
            Words(),
            prompts_per_step=1,
            max_prompt_tokens=3,
            seed=0,
        )


@few
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 5))
def test_evaluation_sees_every_prompt_once_in_order(count, rows, process_count):
    parts = [
        list(
            evaluation_batches(
                examples(count),
                Words(),
                prompts_per_step=rows * process_count,
                max_prompt_tokens=4,
                process_index=index,
                process_count=process_count,
            )
        )
        for index in range(process_count)
    ]
    assert len({len(part) for part in parts}) == 1  # or some process would wait for ever
    seen = []
    for batches in zip(*parts, strict=True):
        for batch in batches:
            check_rows(batch, 4)
            assert batch.valid.shape == (rows,)
            seen += [id for id, valid in zip(ids(batch), batch.valid, strict=True) if valid]
    assert seen == [str(n) for n in range(count)]


def test_batches_from_disk(tmp_path):
    store.prepare("arithmetic", tmp_path, smallest=2, largest=9, held_out=8)
    source = store.load("arithmetic", tmp_path, "train")

    class Characters(Words):
        def encode(self, text):
            return [ord(character) for character in text]

    iterator = PromptIterator(source, Characters(), prompts_per_step=8, max_prompt_tokens=6, seed=0)
    seen = take(iterator, 7)
    assert sorted(seen) == sorted(example.id for example in source)
