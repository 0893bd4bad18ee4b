"""The programs of a recipe that samples by the engine (`rollouts.continuous`)."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dppo_jax.kernels import tiles
from dppo_jax.plan.abstract import bytes_of, laid_out
from dppo_jax.plan.programs import Program, Settings, Step
from dppo_jax.sampling import engine_programs
from dppo_jax.sampling.engine_config import EngineConfig
from dppo_jax.sampling.engine_device import empty_arrays, programs_of, shards_of
from dppo_jax.sampling.engine_inputs import SlotRows, empty_calls, reads_of, shape_of
from dppo_jax.sampling.rollouts import Continuous, MakeRollouts, sized
from dppo_jax.sharding import spec_of


def engine_of(rollouts: MakeRollouts) -> EngineConfig | None:
    """The engine that a recipe samples by, or None."""
    if isinstance(rollouts, functools.partial) and rollouts.func is Continuous:
        return rollouts.keywords["config"]
    return None


def names(settings: Settings) -> list[str]:
    """Of the programs of a step, in its order."""
    by_engine = engine_of(settings.rollouts) is not None
    sampling = ["prefill", "recompute", "decode"] if by_engine else ["prefill", "decode"]
    return ["weight sync", *sampling, "scoring", "update"]


def program(step: Step, name: str) -> Program:
    """The one of that name."""
    config = engine_of(step.settings.rollouts)
    sampler = step if config is None else _Engine(step, config)
    its = sampler if name in ("prefill", "recompute", "decode") else step
    return getattr(its, name.replace(" ", "_"))()


class _Engine:
    """The engine's programs, with all of its pages there."""

    def __init__(self, step: Step, config: EngineConfig):
        s = step.settings
        self._step, self._mesh = step, step.mesh if step.mesh.size > 1 else None
        self._config = c = sized(config, s.sampling, s.max_prompt_tokens)
        dtype = s.sampling.dtype
        self._model = step.model if dtype is None else step.model.in_dtype(dtype)
        of = self._model.config
        self._shape = shape_of(c, of, shards_of(of, c, self._mesh))
        self._whole = NamedSharding(step.mesh, PartitionSpec())
        with jax.set_mesh(step.mesh):
            platform = tiles.target().platform
            self._programs = programs_of(of, c, self._mesh, platform)
            born = functools.partial(empty_arrays, of, c, self._shape, self._programs.ragged)
            pages, hidden = jax.eval_shape(born)

        def split(leaf: Any, axes: tuple) -> Any:
            spec = spec_of(axes, step.mesh, "decode", leaf.shape)
            return laid_out(leaf, NamedSharding(step.mesh, spec))

        self._pages = [
            jax.tree.map(functools.partial(split, axes=layer.axes), layer) for layer in pages
        ]
        self._hidden = split(hidden, ("tokens", "width"))
        self._cache = bytes_of(self._pages)

    def _calls(self, width: int, prefix: bool) -> Iterator[dict[str, Any]]:
        """Prefill calls of prompts of that width."""
        for call in empty_calls(self._config, self._shape):
            same = call.arrays["tokens"].shape[1] == width
            if same and (call.arrays["prefix"] is not None) == prefix:
                yield laid_out(call.arrays, self._whole)

    def _prefill(self, name: str, arrays: dict[str, Any], runs: int) -> Program:
        c = self._config
        sizes = dict(
            model=self._model,
            max_context=c.max_context,
            cache_dtype=c.cache_dtype,
            record_experts=c.record_experts,
        )
        given = self._step.sampled_with, self._pages
        waiting = self._step.while_sampling + bytes_of(self._hidden)
        keywords = arrays | sizes
        return Program(
            name, engine_programs.prefill, given, waiting, keywords, runs=runs, cache=self._cache
        )

    def prefill(self) -> Program:
        """As many prompts as one call takes, each computed once for all of its samples."""
        s = self._step.settings
        width = next(b for b in self._config.buckets if b >= s.max_prompt_tokens)
        *_, arrays = self._calls(width, prefix=False)
        return self._prefill("prefill", arrays, -(-s.prompts_per_step // len(arrays["tokens"])))

    def recompute(self) -> Program:
        """The longest contexts, whose pages were taken for others: in no step that has enough."""
        *_, arrays = self._calls(self._config.buckets[-1], self._config.prefix_cache)
        return self._prefill("recompute", arrays, 0)

    def decode(self) -> Program:
        """A chunk of tokens in every slot, which look at as many pages as a sequence may have."""
        c, s = self._config, self._step.settings
        reads = reads_of(c, self._model.config, self._shape, self._programs.ragged)
        most = reads.each()[-1]
        slots = SlotRows(c.slots, c.stop_ids, c.logit_biases).slots([], c, self._shape, most)
        given = self._step.sampled_with, self._pages, self._hidden
        return Program(
            "decode",
            engine_programs.decode_chunk,
            (*given, laid_out(slots, self._whole)),
            self._step.while_sampling,
            dict(model=self._model, programs=self._programs),
            runs=-(-s.sequences // c.slots) * -(-s.sampling.max_new_tokens // c.chunk),
            loop_trips=c.chunk,
            cache=self._cache,
        )
