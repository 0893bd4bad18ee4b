"""A request's sampling parameters as the numbers of a row."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dppo_jax.kernels.rows import RowSampling
from dppo_jax.sampling.requests import SamplingParams


def row_of(params: SamplingParams, sample: int, *, biases: int = 0) -> RowSampling:
    """Sample `sample` of a request; leaves without the axis of rows, in numpy.

    `biases` is J, how many ids of logit_bias there is room for. Raises ValueError where the request
    has more.
    """
    given = params.logit_bias
    if len(given) > biases:
        raise ValueError(
            f"logit_bias names {len(given)} tokens, and there is room for {biases}: "
            "name fewer, or give the engine more room"
        )
    seed = int(params.seed) % 2**64  # numpy's own integers have no room for 2**64
    ids = [token for token, _ in given] + [-1] * (biases - len(given))
    bias = [value for _, value in given] + [0.0] * (biases - len(given))
    numbers: dict[str, Any] = dict(
        seed=np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32),
        sample=np.int32(sample),
        temperature=np.float32(params.temperature),
        top_k=np.int32(min(params.top_k, 2**31 - 1)),
        top_p=np.float32(params.top_p),
        min_p=np.float32(params.min_p),
        repetition_penalty=np.float32(params.repetition_penalty),
        bias_ids=np.array(ids, np.int32).reshape(biases),
        bias=np.array(bias, np.float32).reshape(biases),
    )
    return RowSampling(**numbers)


def stacked(rows: Sequence[RowSampling]) -> RowSampling:
    """Rows of `row_of` with equal room as the batch that `kernels.sampler.sample_rows` takes."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
