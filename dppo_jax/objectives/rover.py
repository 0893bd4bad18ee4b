"""ROVER: the policy's log-ratio as the Q-function of the policy that acts at random."""

import jax
import jax.numpy as jnp

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import old_anchor
from dppo_jax.objectives.policy_gradient import TokenLoss, from_sequence_loss
from dppo_jax.records import Batch, Mean, Metrics, Need, Objective, TokenStats

NEEDS = frozenset[Need]({"logp_old", "uniform_logp"})


def rover(
    rho: float = 1.0,
    next_scale: float = 1.0,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """ROVER: (Q_t - sg[A + c·Q'_{t+1}])² with Q_t = ρ·log π/old of the sampled token.

    Q'_t = ρ·(V(s_t) - V_old(s_t)) is Q's mean over the vocabulary, V = mean_v log π(v|s): the value
    of acting uniformly. It is 0 after the last token. arXiv 2509.24981; tinnerhrhe/ROVER@b0fa5878
    verl/trainer/ppo/core_algos.py compute_rover_loss, its defaults ρ = c = 1. A is the reward less
    the group's mean, at every token. No ratio, no mask. Its clip of Q is left out (off by default).
    """
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    centre = old_anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        logps = centre.logps(batch)
        if stats.uniform_logp is None or batch.uniform_logp_old is None:
            raise ValueError(
                "rover needs uniform_logp, current and old; a model with final_soft_cap has none"
            )
        mask = batch.rollout.response_mask
        value = rho * jnp.where(mask, stats.uniform_logp - batch.uniform_logp_old, 0.0)
        after = jnp.pad(value[:, 1:], [(0, 0), (0, 1)])
        target = jax.lax.stop_gradient(batch.advantages + next_scale * after)
        q = rho * (stats.logp - logps.logp)
        tokens = mask.sum().astype(jnp.float32)
        metrics: Metrics = {
            "rover/target": Mean(jnp.sum(target, where=mask), tokens),
            "rover/q": Mean(jnp.sum(q, where=mask), tokens),
        }
        kept = jnp.ones(mask.shape, jnp.bool_)
        return TokenLoss((q - target) ** 2, kept, metrics=metrics)

    return from_sequence_loss(token_loss, aggregate=aggregate, needs=NEEDS)
