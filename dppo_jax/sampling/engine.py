"""The rollout engine: generation that keeps the chip full.

`engine = Engine(model, EngineConfig(...))`, then `engine.generate(params, prompts, sampling)`.
Underneath: `submit` requests, `advance` by a chunk of tokens and read its events,
`take_unfinished` and `resume` samples that are not done. A fixed number of slots decodes; whoever
waits gets the slot of who ends, at the next chunk. Keys and values lie in pages, which sequences
share where they agree.
"""

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from dppo_jax.models.decoder import Model, Params
from dppo_jax.sampling.engine_config import EngineConfig, Stats, why_not
from dppo_jax.sampling.engine_device import EngineDevice
from dppo_jax.sampling.requests import Completion, SamplingParams
from dppo_jax.sampling.scheduler import Scheduler
from dppo_jax.sampling.sequences import (
    Detokenize,
    Event,
    Request,
    Sample,
    Tokens,
    Unfinished,
    no_tokens,
    refusal,
    token_ids,
)

Prompt = Sequence[int] | np.ndarray  # token ids

__all__ = ["Engine", "EngineConfig", "Event", "Unfinished"]


@dataclass
class Engine:
    """Draws samples of prompts from `model` with parameters that may change between calls.

    `detokenize` makes text of token ids, for stop strings. With a `mesh` (`sharding.MeshConfig`)
    slots and pages are split over its data axes, heads over tensor.
    """

    model: Model
    config: EngineConfig = field(default_factory=EngineConfig)
    mesh: jax.sharding.Mesh | None = None
    detokenize: Detokenize | None = None

    def __post_init__(self):
        c = self.config
        if c.top_k_capture > self.model.config.vocab_size:
            raise ValueError(
                f"top_k_capture={c.top_k_capture} is more than the model's vocabulary of "
                f"{self.model.config.vocab_size}: set a smaller K"
            )
        routed = 0, 0
        if c.record_experts:
            if not self.model.config.experts:
                raise ValueError("this model has no experts: set record_experts to False")
            routed = self.model.config.layers, self.model.config.experts_per_token
        self._nothing = no_tokens(c.top_k_capture, routed)
        self.stats = Stats()
        self._device = EngineDevice(self.model, c, self.mesh)
        self._scheduler = Scheduler(
            self._device.shards,
            c.slots // self._device.shards,
            self._device.shape.pages,
            c.page_size,
            c.chunk,
            prefix_cache=c.prefix_cache,
            continuous=c.continuous,
        )
        self._refused: list[Event] = []
        self._version = 0
        self._leaves: list[weakref.ref] = []  # of the parameters at the last call
        self._requests = 0

    def submit(self, prompt: Prompt, sampling: SamplingParams) -> int:
        """Queues a prompt's n samples and gives the request's number.

        A request that can never be served is refused: its samples' completions, in the next
        events, say why in one line.
        """
        request = self._request(prompt, sampling)
        if reason := self._why_not(request):
            self._refused += [
                refusal(request.id, index, self._nothing, reason) for index in range(sampling.n)
            ]
            return request.id
        now = time.monotonic()
        self._scheduler.queue.extend(
            Sample(request, index, [self._nothing], now) for index in range(sampling.n)
        )
        return request.id

    def resume(self, unfinished: Unfinished) -> int:
        """Queues a sample that was taken out; the new request's number.

        It goes on as if it had stayed, with the parameters of now: its tokens keep the versions
        that drew them, and are not told again by events. Raises ValueError where it does not fit.
        """
        request = self._request(unfinished.prompt, unfinished.sampling)
        kept, spent = unfinished.so_far, unfinished.timings
        if kept.topk_ids.shape[1] != self.config.top_k_capture:
            raise ValueError(
                f"the sample was drawn with top_k_capture={kept.topk_ids.shape[1]}, this engine "
                f"has {self.config.top_k_capture}: use one for both"
            )
        if kept.experts.shape[1:] != self._nothing.experts.shape[1:]:
            raise ValueError("record_experts is not as when the sample was drawn: use one for both")
        if reason := self._why_not(request):
            raise ValueError(reason)
        sample = Sample(
            request, unfinished.sample, [kept], time.monotonic(), unfinished.prompt_experts
        )
        sample.queue_seconds = spent.queue
        sample.prefill_seconds, sample.decode_seconds = spent.prefill, spent.decode
        self._scheduler.queue.append(sample)
        return request.id

    @property
    def pending(self) -> int:
        """Samples that are queued or in a slot, and refusals that no event has told."""
        return len(self._scheduler.queue) + len(self._scheduler.running) + len(self._refused)

    def take_unfinished(self, request: int | None = None) -> list[Unfinished]:
        """Takes out all samples, or one request's, that have not ended."""
        return [
            Unfinished(
                s.request.id,
                s.index,
                s.request.prompt,
                s.request.sampling,
                s.so_far(),
                s.timings,
                s.prompt_experts,
            )
            for s in self._scheduler.remove(request)
        ]

    def generate(
        self,
        params: Params,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams],
        *,
        policy_version: int = 0,
    ) -> list[list[Completion]]:
        """All samples of each prompt, in order; refused ones hold an error and no tokens.

        Raises ValueError where requests are pending, or prompts and sampling differ in number.
        """
        if self.pending:
            raise ValueError("requests are pending: advance until there are none, or take them out")
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, {len(each)} sampling parameters")
        done: dict[tuple[int, int], Completion] = {}
        try:
            ids = [self.submit(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
            while self.pending:
                for event in self.advance(params, policy_version=policy_version):
                    if event.completion is not None:
                        done[event.request, event.sample] = event.completion
        except BaseException:
            self.take_unfinished()
            raise
        return [
            [done[request, index] for index in range(one.n)]
            for request, one in zip(ids, each, strict=True)
        ]

    def advance(self, params: Params, *, policy_version: int = 0) -> list[Event]:
        """Draws up to `chunk` tokens in every slot; what that brought, a sample at a time.

        With other parameters, or another version of them, than at the last call, contexts are
        computed again before the next token is drawn.
        """
        self._notice(params, policy_version)
        scheduler, stats = self._scheduler, self.stats
        events, self._refused = self._refused, []
        for round_ in scheduler.rounds():
            self._device.do(params, round_)
            stats.prefill_tokens += sum(len(job.tokens) for job in round_.prefills)
        scheduler.grow()
        held = sum(shard.pages.held for shard in scheduler.shards)
        stats.pages_held_most = max(stats.pages_held_most, held)
        if scheduler.running:
            events += self._decode(params, policy_version)
        stats.preemptions, stats.cached_tokens = scheduler.preemptions, scheduler.cached_tokens
        self._count_compilations()
        return events

    def warm_up(self, params: Params) -> None:
        """Compiles every program, so that nothing is compiled while requests run.

        But for repetition penalties: the first chunk that has one compiles.
        """
        self._notice(params, self._version)
        self._device.warm_up(params)
        self._count_compilations()

    def _count_compilations(self) -> None:
        self.stats.compilations = self._device.compilations
        self.stats.compile_seconds = self._device.compile_seconds

    def _request(self, prompt: Prompt, sampling: SamplingParams) -> Request:
        self._requests += 1
        return Request(self._requests, token_ids(prompt), sampling)

    def _why_not(self, request: Request) -> str | None:
        if request.sampling.stop_strings and self.detokenize is None:
            return "stop_strings need an engine that is given detokenize"
        pages = self._scheduler.shards[0].pages.count
        return why_not(request, self.config, self.model.config.vocab_size, pages)

    def _notice(self, params: Params, policy_version: int) -> None:
        """What was computed with other parameters is of no use any more."""
        leaves = jax.tree.leaves(params)
        same = policy_version == self._version and len(leaves) == len(self._leaves)
        if not same or any(r() is not leaf for r, leaf in zip(self._leaves, leaves, strict=True)):
            self._scheduler.restart()
            self._device.use(params)
        self._version, self._leaves = policy_version, [weakref.ref(leaf) for leaf in leaves]

    def _decode(self, params: Params, policy_version: int) -> list[Event]:
        began, running = time.monotonic(), self._scheduler.running
        chunk = self._device.decode(params, running)
        seconds = time.monotonic() - began
        nobody = np.zeros((*chunk.drawn.token.shape, 0, 0), np.int8)
        experts = nobody if chunk.experts is None else chunk.experts
        self.stats.chunks += 1
        self.stats.slot_steps += self.config.slots // len(chunk.steps) * int(chunk.steps.sum())
        events = []
        for sample in running:
            at = sample.slot
            count, drawn = int(chunk.counts[at]), chunk.drawn
            self.stats.drawn_tokens += count

            def column(leaf, at=at, count=count) -> np.ndarray:
                return np.array(leaf[at, :count])

            new = Tokens(
                tokens=column(drawn.token),
                logp=column(drawn.logp),
                topk_ids=column(drawn.topk_ids),
                topk_logp=column(drawn.topk_logp),
                entropy=column(drawn.entropy),
                policy_version=np.full(count, policy_version, np.int32),
                kept_count=column(drawn.kept_count),
                experts=column(experts),
            )
            sample.decode_seconds += seconds
            sample.length += count
            event = sample.take(new, bool(chunk.stopped[at]), self.detokenize)
            events.append(event)
            if event.completion is not None:
                self._scheduler.release(sample)
        return events
