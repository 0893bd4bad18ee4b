"""The engine's arrays, and the calls of its programs on them."""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.models.decoder import Model, Params
from dppo_jax.sampling import engine_programs
from dppo_jax.sampling.engine_config import EngineConfig
from dppo_jax.sampling.engine_inputs import Call, SlotRows, empty_calls, prefill_calls, view_widths
from dppo_jax.sampling.engine_programs import Chunk, Programs, Slots
from dppo_jax.sampling.paged_cache import empty_pages, page_bytes
from dppo_jax.sampling.scheduler import Round
from dppo_jax.sampling.sequences import Sample


class EngineDevice:
    """Pages and hidden states of the slots; does what the scheduler decides."""

    def __init__(self, model: Model, config: EngineConfig, mesh: jax.sharding.Mesh | None):
        c = config
        self.model, self.config, self.mesh = model, c, mesh
        self.pages_a_sequence = -(-c.max_context // c.page_size)
        self.page_count = c.pages or c.slots * self.pages_a_sequence
        if c.cache_bytes is not None:
            each = page_bytes(model.config, c.cache_dtype, c.page_size)
            self.page_count = min(self.page_count, c.cache_bytes // each)
            if not self.page_count:
                raise ValueError(
                    f"cache_bytes={c.cache_bytes} is less than one page of {each} bytes: "
                    "give more, or make page_size smaller"
                )
        self.compilations = 0
        self._programs = Programs(
            c.chunk, c.max_context, c.top_k_capture, c.logp == "raw", c.cache_dtype
        )
        with self._on_mesh():
            self._pages = empty_pages(model.config, c.cache_dtype, self.page_count, c.page_size)
            self._hidden = jnp.zeros((c.slots, model.config.width), model.config.dtype)
        self._rows = SlotRows(c.slots, c.stop_ids, c.logit_biases)

    def warm_up(self, params: Params) -> None:
        """Compiles every program but those with a repetition penalty."""
        nowhere = np.full(self.config.slots, self.page_count, np.int32)
        self._copy(np.zeros_like(nowhere), nowhere)
        for call in empty_calls(self.config, self.page_count, self.pages_a_sequence):
            self._place(self._prefill(params, call), np.full_like(nowhere, -1))
        for width in view_widths(self.pages_a_sequence):
            self._decode(params, self._rows.slots([], self.config, self.page_count, width))

    def do(self, params: Params, round_: Round) -> None:
        """Copies pages and takes hidden states for samples that start, then prefills."""
        slots = self.config.slots
        copies = [start.copy for start in round_.starts if start.copy]
        if copies:
            source, to = np.zeros(slots, np.int32), np.full(slots, self.page_count, np.int32)
            source[: len(copies)], to[: len(copies)] = zip(*copies, strict=True)
            self._copy(source, to)
        by_array: dict[int, tuple[jax.Array, np.ndarray]] = {}
        for start in round_.starts:
            last, row = start.last
            _, rows = by_array.setdefault(id(last), (last, np.full(slots, -1, np.int32)))
            rows[start.sample.slot] = row
            self._rows.put(start.sample.slot, start.sample)
        for last, rows in by_array.values():
            self._place(last, rows)
        calls = prefill_calls(round_.prefills, self.config, self.page_count, self.pages_a_sequence)
        for call in calls:
            began = time.monotonic()
            last = jax.block_until_ready(self._prefill(params, call))
            for row, job in enumerate(call.jobs):
                job.result.last = (last, row)
                for sample in job.samples:
                    sample.prefill_seconds += time.monotonic() - began

    def decode(self, params: Params, running: Sequence[Sample]) -> Chunk:
        """A chunk of tokens in every slot that somebody is in; on the host."""
        slots = self._rows.slots(running, self.config, self.page_count)
        return jax.device_get(self._decode(params, slots))

    def _copy(self, source: np.ndarray, to: np.ndarray) -> None:
        self._pages = self._counted(engine_programs.copy, self._pages, source, to)

    def _place(self, last: jax.Array, rows: np.ndarray) -> None:
        self._hidden = self._counted(engine_programs.place, self._hidden, last, rows)

    def _prefill(self, params: Params, call: Call) -> jax.Array:
        self._pages, last = self._counted(
            engine_programs.prefill,
            params,
            self._pages,
            **call.arrays,
            model=self.model,
            programs=self._programs,
        )
        return last

    def _decode(self, params: Params, slots: Slots) -> Chunk:
        self._pages, self._hidden, chunk = self._counted(
            engine_programs.decode_chunk,
            params,
            self._pages,
            self._hidden,
            slots,
            model=self.model,
            programs=self._programs,
        )
        return chunk

    def _counted(self, program: Any, *args, **kwargs):
        before = program._cache_size()
        with self._on_mesh():
            out = program(*args, **kwargs)
        self.compilations += program._cache_size() - before
        return out

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
