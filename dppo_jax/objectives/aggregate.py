"""From a loss a token to a loss a batch: the weight of each token and the sum to divide by.

An aggregation maps the response mask to `TokenWeights`; loss = Σ token·loss / total. Both sums add
over microbatches, so any split of the batch by sequences gives the same loss. Sequences without a
response token count nowhere. Names as in verl@1dda039b core_algos.py agg_loss.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class TokenWeights(NamedTuple):
    """What an aggregation gives to each token, and the denominator's share of this batch."""

    token: Float[Array, "B T"]  # 0 outside response_mask
    total: Float[Array, ""]


Aggregation = Callable[[Bool[Array, "B T"]], TokenWeights]


def token_mean(response_mask: Bool[Array, "B T"]) -> TokenWeights:
    """Every token alike: Σ_tokens / number of tokens (DAPO, arXiv 2503.14476, eq. 8)."""
    token = response_mask.astype(jnp.float32)
    return TokenWeights(token, token.sum())


def seq_mean_token_mean(response_mask: Bool[Array, "B T"]) -> TokenWeights:
    """Every sequence alike: the mean over sequences of the mean over tokens (GRPO's own form)."""
    token = response_mask.astype(jnp.float32)
    lengths = token.sum(axis=1, keepdims=True)
    return TokenWeights(token / jnp.maximum(lengths, 1.0), _sequences(response_mask))


def seq_mean_token_sum(response_mask: Bool[Array, "B T"]) -> TokenWeights:
    """The mean over sequences of the sum over tokens: the gradient of expected reward itself."""
    return TokenWeights(response_mask.astype(jnp.float32), _sequences(response_mask))


def seq_mean_token_sum_norm(
    response_mask: Bool[Array, "B T"], horizon: float | int | None = None
) -> TokenWeights:
    """The mean over sequences of (Σ_tokens / horizon), Dr. GRPO (arXiv 2503.20783) sec. 3.2.

    `horizon` in tokens; None takes the number T of response columns, as verl does.
    Differs from Stable-RL@c6af1d11, which divides by T but not by the number of sequences.
    """
    columns = response_mask.shape[1] if horizon is None else horizon
    if columns <= 0:
        raise ValueError(f"horizon must be positive, got {columns}")
    return TokenWeights(response_mask.astype(jnp.float32) / columns, _sequences(response_mask))


def _sequences(response_mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    return response_mask.any(axis=1).sum().astype(jnp.float32)
