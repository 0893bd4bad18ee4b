"""Parameters and tokens to `TokenStats`: the only softmax in training."""

import jax
import jax.numpy as jnp

from dppo_jax.kernels.head import head
from dppo_jax.models.decoder import Model, Params, response_states
from dppo_jax.records import Max, Mean, Metrics, Rollout, TokenStats


def score(model: Model, params: Params, rollout: Rollout, *, temperature: float) -> TokenStats:
    """log π(a_t | s_t), log π of the stored top-K ids and the entropy at each response token.

    All of softmax(logits / temperature), the distribution that the sampler drew from; shapes as in
    `TokenStats`. Padding is attended by nobody.
    """
    decoder = model.bind(params)
    hidden = response_states(
        decoder,
        rollout.prompt_tokens,
        rollout.prompt_mask,
        rollout.response_tokens,
        rollout.response_mask,
    )
    batch, length, width = hidden.shape
    ids = jnp.concatenate([rollout.response_tokens[..., None], rollout.topk_ids], axis=-1)
    out = head(
        hidden.reshape(-1, width),
        decoder.unembedding_matrix(),
        ids.reshape(batch * length, -1),
        temperature=temperature,
        stored_gradient=False,  # divergences are masks: no objective differentiates them
    )
    logp = (out.logit_at - out.lse[:, None]).reshape(batch, length, -1)
    return TokenStats(logp[..., 0], logp[..., 1:], out.entropy.reshape(batch, length))


def mismatch(stats: TokenStats, rollout: Rollout) -> Metrics:
    """How far the scorer's probabilities of the sampled tokens are from the sampler's.

    With Δ = logp - logp_rollout over response tokens: mean and maximum of |Δ|, of |π - μ|, the mean
    of the ratio e^Δ, and the multiplicative error mean(e^|Δ|) (1 means none).
    """
    mask = rollout.response_mask
    logp = jax.lax.stop_gradient(stats.logp)
    delta = jnp.where(mask, logp - rollout.logp_rollout, 0.0)
    prob_diff = jnp.where(mask, jnp.abs(jnp.exp(logp) - jnp.exp(rollout.logp_rollout)), 0.0)
    count = jnp.sum(mask, dtype=jnp.float32)

    def mean(values):
        return Mean(jnp.sum(jnp.where(mask, values, 0.0)), count)

    return {
        "mismatch/logp_abs_mean": mean(jnp.abs(delta)),
        "mismatch/logp_abs_max": Max(jnp.max(jnp.abs(delta))),
        "mismatch/prob_abs_mean": mean(prob_diff),
        "mismatch/prob_abs_max": Max(jnp.max(prob_diff)),
        "mismatch/ratio_mean": mean(jnp.exp(delta)),
        "mismatch/multiplicative_error": mean(jnp.exp(jnp.abs(delta))),
    }
