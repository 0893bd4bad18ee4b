"""Batches for the objective tests, made of real distributions so that every field is consistent."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.records import Batch, Rollout, TokenStats


def make_batch(
    seed: int = 0, b: int = 6, t: int = 10, k: int = 4, vocab: int = 12, drift: float = 0.7
) -> tuple[TokenStats, Batch]:
    """Three nearby policies over `vocab` tokens, tokens sampled from mu, ragged responses.

    The last sequence is empty; sequence 0 has A = 0; the others alternate in sign.
    """
    rng = np.random.default_rng(seed)
    logits = 2.0 * rng.normal(size=(b, t, vocab))
    log_mu = _log_softmax(logits)
    log_old = _log_softmax(logits + 0.3 * rng.normal(size=logits.shape))
    log_pi = _log_softmax(logits + drift * rng.normal(size=logits.shape))
    tokens = (log_mu + rng.gumbel(size=log_mu.shape)).argmax(-1)
    lengths = rng.integers(1, t + 1, size=b)
    lengths[-1] = 0
    mask = np.arange(t) < lengths[:, None]
    ids = np.argsort(-log_mu, axis=-1)[..., :k]
    advantages = np.where(np.arange(b) % 2 == 0, 1.0, -1.0) * rng.uniform(0.2, 2.0, size=b)
    advantages[0] = 0.0

    def sampled(log_probs: np.ndarray) -> jax.Array:
        return jnp.asarray(np.take_along_axis(log_probs, tokens[..., None], -1)[..., 0], "float32")

    def topk(log_probs: np.ndarray) -> jax.Array:
        return jnp.asarray(np.take_along_axis(log_probs, ids, -1), "float32")

    rollout = Rollout(
        prompt_tokens=jnp.zeros((b, 2), jnp.int32),
        prompt_mask=jnp.ones((b, 2), jnp.bool_),
        response_tokens=jnp.asarray(tokens, jnp.int32),
        response_mask=jnp.asarray(mask),
        logp_rollout=sampled(log_mu),
        topk_ids=jnp.asarray(ids, jnp.int32),
        topk_logp_rollout=topk(log_mu),
        entropy_rollout=jnp.asarray(-(np.exp(log_mu) * log_mu).sum(-1), jnp.float32),
        finish_reason=jnp.zeros(b, jnp.int32),
    )
    mu = np.exp(log_mu)
    stats = TokenStats(
        logp=sampled(log_pi),
        topk_logp=topk(log_pi),
        entropy=jnp.asarray(-(np.exp(log_pi) * log_pi).sum(-1), jnp.float32),
        uniform_logp=jnp.asarray(log_pi.mean(-1), jnp.float32),
        exact_tv=jnp.asarray(0.5 * np.abs(mu - np.exp(log_pi)).sum(-1), jnp.float32),
        exact_kl=jnp.asarray((mu * (log_mu - log_pi)).sum(-1), jnp.float32),
        last_layer=jnp.asarray(
            np.stack(
                [np.exp(2 * log_pi).sum(-1), np.exp(3 * log_pi).sum(-1), np.ones((b, t))], axis=-1
            ),
            jnp.float32,
        ),
    )
    per_token = jnp.asarray(np.repeat(advantages[:, None], t, axis=1), jnp.float32)
    old_mean = jnp.asarray(log_old.mean(-1), jnp.float32)
    batch = Batch(rollout, per_token, sampled(log_old), topk(log_old))
    return stats, replace(batch, uniform_logp_old=old_mean)


def with_critic(stats, batch, *quantiles: int, seed: int = 0):
    """The same tokens with a critic's values, now and before the update, and returns."""
    rng = np.random.default_rng(seed)
    now, old, returns = (
        jnp.asarray(0.3 * rng.normal(size=(*stats.logp.shape, *quantiles)), jnp.float32)
        for _ in range(3)
    )
    return replace(stats, values=now), replace(batch, values_old=old, returns=returns)


def in_prompts(stats, batch, samples: int):
    """The same rows as `samples` of each prompt."""
    rollout, prompts = batch.rollout, len(stats.logp) // samples
    rollout = replace(
        rollout,
        prompt_tokens=rollout.prompt_tokens[:prompts],
        prompt_mask=rollout.prompt_mask[:prompts],
    )
    return stats, replace(batch, rollout=rollout)


def suited_to(name, objective, stats, batch):
    """The batch with what the method looks at beside its rows: a critic's values, pairs."""
    if "values" in objective.needs:
        return with_critic(stats, batch, *([5] if name == "dvpo" else []))
    return in_prompts(stats, batch, 2) if objective.scope == "prompt" else (stats, batch)


def from_probabilities(mu, pi, advantages, old=None) -> tuple[TokenStats, Batch]:
    """One sequence whose tokens have these probabilities; no top-K slots."""
    mu, pi, advantages = (jnp.asarray([row], jnp.float32) for row in (mu, pi, advantages))
    t = mu.shape[1]
    rollout = Rollout(
        prompt_tokens=jnp.zeros((1, 0), jnp.int32),
        prompt_mask=jnp.zeros((1, 0), jnp.bool_),
        response_tokens=jnp.zeros((1, t), jnp.int32),
        response_mask=jnp.ones((1, t), jnp.bool_),
        logp_rollout=jnp.log(mu),
        topk_ids=jnp.zeros((1, t, 0), jnp.int32),
        topk_logp_rollout=jnp.zeros((1, t, 0)),
        entropy_rollout=jnp.zeros((1, t)),
        finish_reason=jnp.zeros(1, jnp.int32),
    )
    logp_old = None if old is None else jnp.log(jnp.asarray([old], jnp.float32))
    stats = TokenStats(jnp.log(pi), jnp.zeros((1, t, 0)), jnp.zeros((1, t)))
    return stats, Batch(rollout, advantages, logp_old)


def take_rows(tree, rows):
    """The sequences `rows` of stats or of a batch, whose prompts are all the same."""
    every = max(map(len, jax.tree.leaves(tree)))
    return jax.tree.map(lambda values: values[rows] if len(values) == every else values, tree)


def scribble_padding(stats, batch, columns):
    """The same responses with more columns, and outside response_mask NaN, 1e9 and id 7 in turn."""
    narrow = batch.rollout.response_mask
    mask = jnp.pad(narrow, [(0, 0), (0, columns)])

    def outside(values):
        if values.ndim < 2 or values.shape[:2] != narrow.shape:
            return values
        trailing = (1,) * (values.ndim - 2)
        wide = jnp.pad(values, [(0, 0), (0, columns)] + [(0, 0)] * (values.ndim - 2))
        poison = jnp.where(jnp.arange(mask.shape[1]) % 2, jnp.nan, 1e9).reshape(-1, *trailing)
        if not jnp.issubdtype(values.dtype, jnp.floating):
            poison = jnp.asarray(7, values.dtype)
        return jnp.where(mask.reshape(*mask.shape, *trailing), wide, poison)

    wider = jax.tree.map(outside, batch)
    wider = replace(wider, rollout=replace(wider.rollout, response_mask=mask))
    return jax.tree.map(outside, stats), wider


@cache
def _differentiated(loss):
    """Kept, so that batches of one shape share a program."""

    def loss_sum(stats, batch):
        result = loss(stats, batch)
        return result.loss_sum, result

    return jax.jit(jax.value_and_grad(loss_sum, has_aux=True))


def loss_and_gradient(objective, stats, batch):
    """The objective's LossSum and d loss_sum / d stats (every field)."""
    (_, result), gradient = _differentiated(objective.loss)(stats, batch)
    return result, gradient


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
