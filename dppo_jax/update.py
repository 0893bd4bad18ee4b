"""One gradient step, the one jitted training function: microbatch scan, clip, optimizer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from dppo_jax import packing
from dppo_jax.accumulate import accumulate, accumulate_packed
from dppo_jax.critic import Critic, HeadCritic
from dppo_jax.models.decoder import Decoder, Model, Params
from dppo_jax.parts import microbatch, over_microbatches, over_packed
from dppo_jax.records import (
    EXACT,
    Batch,
    Counts,
    LossSum,
    Mean,
    Metrics,
    Objective,
    Rollout,
    TokenStats,
    TrainState,
    fold_metrics,
)
from dppo_jax.scoring import (
    kept_sizes,
    last_layer,
    loss_and_score,
    mismatch,
    score,
    score_and_routing,
    tightness,
)
from dppo_jax.sharding import constrain
from dppo_jax.slopes import along, check_packing, slopes_of

# (state, batch), the parameters that exact divergences are from where the objective needs those
# (else None), and with LoRA the base's
Update = Callable[..., tuple[TrainState, Metrics]]


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    objective_state: Any = (),
    rollout_memory: Any = (),
) -> TrainState:
    """Optimizer state for these parameters, sharded as they are, at gradient step 0.

    `objective_state` is an objective's `initial_state`; it is copied, since updates donate theirs.
    Zeros depend on no parameter: unless told, XLA would put all of them on every device.
    """
    shardings = optax.tree.map_params(
        optimizer,
        lambda _, param: param.sharding if param.committed else None,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda _: None,
    )
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    # Of a firm type, as what `next_state` makes of it: else the second step compiles anew.
    carried = jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x)), objective_state)
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), carried, rollout_memory)


def gradient_step(
    state: TrainState,
    loss_of: Callable[[Params, Any], LossSum],
    rows: Any,
    optimizer: optax.GradientTransformation,
    microbatches: int,
) -> tuple[TrainState, Metrics]:
    """Applies the optimizer to the gradient of `loss_of` over `rows`, in microbatches."""
    grads, total = accumulate(loss_of, state.params, rows, microbatches)
    stepped, norms = apply_gradient(state, grads, optimizer, "update")
    return stepped, total.metrics | _total(total) | norms


def apply_gradient(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation, name: str
) -> tuple[TrainState, Metrics]:
    """One step of the optimizer; `name`/gradient_norm is before its clipping."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    one = jnp.float32(1)
    norms: Metrics = {
        f"{name}/gradient_norm": Mean(optax.tree.norm(grads), one),
        f"{name}/step_norm": Mean(optax.tree.norm(updates), one),
    }
    stepped = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)
    return stepped, norms


def _total(total: LossSum) -> Metrics:
    return {"loss/total": Mean(total.loss_sum, total.weight_sum)}


def make_update(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    critic: Critic | HeadCritic | None = None,
    *,
    temperature: float,
    microbatches: int = 1,
    tokens_per_microbatch: int | None = None,
) -> Update:
    """The jitted (state, batch) -> (state, metrics); the given state's buffers are reused.

    A critic takes its step beside the policy's, with an optimizer of its own, by the same loss.
    An objective that needs "exact_divergence" takes the parameters that sampled as a third
    argument, or with "exact_divergence_old" those before the step: a copy, where they are the
    state's own.
    `mismatch/*` compares the scored policy with the sampler's: numerical mismatch alone on the
    first step after a rollout, with the policy's movement on top in later ones.
    With LoRA the state's parameters are the adapters; the base, a fourth argument, is not donated.
    `DecoderConfig.load_balancing` adds so much of each microbatch's `moe/aux_loss` to the loss.
    With `tokens_per_microbatch` the sequences are packed into rows of that many tokens in all, a
    prompt beside each of its responses, and there are as many microbatches as they need.
    An objective with `statistics` of the whole minibatch costs one more forward pass where that
    comes in several microbatches, as does one that compares a prompt's samples where these are
    packed: its loss and slopes are then the whole's, and each part follows its tokens' slopes.
    """
    if tokens_per_microbatch is not None:
        check_packing(objective, critic, microbatches)

    # What else an objective may need is not among the terms that the single pass hands out.
    plain = objective.next_state is None and objective.needs <= {"logp_old", "logp_ref"}
    token_local = objective.token_local if plain else None

    exact = bool(objective.needs & EXACT)
    dropout, balance = model.dropout, model.config.load_balancing
    # Is a microbatch's loss the sum of its prompts'? Not with experts' loads, or one dropout of it.
    by_prompt = objective.scope != "batch" or objective.statistics is not None
    apart = by_prompt and not (model.config.experts or dropout)

    def update(
        state: TrainState,
        batch: Batch,
        rollout_params: Params | None = None,
        base: Params | None = None,
        of: packing.Plan | None = None,
    ) -> tuple[TrainState, Metrics]:
        if exact != (rollout_params is not None):
            raise ValueError(
                'an anchor\'s parameters go with an objective that needs "exact_divergence", and '
                "with no other"
            )
        counted = isinstance(state.token_counts, jax.Array)

        def with_state(batch: Batch, carried: Any) -> Batch:
            size = model.config.vocab_size if counted else None
            return dataclasses.replace(batch, objective_state=carried, vocab_size=size)

        def policy_of(adapted: Params, base: Params | None, seeds: Any) -> Params:
            return model.policy(adapted, base, jax.random.key(seeds[0]) if dropout else None)

        def scored_before(rows: tuple[Batch, Any, Any]) -> TokenStats | None:
            """The whole minibatch, scored without a gradient, where a part tells too little."""
            split = of is not None or (objective.statistics is not None and microbatches > 1)
            if not split or (objective.statistics is None and objective.scope != "prompt"):
                return None

            def of_part(part: tuple[Batch, Any, Any]) -> dict[str, Array]:
                params = policy_of(state.params, base, part[1])
                stats = score(model, params, part[0].rollout, temperature=temperature)
                return {name: getattr(stats, name) for name in ("logp", "topk_logp", "entropy")}

            if of is None:
                found = over_microbatches(of_part, rows, microbatches)
            else:
                budget = packing.budget_of(tokens_per_microbatch or 0, batch.rollout)
                sequences = len(batch.rollout.response_tokens)
                found = over_packed(of_part, rows, of, budget, sequences)
            return TokenStats(**found)

        def loss_of(
            trained: tuple[Params, Any],
            part: tuple[Batch, Any, Any],
            carried: Any,
            statistics: Any,
            rollout_params: Params | None,
            base: Params | None,
        ) -> LossSum:
            (adapted, value_params), (rows, seeds, slopes) = trained, part
            params = policy_of(adapted, base, seeds)
            rows = dataclasses.replace(with_state(rows, carried), statistics=statistics)
            if token_local is not None:
                loss_sum, stats, routing = loss_and_score(
                    model, params, rows, token_local, temperature=temperature
                )
                out = objective.loss(stats, rows)._replace(loss_sum=loss_sum)
            else:

                def also(decoder: Decoder, states: Array, rollout: Rollout) -> dict[str, Array]:
                    fields = {}
                    if critic is not None:
                        fields["values"] = critic.values(value_params, rollout, states)
                    if "last_layer" in objective.needs:
                        curvature = last_layer(decoder, states, temperature)
                        fields["last_layer"] = packing.back(curvature, rollout)
                    return fields

                stats, routing = score_and_routing(
                    model,
                    params,
                    rows.rollout,
                    temperature=temperature,
                    rollout_params=rollout_params,
                    also=also,
                )
                out = (
                    along(slopes, stats, rows, objective) if slopes else objective.loss(stats, rows)
                )
            if balance:
                term = balance * routing["moe/aux_loss"].sum  # type: ignore[union-attr]
                out = out._replace(loss_sum=out.loss_sum + term * out.weight_sum)
            more = mismatch(stats, rows.rollout) | kept_sizes(rows.rollout) | routing
            return out._replace(metrics=out.metrics | more | packing.padding(rows.rollout))

        trained = (state.params, () if critic is None else state.critic.params)
        # A seed for each prompt, so that every microbatch drops out units of its own.
        drawn = jax.random.key(state.step), (len(batch.rollout.prompt_tokens),)
        rows: tuple[Batch, Any, Any]
        rows = batch, jax.random.bits(*drawn) if dropout else (), ()
        scored, statistics, whole = scored_before(rows), None, None
        if scored is not None and objective.statistics is not None:
            statistics = objective.statistics(scored, batch)
        elif scored is not None:
            whole, slopes = slopes_of(objective, scored, with_state(batch, state.objective_state))
            rows = *rows[:2], slopes
        fixed = state.objective_state, statistics, rollout_params, base
        if of is None:
            (grads, value_grads), total = accumulate(
                loss_of, trained, rows, microbatches, fixed, apart=apart
            )
        else:
            budget = packing.budget_of(tokens_per_microbatch or 0, batch.rollout)
            (grads, value_grads), total = accumulate_packed(
                loss_of, trained, rows, of, budget, fixed
            )
        if whole is not None:
            total = total._replace(
                loss_sum=total.loss_sum + whole.loss_sum, metrics=total.metrics | whole.metrics
            )
        after, norms = apply_gradient(state, grads, optimizer, "update")
        metrics = total.metrics | _total(total) | norms
        if critic is not None:
            valued, norms = apply_gradient(state.critic, value_grads, critic.optimizer, "critic")
            after, metrics = dataclasses.replace(after, critic=valued), metrics | norms
        for name, metric in list(metrics.items()):
            if isinstance(metric, Counts):
                del metrics[name]
                counts = constrain(state.token_counts + metric.value, None, None)
                after = dataclasses.replace(after, token_counts=counts)
        if objective.next_state is not None:
            carried = objective.next_state(state.objective_state, metrics)
            after = dataclasses.replace(after, objective_state=carried)
        return after, metrics

    jitted = jax.jit(update, donate_argnums=0)
    if tokens_per_microbatch is None:
        return jitted

    return PackedUpdate(jitted, tokens_per_microbatch)


@dataclasses.dataclass(frozen=True)
class PackedUpdate:
    """An update that plans its microbatches on the host; `program`, jitted, takes the plan too."""

    program: Any
    tokens_per_microbatch: int

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        rollout_params: Params | None = None,
        base: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        budget = packing.budget_of(self.tokens_per_microbatch, batch.rollout)
        of = packing.plan_of(batch.rollout, budget)
        return self.program(state, batch, rollout_params, base, of)


def make_tightness(
    model: Model, temperature: float, *, parts: int
) -> Callable[[Params, Params, Rollout], Metrics]:
    """The jitted `scoring.tightness` of (rollout_params, params, rollout), in `parts` parts."""

    def measure(rollout_params: Params, params: Params, rollout: Rollout) -> Metrics:
        def part(index):
            rows = microbatch(rollout, index, parts)
            return tightness(model, rollout_params, params, rows, temperature=temperature)

        return fold_metrics(jax.lax.map(part, jnp.arange(parts)))

    return jax.jit(measure)


@jax.jit
def take_prompts(batch: Batch, chosen: Int[Array, " N"]) -> Batch:
    """The minibatch of these prompts with all of their samples, in this order."""
    prompts = len(batch.rollout.prompt_tokens)

    def take(leaf):
        groups = leaf.reshape(prompts, len(leaf) // prompts, *leaf.shape[1:])
        return constrain(groups[chosen].reshape(-1, *leaf.shape[1:]), "batch")

    return jax.tree.map(take, batch)
