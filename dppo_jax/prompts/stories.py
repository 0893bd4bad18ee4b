"""Story openings for a tiny story model, each with a word that the story should use again.

A model of a quarter of a million parameters cannot follow an instruction, so the word is in the
opening, where the story may well take it up: `... named Lily. One day, she found a ball.` asks for
`ball`. With rewards.verifiers.story_word a story is right when it uses the word at least twice and
ends by itself. `answer` is the word; there is no worked solution.

llama2.c's stories260K, sampled at temperature 1 with 400 tokens, earns that in 38 % of 504 stories
(54 % use the word twice, 73 % end); words and openings that it hardly ever took up are left out.
"""

import hashlib

from dppo_jax.prompts.examples import Example

GIRLS = (
    "Lily",
    "Mia",
    "Anna",
    "Lucy",
    "Sue",
    "Amy",
    "Sara",
    "Jane",
    "Emma",
    "Daisy",
    "Kitty",
    "Molly",
)
BOYS = ("Tim", "Tom", "Ben", "Max", "Sam", "Jack", "Bob", "Billy", "Timmy", "Joe", "Leo", "Fred")
THINGS = ("ball", "box", "car", "cake", "bike", "book", "truck", "rock", "boat", "stick")
ANIMALS = ("dog", "cat", "bird", "frog", "bunny", "duck", "bear", "mouse", "bug", "fish", "pig")
PLACES = ("park", "house", "tree", "zoo")

_OPENINGS = (
    (THINGS, "One day, {she} found a {word} in the park."),
    (THINGS, "One day, {she} found a {word}. The {word} was very big."),
    (THINGS, "{She} had a big {word}. {She} loved {her} {word}."),
    (ANIMALS, "One day, {she} saw a little {word}."),
    (ANIMALS, "One day, {she} met a {word}. The {word} was sad."),
    (PLACES, "{She} loved the {word}. One day, {she} went to the {word}."),
)


def examples(held_out: int = 256, seed: int = 0) -> dict[str, list[Example]]:
    """Every hero with every word in every opening that suits it, split into `train` and `test`.

    About `held_out` openings make `test`: hero and word are held out together, so no test story
    is a train story told with another opening. The choice orders them by a hash of the seed,
    which no release of NumPy or Python changes.
    """
    told: dict[tuple[str, str], list[Example]] = {}  # hero and word -> openings
    for name in GIRLS + BOYS:
        girl = name in GIRLS
        hero = f"Once upon a time, there was a little {'girl' if girl else 'boy'} named {name}. "
        pronouns = {"She": "She" if girl else "He", "she": "she" if girl else "he"}
        pronouns["her"] = "her" if girl else "his"
        for number, (words, opening) in enumerate(_OPENINGS):
            for word in words:
                text = hero + opening.format(word=word, **pronouns)
                told.setdefault((name, word), []).append(
                    Example(f"{name}-{word}-{number}", text, word, "")
                )
    total = sum(map(len, told.values()))
    if not 0 < held_out < total:
        raise ValueError(f"held_out is {held_out}; there are {total} openings for both splits")
    splits: dict[str, list[Example]] = {"train": [], "test": []}
    for key in sorted(told, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest()):
        split = "test" if len(splits["test"]) < held_out else "train"
        splits[split].extend(told[key])
    return splits
