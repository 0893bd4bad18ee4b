"""A reward that an untrained policy earns in part, so that tiny runs have gradients."""

from dppo_jax.prompts.examples import Example
from dppo_jax.rewards.verdicts import Verdict


def even_digits(example: Example, response: str, finished: bool) -> Verdict:
    """The share of even digits among the characters."""
    share = sum(character in "02468" for character in response) / max(1, len(response))
    return Verdict(share, response, "even digits")
