"""An objective and an advantage estimator called on shapes alone, for what they refuse."""

import jax
import jax.numpy as jnp

from dppo_jax.advantages import Estimator, estimate, inputs_of
from dppo_jax.critic import Critic, HeadCritic
from dppo_jax.records import EXACT, Batch, LossSum, Objective, Rollout, TokenStats
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
    rows, needs = PROMPTS * sampling.samples_per_prompt, objective.needs

    def step() -> LossSum:
        logp, ids = jnp.zeros((rows, COLUMNS)), jnp.zeros((rows, COLUMNS), jnp.int32)
        topk = jnp.zeros((rows, COLUMNS, sampling.top_k_capture))
        prompts = jnp.zeros((PROMPTS, 1), jnp.int32)
        mask = ids == 0
        values = None
        if critic is not None:
            values = logp if critic.outputs is None else jnp.zeros((*logp.shape, critic.outputs))
        rollout = Rollout(
            prompt_tokens=prompts,
            prompt_mask=prompts == 0,
            response_tokens=ids,
            response_mask=mask,
            logp_rollout=logp,
            topk_ids=topk.astype(jnp.int32),
            topk_logp_rollout=topk,
            entropy_rollout=logp,
            finish_reason=ids[:, 0],
        )
        rewards = jnp.zeros((PROMPTS, sampling.samples_per_prompt))
        found = estimate(advantage, inputs_of(rewards, rollout, None, values))
        old, exact, uniform = "logp_old" in needs, needs & EXACT, "uniform_logp" in needs
        batch = Batch(
            rollout,
            found.advantages,
            logp_old=logp if old else None,
            topk_logp_old=topk if old else None,
            logp_ref=logp if "logp_ref" in needs else None,
            uniform_logp_old=logp if uniform else None,
            values_old=values,
            returns=found.returns,
            objective_state=objective.initial_state,
        )
        stats = TokenStats(
            logp,
            topk,
            logp,
            exact_tv=logp if exact else None,
            exact_kl=logp if exact else None,
            uniform_logp=logp if uniform else None,
            values=values,
            last_layer=jnp.zeros((*logp.shape, 3)) if "last_layer" in needs else None,
        )
        return objective.loss(stats, batch)

    jax.eval_shape(step)
