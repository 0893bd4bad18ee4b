"""The engine's arrays, and the calls of its programs on them."""

import contextlib
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model, Params
from dppo_jax.sampling import engine_programs
from dppo_jax.sampling.decode_forms import why_not_ragged
from dppo_jax.sampling.engine_config import EngineConfig
from dppo_jax.sampling.engine_inputs import (
    Call,
    Shape,
    SlotRows,
    empty_calls,
    prefill_calls,
    reads_of,
    shape_of,
)
from dppo_jax.sampling.engine_programs import Chunk, Programs, Slots, empty_hidden
from dppo_jax.sampling.paged_cache import empty_pages, storage_dtype
from dppo_jax.sampling.scheduler import Round
from dppo_jax.sampling.sequences import Sample
from dppo_jax.sampling.weights import Weights, copied, for_decoding
from dppo_jax.sharding import axes_of, check_divides


def shards_of(model: DecoderConfig, c: EngineConfig, mesh: jax.sharding.Mesh | None) -> int:
    """Over how many devices a mesh splits the slots; ValueError where it divides them not."""
    if mesh is None:
        return 1
    check_divides(mesh, "queries", {"slots": c.slots}, "decode")
    check_divides(mesh, "kv_heads", {"kv_heads": model.kv_heads}, "compute")  # as slots leave it
    return math.prod(mesh.shape[axis] for axis in axes_of("queries", mesh, "decode"))


def programs_of(
    model: DecoderConfig, c: EngineConfig, mesh: jax.sharding.Mesh | None, platform: str
) -> Programs:
    """What of a configuration is compiled into decoding on this platform."""
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    refused = why_not_ragged(model, storage_dtype(model, c.cache_dtype), tensor)
    return Programs(
        chunk=c.chunk,
        max_context=c.max_context,
        top_k_capture=c.top_k_capture,
        raw_logp=c.logp == "raw",
        cache_dtype=c.cache_dtype,
        ragged=platform == "tpu" and refused is None,
        replay=c.replay,
        record_experts=c.record_experts,
    )


def empty_arrays(model: DecoderConfig, c: EngineConfig, shape: Shape, ragged: bool) -> Any:
    """The pages of all layers, and the hidden states of the slots."""
    pages = shape.shards * shape.pages
    made = empty_pages(model, c.cache_dtype, pages, c.page_size, ragged=ragged)
    return made, empty_hidden(model, c.slots)


class EngineDevice:
    """Pages and hidden states of the slots; does what the scheduler decides."""

    def __init__(self, model: Model, config: EngineConfig, mesh: jax.sharding.Mesh | None):
        c = config
        self.model, self.config, self.mesh = model, c, mesh
        self.shards = shards_of(model.config, c, mesh)
        self.shape = shape_of(c, model.config, self.shards)
        self.compilations, self.compile_seconds = 0, 0.0
        self._programs = programs_of(model.config, c, mesh, jax.default_backend())
        # Born as the programs give them back, so that the second call compiles nothing.
        with self._on_mesh():
            born = partial(empty_arrays, model.config, c, self.shape, self._programs.ragged)
            self._pages, self._hidden = jax.jit(born)()
        self._rows = SlotRows(c.slots, c.stop_ids, c.logit_biases)
        self._reads = reads_of(c, model.config, self.shape, self._programs.ragged)
        self._weights: Weights | None = None

    def use(self, params: Params) -> None:
        """To be told when there are other parameters."""
        self._weights = None  # the old ones go first
        made = partial(for_decoding, params, self.model, self.config.slots)
        self._weights = self._counted(made, compiled=copied)

    def warm_up(self, params: Params) -> None:
        """Compiles every program but those with a repetition penalty."""
        nowhere = np.full(self.config.slots, self.shape.pages, np.int32)
        self._copy(np.zeros_like(nowhere), nowhere)
        for call in empty_calls(self.config, self.shape):
            self._place(self._prefill(params, call)[0], np.full_like(nowhere, -1))
        for reads in self._reads.each():
            self._decode(params, self._rows.slots([], self.config, self.shape, reads))

    def do(self, params: Params, round_: Round) -> None:
        """Copies pages and takes hidden states for samples that start, then prefills."""
        slots = self.config.slots
        source, to = np.zeros(slots, np.int32), np.full(slots, self.shape.pages, np.int32)
        for start in round_.starts:
            if start.copy:
                source[start.sample.slot], to[start.sample.slot] = start.copy
        if any(start.copy for start in round_.starts):
            self._copy(source, to)
        by_array: dict[int, tuple[jax.Array, np.ndarray]] = {}
        for start in round_.starts:
            last, row = start.last
            _, rows = by_array.setdefault(id(last), (last, np.full(slots, -1, np.int32)))
            rows[start.sample.slot] = row
            self._rows.put(start.sample.slot, start.sample)
        for last, rows in by_array.values():
            self._place(last, rows)
        for call in prefill_calls(round_.prefills, self.config, self.shape):
            began = time.monotonic()
            last, experts = jax.block_until_ready(self._prefill(params, call))
            experts = jax.device_get(experts)
            for row, job in call.jobs.items():
                job.result.last = (last, row)
                if experts is not None:
                    job.result.experts = experts[row, : len(job.tokens)]
                for sample in job.samples:
                    sample.prefill_seconds += time.monotonic() - began

    def decode(self, params: Params, running: Sequence[Sample]) -> Chunk:
        """A chunk of tokens in every slot that somebody is in; on the host."""
        slots = self._rows.slots(running, self.config, self.shape, self._reads)
        return jax.device_get(self._decode(params, slots))

    def _copy(self, source: np.ndarray, to: np.ndarray) -> None:
        self._pages = self._counted(engine_programs.copy, self._pages, source, to)

    def _place(self, last: jax.Array, rows: np.ndarray) -> None:
        self._hidden = self._counted(engine_programs.place, self._hidden, last, rows)

    def _prefill(self, params: Params, call: Call) -> tuple[jax.Array, jax.Array | None]:
        self._pages, last, experts = self._counted(
            engine_programs.prefill,
            params,
            self._pages,
            **call.arrays,
            model=self.model,
            max_context=self.config.max_context,
            cache_dtype=self.config.cache_dtype,
            record_experts=self.config.record_experts,
            weights=self._weights,
        )
        return last, experts

    def _decode(self, params: Params, slots: Slots) -> Chunk:
        self._pages, self._hidden, chunk = self._counted(
            engine_programs.decode_chunk,
            params,
            self._pages,
            self._hidden,
            slots,
            model=self.model,
            programs=self._programs,
            weights=self._weights,
        )
        return chunk

    def _counted(self, program: Any, *args, compiled: Any = None, **kwargs):
        """What a program gives, or a function that calls `compiled`.

        All the time of a call that compiles counts as compiling: what it starts runs on after it.
        """
        compiled = compiled or program
        before, began = compiled._cache_size(), time.monotonic()
        with self._on_mesh():
            out = program(*args, **kwargs)
        if new := compiled._cache_size() - before:
            self.compilations += new
            self.compile_seconds += time.monotonic() - began
        return out

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
