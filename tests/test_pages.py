"""The engine's page allocator, on the host alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax.sampling.pages import Pages, prefix_keys


def test_a_key_is_of_the_page_and_all_before_it():
    one, two = np.arange(10), np.arange(10)
    two[1] = 9
    keys, others = prefix_keys(one, 4), prefix_keys(two, 4)
    assert len(keys) == 2  # full pages only
    assert keys[0] != others[0] and keys[1] != others[1]
    assert prefix_keys(one[:9], 4) == keys and prefix_keys(one[4:], 4)[0] != keys[1]


def test_the_longest_unused_contents_go_first():
    pages = Pages(3)
    keys = [b"a", b"b", b"c"]
    held = pages.allocate(3)
    pages.remember(keys, held)
    assert pages.allocate(1) is None
    pages.release(held[1:2])
    pages.release(held[:1])
    assert pages.allocate(1) == held[1:2]  # b was free the longest
    assert pages.find([b"a", b"b"]) == held[:1]
    assert pages.find([b"b"]) == []
    pages.forget_all()
    assert pages.find([b"c"]) == [] and pages.available == 0
    pages.release(held)
    assert pages.available == 3


STEPS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=60)


@settings(max_examples=60)
@given(STEPS)
def test_no_page_has_two_owners_and_all_come_back(steps):
    """Sequences that allocate, share and release; contents looked up by random keys."""
    pages, contents = Pages(7), {}
    sequences: list[list[int]] = []
    for action, number in steps:
        if action == 0:
            before = pages.available
            new = pages.allocate(number)
            assert (new is None) == (number > before)
            if new is not None:
                held = {page for sequence in sequences for page in sequence}
                assert len(set(new)) == number and not held & set(new)
                for page in new:
                    contents[page] = None
                sequences.append(new)
        elif action == 1 and sequences:
            shared = sequences[number % len(sequences)]
            pages.share(shared)
            sequences.append(list(shared))
        elif action == 2 and sequences:
            pages.release(sequences.pop(number % len(sequences)))
        elif action == 3 and sequences:
            sequence = sequences[number % len(sequences)]
            keys = [bytes([number, i]) for i in range(len(sequence))]
            pages.remember(keys, sequence)
            for key, page in zip(keys, sequence, strict=True):
                if contents[page] is None and key not in contents.values():
                    contents[page] = key
        elif action == 4:
            keys = [bytes([number, i]) for i in range(3)]
            found = pages.find(keys)
            assert [contents[page] for page in found] == keys[: len(found)]
            sequences.append(found)
        for page in range(7):
            assert pages.holders(page) == sum(page in sequence for sequence in sequences)
        assert pages.held == len({page for sequence in sequences for page in sequence})
    for sequence in sequences:
        pages.release(sequence)
    assert pages.available == 7
    assert sorted(pages.allocate(7)) == list(range(7))
