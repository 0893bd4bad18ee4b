"""Mixtures of sets, curricula, and problems that are in training and evaluation at once."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import Words, ids, take

from dppo_jax.prompts import store
from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.mixture import ALWAYS, Mixture, by_level, load_train
from dppo_jax.prompts.overlap import check_overlap, find_overlap, normalised
from dppo_jax.prompts.pipeline import PromptIterator


def examples(count, level=""):
    return [Example(f"{level}{n}", str(n + 10), "", "", "", level) for n in range(count)]


def mixture(**weights):
    sizes = {"a": 6, "b": 9, "c": 3}
    return Mixture({name: examples(sizes[name], name) for name in weights}, weights)


def training(source, **options):
    given = {"prompts_per_step": 4, "max_prompt_tokens": 1, "seed": 0} | options
    return PromptIterator(source, Words(), **given)


def test_a_mixture_is_its_sets_one_after_the_other():
    mixed = mixture(b=1, a=2.5)
    assert len(mixed) == 15 and [part.rows for part in mixed.parts] == [range(9), range(9, 15)]
    assert [mixed[0].id, mixed[8].id, mixed[9].id, mixed[-1].id] == ["b/b0", "b/b8", "a/a0", "a/a5"]
    with pytest.raises(IndexError):
        mixed[15]


@pytest.mark.parametrize("weights", [{"a": 1, "b": 3}, {"a": 0.2, "b": 0.3, "c": 0.5}])
def test_every_set_gives_its_share_in_whole_passes(weights):
    iterator = training(mixture(**weights))
    stream = take(iterator, 15)
    total = sum(weights.values())
    for name, weight in weights.items():
        own = [id.split("/")[1] for id in stream if id.startswith(name)]
        assert abs(len(own) - 60 * weight / total) <= 1
        size = {"a": 6, "b": 9, "c": 3}[name]
        for start in range(0, len(own) - size, size):  # no prompt comes again before all have
            assert len(set(own[start : start + size])) == size
        assert abs(iterator.epochs[name] - len(own) // size) <= 1
    assert iterator.epoch == min(iterator.epochs.values())


@settings(max_examples=5)
@given(st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_a_mixture_resumes_and_is_shared_by_processes(before, seed):
    whole = training(mixture(a=1, b=2), seed=seed)
    take(whole, before)
    state = json.loads(json.dumps(whole.get_state()))
    parts = [training(mixture(a=1, b=2), seed=seed, process_index=i, process_count=2)
             for i in range(2)]  # fmt: skip
    for part in parts:
        part.set_state(state)
    for _ in range(3):
        assert [id for part in parts for id in ids(next(part))] == ids(next(whole))


def test_other_weights_are_another_run():
    with pytest.raises(ValueError, match="the prompts have changed"):
        training(mixture(a=1, b=2)).set_state(training(mixture(a=1, b=3)).get_state())


@pytest.mark.parametrize("weights", [{"a": 0}, {"a": -1.0}, {"a": float("inf")}, {}])
def test_weights_that_make_no_sense(weights):
    with pytest.raises(ValueError, match="weight"):
        mixture(**weights)


def test_sets_are_loaded_by_name(tmp_path):
    for name, seed in (("arithmetic", 0), ("stories", 1)):
        options = {"largest": 12} if name == "arithmetic" else {}
        store.prepare(name, tmp_path, held_out=2, seed=seed, **options)
    mixed = load_train({"arithmetic": 1.0, "stories": 3.0}, str(tmp_path))
    assert [part.name for part in mixed.parts] == ["arithmetic", "stories"]
    assert mixed[0].id.startswith("arithmetic/") and len(load_train("stories", str(tmp_path))) > 1


def levels(batch):
    return Counter(example.level for example in batch.examples)


def test_a_curriculum_lets_levels_join():
    source = examples(8, "easy") + examples(8, "hard")
    iterator = training(source, curriculum=by_level({"hard": 3}), prompts_per_step=8)
    batches = [next(iterator) for _ in range(9)]
    assert all(levels(batch) == {"easy": 8} for batch in batches[:3])
    for first, second in zip(batches[3::2], batches[4::2], strict=True):
        assert levels(first) + levels(second) == {"easy": 8, "hard": 8}  # a pass over all
    assert iterator.epoch == 3  # of the present stage


def test_a_curriculum_resumes_and_is_a_function_of_position():
    source = examples(8, "easy") + examples(8, "hard")

    def begin():
        return training(source, curriculum=by_level({"hard": 3}), seed=5)

    whole = begin()
    stream = take(whole, 8)
    for step in range(8):
        resumed = begin()
        resumed.set_state(whole.get_state() | {"step": step})
        assert ids(next(resumed)) == stream[4 * step : 4 * step + 4]
    with pytest.raises(ValueError, match="the prompts have changed"):
        training(source, seed=5).set_state(whole.get_state())


def test_prompts_can_leave_but_never_all():
    source = examples(4, "a") + examples(4, "b")
    iterator = training(
        source, curriculum=lambda example: range(2) if example.level == "a" else ALWAYS
    )
    assert [set(levels(next(iterator))) for _ in range(3)][-1] == {"b"}
    with pytest.raises(ValueError, match="leaves no prompt from step 2 on"):
        training(source, curriculum=lambda example: range(2))
    with pytest.raises(ValueError, match="leaves no prompt from step 0 on"):
        training(source, curriculum=by_level({"a": 1, "b": 1}))
    with pytest.raises(ValueError, match="'a' is -1"):
        by_level({"a": -1})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (r"Find $\dfrac{1}{2}$ of  X.", r"find \frac{1}{2} of $x$", True),
        (r"\left( 3,\, 4 \right)", "(3, 4)", True),
        ("The \u00bd mile", "the 1\u20442 mile", True),
        ("3.5", "35", False),
        ("(1,2)", "(12)", False),
        ("1+2", "1-2", False),
        ("x_1", "x1", False),
        (r"\leftarrow", r"\rightarrow", False),
        ("12*34=", "34*12=", False),
    ],
)
def test_normalised_text(one, other, same):
    assert (normalised(one) == normalised(other)) == same


@given(st.text(max_size=30))
def test_normalising_again_changes_nothing(text):
    assert normalised(normalised(text)) == normalised(text)


def problem(id, text):
    return Example(id, text, "1", "")


def test_overlap_is_found_reported_and_refused():
    train = [problem("t0", "What is $x$?"), problem("t1", "Why?"), problem("t2", "Who?")]
    held_out = [problem("e0", "Why?"), problem("e1", "what is x"), problem("e2", "How?")]
    assert find_overlap(train, held_out) == ([("e0", "t1")], [("e1", "t0")])
    assert check_overlap(train, {"aime": held_out[2:]}, "refuse") == []
    (line,) = check_overlap(train, {"aime": held_out, "amc": held_out[2:]}, "warn")
    assert line == (
        "2 of the 3 problems of aime are in the training set too (1 word for word):"
        " e0 = t1, e1 = t0"
    )
    with pytest.raises(ValueError, match="2 of the 3 .*overlap = 'warn'"):
        check_overlap(train, {"aime": held_out}, "refuse")
    # Prompts without a word or an operator are not all the same.
    assert find_overlap([problem("t", "?")], [problem("e", "!")]) == ([], [])
