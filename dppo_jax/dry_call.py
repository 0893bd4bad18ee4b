"""An objective and an advantage estimator called on shapes alone, for what they refuse."""

import jax
import jax.numpy as jnp

from dppo_jax.advantages import Estimator, TokenAdvantages, estimate, inputs_of
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
    gives another shape. Nothing is compiled or computed, but for advantages of one sample a prompt:
    an estimator that compares a prompt's samples gives none, and the run would learn nothing.
    """
    samples, needs = sampling.samples_per_prompt, objective.needs
    rows = PROMPTS * samples

    def sampled() -> tuple[Rollout, jax.Array | None]:
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
        return rollout, values

    def estimated(rollout: Rollout, values: jax.Array | None) -> TokenAdvantages:
        rewards = jnp.zeros((PROMPTS, samples)).at[0].set(1.0)
        return estimate(advantage, inputs_of(rewards, rollout, None, values))

    def step() -> LossSum:
        rollout, values = sampled()
        logp, topk = rollout.logp_rollout, rollout.topk_logp_rollout
        found = estimated(rollout, values)
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
    if samples == 1 and not estimated(*sampled()).advantages.any():
        raise ValueError(
            "the advantage estimator gives nothing to a prompt's only sample: set "
            "samples_per_prompt to 2 or more, or take another, as advantages.reinforce_plus_plus"
        )
