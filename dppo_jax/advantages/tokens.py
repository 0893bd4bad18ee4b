"""Estimators that tell a sequence's tokens apart: [B, T] -> [B, T].

A step of time is a response token: what is outside response_mask, between turns as well as at the
end, neither discounts nor counts, and gets 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dppo_jax.advantages.groups import group_mean_baseline
from dppo_jax.advantages.inputs import TokenAdvantages

VARIANCE_EPSILON = 1e-8


def returns_to_go(
    token_rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, gamma: float = 1.0
) -> Float[Array, "B T"]:
    """The discounted sum of what follows: G_t = r_t + γ G_{t+1} over response tokens."""
    returns = _discounted(jnp.where(response_mask, token_rewards, 0.0), response_mask, gamma)
    return jnp.where(response_mask, returns, 0.0)


def whiten(values: Float[Array, "B T"], response_mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Zero mean and unit variance over the response tokens of the whole batch.

    (x - mean) / sqrt(var + 1e-8), var unbiased, as verl@1dda039b `masked_whiten`; equal values give
    exactly 0. Outside response_mask 0.
    """
    # relative to one of them first: a mean's rounding, divided by 1e-4, would not be small
    one = jnp.max(jnp.where(response_mask, values, -jnp.inf))
    relative = jnp.where(response_mask, values - one, 0.0)
    count = response_mask.sum()
    mean = relative.sum() / jnp.maximum(count, 1)
    centred = jnp.where(response_mask, relative - mean, 0.0)
    variance = jnp.square(centred).sum() / jnp.maximum(count - 1, 1)
    return centred * jax.lax.rsqrt(variance + VARIANCE_EPSILON)


def reinforce_plus_plus(
    token_rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, gamma: float = 1.0
) -> Float[Array, "B T"]:
    """REINFORCE++: returns to go, whitened over all response tokens of the batch, no groups.

    REINFORCE++ (arXiv 2501.03262) as in verl@1dda039b. Unit: none.
    Differs from verl where a response has gaps: its returns start anew at each, these go on.
    """
    return whiten(returns_to_go(token_rewards, response_mask, gamma=gamma), response_mask)


def reinforce_plus_plus_baseline(
    rewards: Float[Array, "P G"],
    response_mask: Bool[Array, "B T"],
    present: Bool[Array, "P G"] | None = None,
    *,
    keep_single: bool = False,
) -> Float[Array, "B T"]:
    """REINFORCE++-baseline: reward minus group mean, whitened over all response tokens.

    REINFORCE++ (arXiv 2501.03262) as in verl@1dda039b. Whitening subtracts the mean over tokens, so
    that a group without spread is 0 here only where that mean is. Unit: none.
    """
    centred = group_mean_baseline(rewards, present, keep_single=keep_single)
    return whiten(jnp.broadcast_to(centred.reshape(-1, 1), response_mask.shape), response_mask)


def optimal_token_baseline(
    rewards: Float[Array, "P G"],
    token_rewards: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    logp_rollout: Float[Array, "B T"],
    sum_squared_probs: Float[Array, "B T"],
    *,
    keep_single: bool = False,
) -> Float[Array, "B T"]:
    """OTB: returns to go minus the baseline of least gradient variance, one for each column.

    A_t = G_t - B_t, B_t = Σ_G G_t W_t / (Σ_G W_t + 1e-8), W_t = Σ_{j<=t} (1 - 2π_j + Σ_v π_j(v)²),
    the squared norm of the logits' score summed so far. OTB (arXiv 2602.07078) as in verl@1dda039b
    `optimal_token_baseline`, B_t = 0 where only the longest response is left. Unit: the reward's.
    Differs from the paper: π is the sampler's, and Σ_v π² runs over its stored top K and the
    sampled token; what is left out is at most the rest's mass times the least stored probability.
    """
    prompts, group = rewards.shape

    def grouped(values: Array) -> Array:
        return values.reshape(prompts, group, -1)

    mask = grouped(response_mask)
    returns = grouped(returns_to_go(token_rewards, response_mask))
    energy = 1.0 - 2.0 * jnp.exp(logp_rollout) + sum_squared_probs
    weight = jnp.cumsum(jnp.where(mask, grouped(energy), 0.0), axis=2) * mask
    total = (returns * weight).sum(axis=1, keepdims=True)
    baseline = total / (weight.sum(axis=1, keepdims=True) + 1e-8)
    alone = mask.sum(axis=1, keepdims=True) < 2  # nothing to compare with in this column
    advantages = returns - jnp.where(alone, 0.0, baseline)
    if group == 1 and not keep_single:
        advantages = jnp.zeros_like(advantages)
    return jnp.where(mask, advantages, 0.0).reshape(response_mask.shape)


def gae(
    token_rewards: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    values_old: Float[Array, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whitened: bool = True,
) -> TokenAdvantages:
    """Generalised advantage estimation, token by token, with the critic's values.

    δ_t = r_t + γ V_{t+1} - V_t; A_t = δ_t + γλ A_{t+1}; returns = A + V; V = 0 after the last
    token. GAE (arXiv 1506.02438) eq. 16. `whitened` advantages have zero mean and unit variance
    over the batch's response tokens, as verl@1dda039b makes them; the returns come of the raw ones.
    """
    _check_discounts(gamma, lam)
    advantages = _gae(token_rewards, response_mask, values_old, gamma, lam)
    returns = jnp.where(response_mask, advantages + values_old, 0.0)
    return TokenAdvantages(whiten(advantages, response_mask) if whitened else advantages, returns)


def distributional_gae(
    token_rewards: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    values_old: Float[Array, "B T Q"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    heads: int = 1,
    whitened: bool = True,
) -> TokenAdvantages:
    """Experimental: GAE of each quantile of the critic's distribution, for DVPO.

    A_t^q = δ_t^q + γλ A_{t+1}^q with V^q for V; returns [B, T, quantiles] = A^q + V^q; the policy's
    advantage is their mean over q. DVPO (arXiv 2512.03847) names the part without its formula.
    Assumed: quantiles are paired with the same quantile of the next token (comonotone), and the
    `heads` of an ensemble, consecutive in the last axis, are averaged first.
    """
    _check_discounts(gamma, lam)
    batch, time, outputs = values_old.shape
    if outputs % heads:
        raise ValueError(f"the critic's {outputs} values do not divide into heads={heads}")
    values = values_old.reshape(batch, time, heads, -1).mean(axis=2)
    by_quantile = jax.vmap(_gae, in_axes=(None, None, 2, None, None), out_axes=2)
    advantages = by_quantile(token_rewards, response_mask, values, gamma, lam)
    returns = jnp.where(response_mask[..., None], advantages + values, 0.0)
    mean = advantages.mean(axis=2)
    return TokenAdvantages(whiten(mean, response_mask) if whitened else mean, returns)


def _gae(
    rewards: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    values: Float[Array, "B T"],
    gamma: float,
    lam: float,
) -> Float[Array, "B T"]:
    following = _discounted(jnp.where(mask, values, 0.0), mask, 0.0)  # the next token's, from here
    following = jnp.pad(following[:, 1:], [(0, 0), (0, 1)])
    delta = jnp.where(mask, rewards + gamma * following - values, 0.0)
    return jnp.where(mask, _discounted(delta, mask, gamma * lam), 0.0)


def _discounted(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], discount: float
) -> Float[Array, "B T"]:
    """y_t = x_t + discount · y_{t+1} at response tokens, y_{t+1} elsewhere (x is 0 there)."""

    def combine(later, earlier):
        decay, total = later
        return earlier[0] * decay, earlier[0] * total + earlier[1]

    decays = jnp.where(mask, discount, 1.0)
    _, total = jax.lax.associative_scan(combine, (decays, values), axis=1, reverse=True)
    return total


def _check_discounts(gamma: float, lam: float) -> None:
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma={gamma} and lam={lam} must be between 0 and 1")
