"""The project's own task: multiply two factors digit by digit, `47*86=` -> `282+3760=4042`.

The response is one partial product for each digit of the second factor, units first, then their
sum. Nothing follows the answer but the tokenizer's end token, so there is no full stop. It is
small enough to learn in minutes on two cores, and a base that imitates `careless_solution` knows
more than it shows, which is what reinforcement learning can bring out.
"""

import hashlib

import numpy as np

from dppo_jax.prompts.examples import Example

ALPHABET = "0123456789*+="


def prompt(a: int, b: int) -> str:
    """The problem as the policy sees it, such as `47*86=`."""
    return f"{a}*{b}="


def partial_products(a: int, b: int) -> list[int]:
    """a times each digit of b in its place, units first: 47, 86 -> [282, 3760]."""
    return [a * int(digit) * 10**place for place, digit in enumerate(reversed(str(b)))]


def solution(a: int, b: int) -> str:
    """The worked response, such as `282+3760=4042`."""
    return _written(partial_products(a, b), a * b)


def careless_solution(a: int, b: int, rng: np.random.Generator, slip_rate: float) -> str:
    """A solution that with probability `slip_rate` holds one slip, so that its answer is wrong.

    A slip replaces one digit of one partial product or of the sum, each number equally likely. A
    slip in a partial product propagates: the sum is right for the numbers written before it. Only
    `rng` decides, so a seeded generator repeats the same demonstrations.
    """
    partials = partial_products(a, b)
    if rng.random() >= slip_rate:
        return _written(partials, a * b)
    slip = int(rng.integers(len(partials) + 1))
    if slip < len(partials):
        partials[slip] = _with_one_digit_changed(partials[slip], rng)
        return _written(partials, sum(partials))
    return _written(partials, _with_one_digit_changed(a * b, rng))


def examples(
    smallest: int = 10, largest: int = 99, held_out: int = 512, seed: int = 0
) -> dict[str, list[Example]]:
    """Every ordered pair of factors in smallest..largest, split into `train` and `test`.

    `test` has `held_out` problems. Pairs are held out unordered: 47*86 and 86*47 have the same
    answer, so one in train would leak the other. The choice orders pairs by a hash of seed and
    pair, which no release of NumPy or Python changes.
    """
    if not 1 <= smallest <= largest:
        raise ValueError(f"factors need 1 <= smallest <= largest, got {smallest} and {largest}")
    factors = range(smallest, largest + 1)
    if not 0 < held_out < len(factors) ** 2:
        raise ValueError(
            f"held_out is {held_out}, but factors {smallest}..{largest} give {len(factors) ** 2}"
            " problems and both splits need at least one"
        )
    pairs = [(a, b) for a in factors for b in factors if a <= b]
    pairs.sort(key=lambda pair: hashlib.sha256(f"{seed}:{pair[0]}*{pair[1]}".encode()).digest())
    test_pairs: set[tuple[int, int]] = set()
    remaining = held_out
    for a, b in pairs:
        orders = 1 if a == b else 2
        if orders <= remaining:
            test_pairs.add((a, b))
            remaining -= orders
    if remaining:
        raise ValueError(
            f"cannot hold out exactly {held_out} problems in whole pairs with seed {seed};"
            f" {held_out - remaining} or another seed works"
        )
    splits: dict[str, list[Example]] = {"train": [], "test": []}
    for a in factors:
        for b in factors:
            split = "test" if (min(a, b), max(a, b)) in test_pairs else "train"
            splits[split].append(Example(f"{a}*{b}", prompt(a, b), str(a * b), solution(a, b)))
    _refuse_leaks(splits)
    return splits


def _refuse_leaks(splits: dict[str, list[Example]]) -> None:
    """Raises if a held-out problem, in either order of its factors, is in train."""
    train, test = (
        {frozenset(example.id.split("*")) for example in splits[split]}
        for split in ("train", "test")
    )
    if leaked := train & test:
        raise AssertionError(f"held-out factors are in train too: {sorted(map(sorted, leaked))}")


def _written(partials: list[int], total: int) -> str:
    return "+".join(map(str, partials)) + f"={total}"


def _with_one_digit_changed(number: int, rng: np.random.Generator) -> int:
    """Another number of as many digits that differs in one of them."""
    digits = str(number)
    place = int(rng.integers(len(digits)))
    leading = place == 0 and len(digits) > 1  # 0 would make the number shorter
    choices = ("123456789" if leading else "0123456789").replace(digits[place], "")
    changed = choices[int(rng.integers(len(choices)))]
    return int(digits[:place] + changed + digits[place + 1 :])
