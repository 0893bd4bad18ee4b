"""Parameters and tokens to `TokenStats`: the only softmax in training."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dppo_jax.kernels.head import fused_loss, head
from dppo_jax.models.decoder import Decoder, Model, Params, response_states
from dppo_jax.records import Batch, Max, Mean, Metrics, Rollout, TokenLocal, TokenStats
from dppo_jax.sharding import head_layout


def score(model: Model, params: Params, rollout: Rollout, *, temperature: float) -> TokenStats:
    """log π(a_t | s_t), log π of the stored top-K ids and the entropy at each response token.

    All of softmax(logits / temperature), the distribution that the sampler drew from; shapes as in
    `TokenStats`. Padding is attended by nobody.
    """
    decoder = model.bind(params)
    hidden, ids = _states_and_ids(decoder, rollout)
    out = head(
        hidden,
        decoder.unembedding_matrix(),
        ids,
        temperature=temperature,
        soft_cap=model.config.final_soft_cap,
        stored_gradient=False,  # divergences are masks: no objective differentiates them
        layout=head_layout(),
    )
    logp = (out.logit_at - out.lse[:, None]).reshape(*rollout.response_tokens.shape, -1)
    return TokenStats(logp[..., 0], logp[..., 1:], out.entropy.reshape(logp.shape[:2]))


def loss_and_score(
    model: Model, params: Params, batch: Batch, objective: TokenLocal, *, temperature: float
) -> tuple[Float[Array, ""], TokenStats]:
    """(the objective's loss sum, `score`), the loss's gradient made in the same pass.

    The statistics carry no gradient. Equal to `objective.loss` of `score` up to rounding.
    """
    decoder, rollout = model.bind(params), batch.rollout
    hidden, ids = _states_and_ids(decoder, rollout)
    weights = objective.weights(rollout.response_mask).reshape(-1)

    # Flat: JAX fills the rows' structure with placeholders, which a record's fields refuse.
    leaves, structure = jax.tree.flatten(by_token(batch))

    def losses(terms, rows):
        weights, *leaves = rows
        stats = TokenStats(terms.logp[:, :1], terms.logp[:, None, 1:], terms.entropy[:, None])
        return weights * objective.loss(stats, jax.tree.unflatten(structure, leaves))[:, 0]

    total, terms = fused_loss(
        losses,
        hidden,
        decoder.unembedding_matrix(),
        ids,
        (weights, *leaves),
        temperature=temperature,
        soft_cap=model.config.final_soft_cap,
        stored_gradient=False,
        layout=head_layout(),
    )
    logp = terms.logp.reshape(*rollout.response_tokens.shape, -1)
    return total, TokenStats(logp[..., 0], logp[..., 1:], terms.entropy.reshape(logp.shape[:2]))


def by_token(batch: Batch) -> Batch:
    """The batch with every response token as a sequence of one, without prompts."""
    rollout = batch.rollout
    tokens, columns = rollout.response_mask.size, rollout.response_mask.shape[1]
    nothing = jnp.zeros((tokens, 0), jnp.int32)

    def alone(leaf):  # [B, T, ...] -> [B*T, 1, ...]
        return leaf.reshape(tokens, 1, *leaf.shape[2:])

    def fields(record, *others):
        own = {name: value for name, value in vars(record).items() if name not in others}
        return jax.tree.map(alone, own)

    return Batch(
        Rollout(
            prompt_tokens=nothing,
            prompt_mask=nothing.astype(bool),
            finish_reason=jnp.repeat(rollout.finish_reason, columns),
            **fields(rollout, "prompt_tokens", "prompt_mask", "finish_reason"),
        ),
        **fields(batch, "rollout", "objective_state", "vocab_size"),
    )


def _states_and_ids(
    decoder: Decoder, rollout: Rollout
) -> tuple[Float[Array, "N D"], Int[Array, "N J"]]:
    """The hidden state that predicts each response token; its id and the stored top-K's."""
    hidden = response_states(
        decoder,
        rollout.prompt_tokens,
        rollout.prompt_mask,
        rollout.response_tokens,
        rollout.response_mask,
    )
    ids = jnp.concatenate([rollout.response_tokens[..., None], rollout.topk_ids], axis=-1)
    return hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1, ids.shape[-1])


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
