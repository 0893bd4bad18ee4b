"""Measured speed and memory of the head's forms, from hidden states to gradients.

Each form computes what an objective needs of N tokens (the sampled token's log-probability and the
entropy, differentiable; the log-probabilities of K stored ids) and the gradient of a loss of them
with respect to hidden states and unembedding.
"""

import importlib.util
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dppo_jax.bench import matmul_peak, seconds_of
from dppo_jax.console import Console
from dppo_jax.kernels.head import fused_loss, head
from dppo_jax.kernels.plain import chunked, naive
from dppo_jax.kernels.single_pass import TokenTerms

ENTROPY_BONUS = 1e-3
# Products of N x D x V that a form makes, forward and with the backward pass: 2 flops each.
PRODUCTS = {
    "naive": (1, 3),
    "chunked": (1, 4),
    "xla": (1, 4),
    "pallas_tpu": (1, 4),
    "single_pass": (1, 3),
    "tokamax": (1, 3),  # at least: its kernel for TPUs computes logits again
}

Form = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def losses(terms: TokenTerms, advantages: jax.Array) -> jax.Array:
    """A policy gradient on the sampled token with an entropy bonus."""
    return -advantages * terms.logp[:, 0] - ENTROPY_BONUS * terms.entropy


def plain(terms_of: Callable[..., TokenTerms]) -> Form:
    """One of the forms that the head is compared with."""

    def form(hidden, unembedding, ids, advantages):
        terms = terms_of(hidden, unembedding, ids)
        return losses(terms, advantages).sum(), terms

    return form


def two_pass(body: str) -> Form:
    """The head by its body of this name."""

    def form(hidden, unembedding, ids, advantages):
        out = head(hidden, unembedding, ids, stored_gradient=False, body=body)
        terms = TokenTerms(out.logit_at - out.lse[:, None], out.entropy)
        return losses(terms, advantages).sum(), terms

    return form


def single_pass(hidden, unembedding, ids, advantages):
    """Loss and gradient in one pass over the logits."""
    return fused_loss(losses, hidden, unembedding, ids, advantages, stored_gradient=False)


def tokamax(hidden, unembedding, ids, advantages):
    """tokamax's fused cross-entropy: the sampled token alone, no entropy, no stored ids, mean."""
    from absl import flags
    from tokamax import linear_softmax_cross_entropy_loss

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])  # or tokamax takes the command line for its own
    return linear_softmax_cross_entropy_loss(
        hidden, ids[:, 0], unembedding.T, reduction="mean"
    ), None


FORMS: dict[str, Form] = {
    "naive": plain(naive),
    "chunked": plain(chunked),
    "xla": two_pass("xla"),
    "pallas_tpu": two_pass("pallas_tpu"),
    "single_pass": single_pass,
    "tokamax": tokamax,
}


def why_not(form: str) -> str | None:
    """Why this form cannot run here, or None."""
    if form == "pallas_tpu" and jax.default_backend() != "tpu":
        return f"runs on a TPU; this is {jax.default_backend()}"
    if form == "tokamax" and importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed"
    return None


def bench_head(
    *,
    tokens: int,
    width: int,
    vocab: int,
    top_k: int,
    dtype: str,
    forms: Sequence[str],
    repeats: int,
) -> dict[str, Any]:
    """Seconds (median), achieved flops and compiled temporary bytes of each form.

    `temporary_bytes` is what the compiled program allocates beside its arguments and results.
    `fraction_of_peak` counts the products that a form makes (8NDV flops where logits are computed
    again, else 6NDV) against the best square product of the same dtype in the same run;
    `fraction_of_useful_peak` counts the 6NDV that nobody can leave out.
    """
    for name, size in dict(tokens=tokens, width=width, vocab=vocab, repeats=repeats).items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    if not 0 <= top_k <= vocab:
        raise ValueError(f"top_k={top_k} is not within 0..{vocab}, the vocabulary")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: use float32 or bfloat16")
    for form in forms:
        if form not in FORMS:
            raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (tokens, width), dtype)
    unembedding = jax.random.normal(keys[1], (vocab, width), dtype) * width**-0.5
    ids = jax.random.randint(keys[2], (tokens, 1 + top_k), 0, vocab)
    advantages = jax.random.normal(keys[3], (tokens,))
    arrays = hidden, unembedding, ids, advantages
    peaks = [matmul_peak(dtype=dtype)]
    measured: dict[str, dict[str, Any]] = {}
    for form in forms:
        if reason := why_not(form):
            measured[form] = {"skipped": reason}
            continue
        measured[form] = _measure(FORMS[form], arrays, repeats)
    peaks.append(matmul_peak(dtype=dtype))
    product = 2.0 * tokens * width * vocab
    for form, found in measured.items():
        for part, made, useful in zip(("forward", "both"), PRODUCTS[form], (1, 3), strict=True):
            if part in found:
                rate = product / found[part]["seconds"]
                found[part]["flops"] = made * product
                found[part]["flops_per_second"] = made * rate
                found[part]["fraction_of_peak"] = made * rate / max(peaks)
                found[part]["fraction_of_useful_peak"] = useful * rate / max(peaks)
    return {
        "forms": measured,
        "shape": dict(tokens=tokens, width=width, vocab=vocab, top_k=top_k, dtype=dtype),
        "logits_bytes": tokens * vocab * 4,
        "peak_flops_per_second": max(peaks),
        "repeats": repeats,
        "machine": {
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
    }


def _measure(form: Form, arrays: tuple[jax.Array, ...], repeats: int) -> dict[str, Any]:
    """The forward pass alone (the terms as results) and with both gradients."""
    both = jax.value_and_grad(form, (0, 1), has_aux=True)
    found = {}
    for name, function in (("forward", form), ("both", both)):
        compiled = jax.jit(function).lower(*arrays).compile()
        memory = compiled.memory_analysis()
        assert memory is not None, "every backend that JAX ships reports a program's memory"
        seconds = seconds_of(lambda run=compiled: run(*arrays), repeats)  # type: ignore[misc]
        found[name] = {
            "seconds": statistics.median(seconds),
            "seconds_min": min(seconds),
            "temporary_bytes": int(memory.temp_size_in_bytes),
        }
    return found


def show_head(result: dict[str, Any]) -> None:
    """The result as a table."""
    rows = {}
    for form, found in result["forms"].items():
        if "skipped" in found:
            rows[form] = f"skipped: {found['skipped']}"
            continue
        forward, both = found["forward"], found["both"]
        rows[form] = (
            f"{forward['seconds'] * 1e3:9.1f} ms   {both['seconds'] * 1e3:9.1f} ms   "
            f"{both['temporary_bytes'] / 2**20:8.0f} MiB   "
            f"{both['flops_per_second'] / 1e12:7.3f} TFLOP/s   "
            f"{both['fraction_of_peak']:4.0%} of peak"
        )
    rows["matmul peak"] = f"{result['peak_flops_per_second'] / 1e12:.3f} TFLOP/s"
    shape = result["shape"]
    size = f"N={shape['tokens']} D={shape['width']} V={shape['vocab']} K={shape['top_k']}"
    Console().table(f"head {size} {shape['dtype']}: forward, both, temporary, rate", rows)
