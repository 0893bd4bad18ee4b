"""The programs that a recipe runs in one step, with abstract arguments laid out on a mesh.

They are those of `train`: weight sync (the rollout policy's choice), prefill, decode, scoring and
update, by the same functions. Nothing here is computed and no weights are read.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dppo_jax import packing
from dppo_jax.advantages import Estimator
from dppo_jax.ahead import check_ahead
from dppo_jax.batches import RewardPenalty, make_batch_of, needs_of
from dppo_jax.critic import ValueHead, ValueModel
from dppo_jax.initial_policy import InitialPolicy
from dppo_jax.kernels.single_pass import chunk_tokens
from dppo_jax.lora_run import network_of
from dppo_jax.models.decoder import DecoderConfig
from dppo_jax.models.lora import LoraConfig, LoraModel
from dppo_jax.plan.abstract import bytes_of, laid_out
from dppo_jax.preflight import check_layout, check_routing
from dppo_jax.records import Objective, Prompts, Rollout, TrainState
from dppo_jax.rollout_policy import RolloutPolicy, chained, stale
from dppo_jax.sampling import generate
from dppo_jax.sampling.rollouts import MakeRollouts
from dppo_jax.sharding import MeshConfig, batch_sharding, shardings_of, spec_of
from dppo_jax.update import PackedUpdate, make_update


@dataclass(frozen=True)
class Settings:
    """What of a recipe decides its programs; names as in `train`."""

    model: DecoderConfig
    sampling: generate.SamplingConfig
    objective: Objective
    optimizer: optax.GradientTransformation
    mesh: MeshConfig
    rollouts: MakeRollouts
    rollout_policy: RolloutPolicy
    advantage: Estimator
    reward_penalty: RewardPenalty | None
    reference: InitialPolicy | None
    critic: ValueHead | ValueModel | None
    lora: LoraConfig | None
    routing: str
    async_depth: int
    sampler_devices: int
    steps: int
    prompts_per_step: int
    max_prompt_tokens: int
    minibatches: int
    microbatches: int
    tokens_per_microbatch: int | None
    rollout_batches: int
    exact_divergence_every: int

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @property
    def sequences(self) -> int:
        return self.prompts_per_step * self.sampling.samples_per_prompt

    @property
    def tokens_a_step(self) -> int:
        """Response tokens, none of them ended early."""
        return self.sequences * self.sampling.max_new_tokens


@dataclass(frozen=True)
class Program:
    """One program of a step."""

    name: str
    function: Any  # jitted
    arguments: tuple[Any, ...]
    resident: float  # bytes a device of what lives through it and is none of its arguments
    keywords: Mapping[str, Any] = field(default_factory=dict)
    runs: int = 1  # a step
    loop_trips: int = 1  # at the most, of a loop whose length depends on data
    outer_trips: int | None = None  # of such a loop around another one
    cache: float = 0.0  # bytes a device of keys and values, among its temporaries


class Step:
    """A training step of `settings` on `mesh`: its arrays, and its programs one by one.

    ValueError where the sizes do not fit the mesh.
    """

    def __init__(self, settings: Settings, mesh: Mesh):
        s = settings
        # No tokenizer is read; that a response may end is what the decoding loop depends on.
        check_routing(s.model, s.routing)
        check_ahead(s.async_depth, None, s.rollout_batches, None, s.rollout_policy)
        policy = s.rollout_policy
        if s.async_depth:
            policy = chained([stale(s.async_depth), policy])
        sampling = dataclasses.replace(
            s.sampling,
            end_ids=s.sampling.end_ids or (0,),
            record_experts=s.routing == "replay",
        )
        s = dataclasses.replace(s, sampling=sampling, rollout_policy=policy)
        self.settings, self.mesh = s, mesh
        check_layout(
            s.model, sampling, mesh, s.steps, s.prompts_per_step, s.minibatches, s.microbatches,
            s.max_prompt_tokens, s.rollout_batches,
        )  # fmt: skip
        self.model = network_of(s.model, s.lora)
        self.critic = None if s.critic is None else s.critic.build(s.model)
        self.needs = needs_of(s.objective, s.advantage, s.reward_penalty)
        self.exact = "exact_divergence" in s.objective.needs
        self.exact_old = "exact_divergence_old" in s.objective.needs
        self._whole, self._rows = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
        self._key = laid_out(jax.eval_shape(jax.random.key, 0), self._whole)
        whole = self._parameters(self.model.abstract_params, self.model.logical_axes)
        # What a gradient step changes, and what stays as it is where only adapters change.
        self.params, self.base = whole, None
        if isinstance(self.model, LoraModel):
            adapters = self.model.abstract_adapters, self.model.adapter_axes
            self.params, self.base = self._parameters(*adapters), whole
        self.policy = self.model.policy(self.params, self.base)
        self.state = self._state()
        self.sampled_with = self._sampled_with()
        # The frozen parameters that KL terms are measured from, and what they take beside the base.
        self.reference = whole if "logp_ref" in self.needs else None
        shared = self.base is not None and s.reference is None
        self._referred = 0.0 if shared else bytes_of(self.reference)

    def _array(self, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _parameters(self, abstract: Any, logical_axes: Any) -> Any:
        return laid_out(abstract, shardings_of(logical_axes, self.mesh))

    def _state_of(self, params: Any, optimizer: Any, **more: Any) -> TrainState:
        opt_state = optax.tree.map_params(
            optimizer,
            lambda leaf, param: self._array(leaf.shape, leaf.dtype, param.sharding),
            jax.eval_shape(optimizer.init, params),
            params,
            transform_non_params=lambda leaf: self._array(leaf.shape, leaf.dtype, self._whole),
        )
        return TrainState(params, opt_state, self._array((), jnp.int32, self._whole), **more)

    def _state(self) -> TrainState:
        s = self.settings
        remembered = jax.eval_shape(s.rollout_policy.init, self.policy)
        if jax.tree.leaves(remembered):  # as the compiler lays it out
            compiled = jax.jit(s.rollout_policy.init).lower(self.policy).compile()
            remembered = laid_out(remembered, compiled.output_shardings)
        carried = jax.eval_shape(lambda: jax.tree.map(jnp.array, s.objective.initial_state))
        critic: Any = ()
        if s.critic is not None and self.critic is not None:
            values = jax.eval_shape(self.critic.init, self._key, self.base or self.params)
            values = self._parameters(values, self.critic.logical_axes)
            critic = self._state_of(values, s.critic.optimizer)
        return self._state_of(
            self.params,
            s.optimizer,
            objective_state=laid_out(carried, self._whole),
            rollout_memory=remembered,
            token_counts=self._array((3, s.model.vocab_size), jnp.int32, self._whole),
            critic=critic,
        )

    def _choice(self) -> tuple[Any, ...]:
        step = self._array((), jnp.int32, self._whole)
        return self.state.rollout_memory, self.policy, step, self._key

    def _sampled_with(self) -> Any:
        """The parameters to sample with: laid out as the trainer's where they have their form."""
        chosen, _ = jax.eval_shape(self.settings.rollout_policy.choose, *self._choice())
        shapes = [jax.tree.map(lambda leaf: leaf.shape, params) for params in (chosen, self.policy)]
        if shapes[0] == shapes[1]:
            return jax.tree.map(
                lambda leaf, param: self._array(leaf.shape, leaf.dtype, param.sharding),
                chosen,
                self.policy,
            )
        compiled = jax.jit(self.settings.rollout_policy.choose).lower(*self._choice()).compile()
        return laid_out(chosen, compiled.output_shardings[0])

    def _rollout(self) -> Rollout:
        """The rollout of a step, with all that the sampler records."""
        sampling = self.settings.sampling
        rollout = jax.eval_shape(
            lambda *arrays: generate.generate(self.model, *arrays, settings=sampling),
            *self._asked(self.settings.prompts_per_step)[1:],
        )
        return laid_out(rollout, self._rows)

    @property
    def _kept(self) -> float:
        """Bytes a device of the copies of parameters that exact divergences are from."""
        copied = self.exact or self.settings.exact_divergence_every > 0
        sampled = bytes_of(self.sampled_with) - bytes_of(self.base) if copied else 0.0
        return sampled + (bytes_of(self.params) if self.exact_old else 0.0)

    @property
    def handed_on(self) -> list[int | None]:
        """Of each array to sample with: which one of the policy's it is, where it is no copy."""
        jaxpr = jax.make_jaxpr(self.settings.rollout_policy.choose)(*self._choice()).jaxpr
        first = len(jax.tree.leaves(self.state.rollout_memory))
        given = {id(each): place - first for place, each in enumerate(jaxpr.invars)}
        chosen = jaxpr.outvars[: len(jax.tree.leaves(self.sampled_with))]
        return [given.get(id(each)) for each in chosen]  # see `rollout_policy.chooser`

    @property
    def trained(self) -> float:
        """Bytes a device of what lives from step to step."""
        return bytes_of(self.state) + bytes_of(self.base) + self._referred

    @property
    def ahead(self) -> float:
        """Bytes a device of rollouts that have been drawn for later steps."""
        return self.settings.async_depth * bytes_of(self._rollout())

    @property
    def while_sampling(self) -> float:
        """Bytes a device of what waits while responses are drawn."""
        policy = jax.tree.leaves(self.policy)
        own = bytes_of([policy[place] for place in self.handed_on if place is not None])
        return self.trained - own + self._kept + bytes_of(self._rollout()) + self.ahead

    def weight_sync(self) -> Program:
        """From the trainer's parameters to those to sample with."""
        given = self._choice()
        waiting = self.trained - bytes_of(given[:2]) + self.ahead
        choose = jax.jit(self.settings.rollout_policy.choose, donate_argnums=0)
        return Program("weight sync", choose, given, waiting)

    @property
    def _at_once(self) -> int:
        return self.settings.prompts_per_step // self.settings.rollout_batches

    def _asked(self, prompts_at_once: int) -> tuple[Any, ...]:
        rows = (prompts_at_once, self.settings.max_prompt_tokens)
        prompts = Prompts(
            self._array(rows, jnp.int32, self._rows), self._array(rows, jnp.bool_, self._rows)
        )
        return self.model, self.sampled_with, prompts, self._key

    def prefill(self) -> Program:
        """The prompts that are sampled at once, and the first token of every sample."""
        return Program(
            "prefill",
            generate.prefill,
            self._asked(self._at_once),
            self.while_sampling,
            {"settings": self.settings.sampling},
            runs=self.settings.rollout_batches,
        )

    def decode(self) -> Program:
        """The rest of every sample, all of it with the cache at its largest."""
        sampling, given = self.settings.sampling, self._asked(self._at_once)
        length = sampling.max_new_tokens
        progress = jax.eval_shape(
            lambda *arrays: generate.prefill(self.model, *arrays, settings=sampling), *given[1:]
        )

        def spread(leaf, *axes):
            spec = spec_of(axes, self.mesh, "decode", leaf.shape)
            return self._array(leaf.shape, leaf.dtype, NamedSharding(self.mesh, spec))

        def with_room(cache, columns):
            def grown(leaf):
                shape = (*leaf.shape[:2], columns, *leaf.shape[3:])
                return spread(jax.ShapeDtypeStruct(shape, leaf.dtype), "batch", "kv_heads")

            own = {name: grown(getattr(cache, name)) for name in ("response_k", "response_v")}
            asked = {
                name: spread(getattr(cache, name), "batch", "kv_heads")
                for name in ("prompt_k", "prompt_v")
            }
            return cache._replace(**own, **asked)

        sizes = [0, *generate.stages(length)]
        full = [with_room(cache, sizes[-1]) for cache in progress.caches]
        progress = progress._replace(
            step=laid_out(progress.step, self._whole),
            caches=[with_room(cache, sizes[-2]) for cache in progress.caches],
            active=spread(progress.active, "batch"),
            record=jax.tree.map(lambda leaf: spread(leaf, None, "batch"), progress.record),
            mask=spread(progress.mask, None, "batch"),
        )
        if progress.experts is not None:
            asked, answered = progress.experts.prompt, progress.experts.response
            experts = type(progress.experts)(
                spread(asked, "batch"), spread(answered, None, "batch")
            )
            progress = progress._replace(experts=experts)
        return Program(
            "decode",
            generate.last_stage,
            (*given, progress),
            self.while_sampling,
            {"settings": sampling},
            runs=self.settings.rollout_batches,
            loop_trips=max(1, length - 1),
            cache=bytes_of(full),
        )

    def _batch_of(self) -> tuple[Any, tuple[Any, ...]]:
        s = self.settings
        function = make_batch_of(
            self.model,
            s.objective,
            s.advantage,
            s.reward_penalty,
            self.critic,
            temperature=s.sampling.temperature,
            replay_own_routing=s.routing == "replay_trainer",
        )
        shape = (s.prompts_per_step, s.sampling.samples_per_prompt)
        rewards = self._array(shape, jnp.float32, self._rows)
        return function, (self.state, self.reference, self._rollout(), rewards, self.base)

    def scoring(self) -> Program:
        """From the rollout and its rewards to the batch, the whole step's at once."""
        function, given = self._batch_of()
        twice = self._referred - bytes_of(self.reference)  # a base that is the reference
        return Program("scoring", jax.jit(function), given, self._kept + twice + self.ahead)

    def update(self) -> Program:
        """One gradient step."""
        s = self.settings
        function = make_update(
            self.model,
            s.objective,
            s.optimizer,
            self.critic,
            temperature=s.sampling.temperature,
            microbatches=s.microbatches,
            tokens_per_microbatch=s.tokens_per_microbatch,
        )
        batch_of, given = self._batch_of()
        batch, _ = jax.eval_shape(batch_of, *given)

        def part(leaf):
            shape = (leaf.shape[0] // s.minibatches, *leaf.shape[1:])
            return self._array(shape, leaf.dtype, self._rows)

        whole, minibatch = laid_out(batch, self._rows), jax.tree.map(part, batch)
        anchor = self.policy if self.exact_old else self.sampled_with if self.exact else None
        arguments = [self.state, minibatch, anchor, self.base]
        tokens, microbatches = math.prod(minibatch.rollout.response_tokens.shape), s.microbatches
        if isinstance(function, PackedUpdate):
            function, (plan, tokens) = function.program, self._packed(minibatch.rollout)
            microbatches = len(plan.sequences)
            arguments.append(laid_out(jax.eval_shape(lambda: plan), self._whole))
        split = spec_of(("tokens",), self.mesh, "compute")
        local = NamedSharding(self.mesh, split).shard_shape((tokens // microbatches,))[0]
        waiting = bytes_of(whole) + self._referred + self.ahead
        return Program(
            "update",
            function,
            tuple(arguments),
            waiting + (0.0 if self.exact or self.exact_old else self._kept),
            runs=s.minibatches,
            # Chunks of the head's single pass, as many as there are when no token is left out.
            loop_trips=-(-local // chunk_tokens(local)),
            outer_trips=None if s.tokens_per_microbatch is None else microbatches,
        )

    def _packed(self, rollout: Rollout) -> tuple[packing.Plan, int]:
        """Where the sequences of a gradient step go if none ends early, and how many cells."""
        with jax.set_mesh(self.mesh):
            budget = packing.budget_of(self.settings.tokens_per_microbatch or 0, rollout)
        longest = np.full(len(rollout.response_tokens), budget.columns)
        plan = packing.plan(longest, budget)
        return plan, len(plan.sequences) * budget.rows * budget.columns
