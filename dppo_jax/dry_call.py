"""An objective and an advantage estimator called on shapes alone, for what they refuse."""

from typing import Any

import jax
import jax.numpy as jnp

from dppo_jax.advantages import Estimator, estimate, inputs_of
from dppo_jax.critic import Critic, HeadCritic
from dppo_jax.records import EXACT, Batch, Objective, Rollout, TokenStats
from dppo_jax.sampling.generate import SamplingConfig

PROMPTS, COLUMNS = 2, 3


def dry_call(
    objective: Objective,
    advantage: Estimator,
    critic: Critic | HeadCritic | None,
    sampling: SamplingConfig,
) -> None:
    """Traces both as a step would, with what they declare that they need and no more.

    Raises what they raise: samples that are too few, a critic of another size, an estimator that
    gives another shape. Nothing is compiled or computed.
    """
    rows, stored = PROMPTS * sampling.samples_per_prompt, sampling.top_k_capture

    def of(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens, ids = of(rows, COLUMNS), of(rows, COLUMNS, dtype=jnp.int32)
    outputs = () if critic is None or critic.outputs is None else (critic.outputs,)
    rollout = Rollout(
        prompt_tokens=of(PROMPTS, 1, dtype=jnp.int32),
        prompt_mask=of(PROMPTS, 1, dtype=jnp.bool_),
        response_tokens=ids,
        response_mask=of(rows, COLUMNS, dtype=jnp.bool_),
        logp_rollout=tokens,
        topk_ids=of(rows, COLUMNS, stored, dtype=jnp.int32),
        topk_logp_rollout=of(rows, COLUMNS, stored),
        entropy_rollout=tokens,
        finish_reason=of(rows, dtype=jnp.int32),
    )

    def step(rollout: Rollout, rewards: Any, values: Any, last_layer: Any) -> Any:
        def where(need: bool, value: Any) -> Any:
            return value if need else None

        needs, logp, topk = objective.needs, rollout.logp_rollout, rollout.topk_logp_rollout
        found = estimate(advantage, inputs_of(rewards, rollout, None, values))
        batch = Batch(
            rollout,
            found.advantages,
            logp_old=where("logp_old" in needs, logp),
            topk_logp_old=where("logp_old" in needs, topk),
            logp_ref=where("logp_ref" in needs, logp),
            uniform_logp_old=where("uniform_logp" in needs, logp),
            values_old=values,
            returns=found.returns,
            objective_state=objective.initial_state,
        )
        stats = TokenStats(
            logp,
            topk,
            logp,
            exact_tv=where(bool(needs & EXACT), logp),
            exact_kl=where(bool(needs & EXACT), logp),
            uniform_logp=where("uniform_logp" in needs, logp),
            values=values,
            last_layer=where("last_layer" in needs, last_layer),
        )
        return objective.loss(stats, batch)

    rewards, values = of(PROMPTS, sampling.samples_per_prompt), of(rows, COLUMNS, *outputs)
    jax.eval_shape(step, rollout, rewards, None if critic is None else values, of(rows, COLUMNS, 3))
