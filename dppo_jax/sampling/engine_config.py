"""Sizes of an engine, what it counts, and the requests that do not fit it."""

from dataclasses import dataclass

from dppo_jax.sampling.sequences import Request


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine, all of which are compiled in."""

    slots: int = 16  # sequences that decode at once
    max_context: int = 1024  # tokens of a prompt and its response
    chunk: int = 32  # tokens a slot draws before the host looks
    page_size: int = 16  # tokens
    pages: int | None = None  # by default as many as all slots can fill
    cache_bytes: int | None = None  # or a budget for them, over all devices
    prefill_buckets: tuple[int, ...] = ()  # lengths; by default powers of two up to max_context
    prefill_tokens: int = 2048  # of one call, padding included
    prefix_cache: bool = True  # prompts that begin alike share pages
    # Samples of a prompt that decode together, and how many of its tokens are then read once for
    # all of them. By default each reads its own, as in the kernel for TPUs in any case.
    samples: int = 1
    shared_tokens: int = 0
    continuous: bool = True  # False: slots are filled again only when all of them are free
    top_k_capture: int = 20
    cache_dtype: str = "model"  # or bfloat16, or int8 with a scale for each token and head
    # For training: whoever filters keeps at most top_k_capture tokens, which are all recorded, so
    # that `scoring` can renormalise over them.
    replay: bool = False
    record_experts: bool = False  # of a mixture; every prompt is computed, so prefix_cache is off
    logp: str = "sampled"  # or raw: before bias, penalty and filters
    stop_ids: int = 8  # room for those of a request
    logit_biases: int = 32  # likewise

    def __post_init__(self):
        sizes = dict(
            slots=self.slots, max_context=self.max_context, chunk=self.chunk,
            page_size=self.page_size, prefill_tokens=self.prefill_tokens, samples=self.samples,
        )  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if self.pages is not None and self.cache_bytes is not None:
            raise ValueError("pages and cache_bytes are two ways to say the same: set one of them")
        if any(size is not None and size < 1 for size in (self.pages, self.cache_bytes)):
            raise ValueError("pages and cache_bytes must be at least 1")
        if self.cache_dtype not in ("model", "bfloat16", "int8"):
            raise ValueError(f"cache_dtype={self.cache_dtype!r}: use 'model', 'bfloat16' or 'int8'")
        if self.logp not in ("sampled", "raw"):
            raise ValueError(f"logp={self.logp!r}: use 'sampled' or 'raw'")
        for name in ("top_k_capture", "shared_tokens", "stop_ids", "logit_biases"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.replay and not self.top_k_capture:
            raise ValueError("replay records kept sets among the top K: set top_k_capture above 0")
        if self.record_experts and self.prefix_cache:
            raise ValueError(
                "record_experts needs every prompt computed: set prefix_cache to False"
            )
        if any(bucket < 1 for bucket in self.prefill_buckets):
            raise ValueError(f"prefill_buckets={self.prefill_buckets} must be at least 1 each")
        if self.prefill_buckets and max(self.prefill_buckets) < self.max_context:
            raise ValueError(
                f"prefill_buckets={self.prefill_buckets} end before max_context="
                f"{self.max_context}, which a preempted sequence may reach: add it"
            )

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths that prefill compiles for, each a whole number of pages, shortest first."""
        given = self.prefill_buckets
        if not given:
            doubled = (64 * 2**i for i in range(self.max_context.bit_length()))
            given = (*(size for size in doubled if size < self.max_context), self.max_context)
        return tuple(sorted({-(-size // self.page_size) * self.page_size for size in given}))


@dataclass
class Stats:
    """Counts since the engine was made."""

    compilations: int = 0  # of its programs; none after `warm_up`
    compile_seconds: float = 0.0
    chunks: int = 0
    prefill_tokens: int = 0  # computed; padding left out
    cached_tokens: int = 0  # of prompts, found in the prefix cache
    drawn_tokens: int = 0
    slot_steps: int = 0  # slots x steps of the decoding loop: drawn_tokens where none was idle
    preemptions: int = 0
    pages_held_most: int = 0


def why_not(request: Request, c: EngineConfig, vocab: int, pages: int) -> str | None:
    """Why an engine with `pages` pages for a sequence can never serve a request, in one line.

    But for stop strings, which need an engine that can detokenise.
    """
    sampling, length = request.sampling, len(request.prompt)
    whole = length + sampling.max_new_tokens
    need = -(-whole // c.page_size)
    named = [*sampling.stop_ids, *(token for token, _ in sampling.logit_bias)]
    if not length:
        return "the prompt has no tokens: give at least one"
    if not ((request.prompt >= 0) & (request.prompt < vocab)).all():
        return f"the prompt has token ids outside the vocabulary of {vocab}"
    if not all(0 <= token < vocab for token in named):
        return f"stop_ids or logit_bias name tokens outside the vocabulary of {vocab}"
    if whole > c.max_context:
        return (
            f"{length} prompt tokens and max_new_tokens={sampling.max_new_tokens} exceed the "
            f"engine's max_context={c.max_context}"
        )
    if need > pages:
        return (
            f"{whole} tokens need {need} pages of the cache, which has {pages}: "
            "give the engine more, or ask for fewer tokens"
        )
    if len(sampling.stop_ids) > c.stop_ids:
        return f"{len(sampling.stop_ids)} stop_ids, the engine has room for {c.stop_ids}"
    if len(sampling.logit_bias) > c.logit_biases:
        return f"{len(sampling.logit_bias)} logit biases, the engine has room for {c.logit_biases}"
    return None
