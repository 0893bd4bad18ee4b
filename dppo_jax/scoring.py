"""Parameters and tokens to `TokenStats`: the only softmax in training."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dppo_jax import divergence, packing
from dppo_jax.kernels.divergences import Policy, divergences
from dppo_jax.kernels.head import fused_loss, head
from dppo_jax.models.decoder import Decoder, Experts, Model, Params, response_states
from dppo_jax.models.moe import Load, differing_choices
from dppo_jax.models.packed import packed_states
from dppo_jax.records import Batch, Max, Mean, Metrics, Rollout, TokenLocal, TokenStats
from dppo_jax.sharding import flatten_tokens, head_layout

# (bound decoder, the flat states of `token_states`, the rollout) -> fields of TokenStats
Also = Callable[[Decoder, Float[Array, "N D"], Rollout], dict[str, Array]]


def score(
    model: Model,
    params: Params,
    rollout: Rollout,
    *,
    temperature: float,
    rollout_params: Params | None = None,
    also: Also | None = None,
) -> TokenStats:
    """log π(a_t | s_t), log π of the stored top-K ids and the entropy at each response token.

    All of softmax(logits / temperature), or of that renormalised over the sampler's kept sets where
    these were recorded: the distribution that the sampler drew from. Shapes as in `TokenStats`.
    Padding is attended by nobody. With the parameters that sampled, also the exact divergences from
    their policy, `exact_tv` and `exact_kl`, both sides scored here: numerical mismatch with the
    sampler is not in them. They carry no gradient. `also` makes further fields.
    """
    return score_and_routing(
        model,
        params,
        rollout,
        temperature=temperature,
        rollout_params=rollout_params,
        also=also,
    )[0]


def score_and_routing(
    model: Model,
    params: Params,
    rollout: Rollout,
    *,
    temperature: float,
    rollout_params: Params | None = None,
    also: Also | None = None,
) -> tuple[TokenStats, Metrics]:
    """`score`, and what is known of the routing, where there are experts.

    `moe/aux_loss` is `Load.loss`, differentiable, and `moe/max_load` `Load.highest`, both of the
    router's own choices. Where a routing is replayed, also the share that it would not choose:
    `routing/differing_fraction`: of the recorded (token, layer, slot) choices, prompts' included;
    `mismatch/experts` is the same, and a run reports it of a step's first gradient step alone.
    """
    decoder = model.bind(params)
    hidden, ids, routing = _states_and_ids(decoder, rollout)
    stats = _stats(decoder, hidden, ids, rollout, temperature)
    if also is not None:
        stats = replace(stats, **also(decoder, hidden, rollout))
    if rollout_params is None:
        return stats, routing
    sampler = model.bind(rollout_params)
    theirs, _, _ = _states_and_ids(sampler, rollout)
    between = _exact(sampler, theirs, decoder, hidden, ids, stats, rollout, temperature)
    return replace(stats, exact_tv=between.tv, exact_kl=between.kl), routing


def with_own_routing(model: Model, params: Params, rollout: Rollout) -> Rollout:
    """The rollout with the experts that these parameters' routers choose in the scorer (R2).

    Replaying them keeps the routing still over a step's updates (arXiv 2512.01374).
    """
    _, chosen, _ = token_states(
        model.bind(params), replace(rollout, prompt_experts=None, experts=None)
    )
    if chosen is None:
        raise ValueError("this model has no experts whose routing could be recorded")
    return replace(rollout, prompt_experts=chosen.prompt, experts=chosen.response)


def tightness(
    model: Model, rollout_params: Params, params: Params, rollout: Rollout, *, temperature: float
) -> Metrics:
    """Exact divergences of the policy from the one that sampled, and how tight their bounds are.

    Means over response tokens of TV and KL(μ || π) over the whole vocabulary, and sum of the
    Binary or Top-K form over sum of the exact one: 1 is tight, and neither exceeds 1. All from the
    scorer's probabilities, so that numerical mismatch with the sampler is in none of them.
    """
    decoder, sampler = model.bind(params), model.bind(rollout_params)
    hidden, ids, _ = _states_and_ids(decoder, rollout)
    theirs, _, _ = _states_and_ids(sampler, rollout)
    mu = _stats(sampler, theirs, ids, rollout, temperature)
    pi = _stats(decoder, hidden, ids, rollout, temperature)
    between = _exact(sampler, theirs, decoder, hidden, ids, pi, rollout, temperature)
    sampled = mu.logp, pi.logp
    support = *sampled, rollout.response_tokens, rollout.topk_ids, mu.topk_logp, pi.topk_logp
    compared = {
        "tv": (between.tv, divergence.binary_tv(*sampled), divergence.topk_tv(*support)),
        "kl": (between.kl, divergence.binary_kl(*sampled), divergence.topk_kl(*support)),
    }
    metrics: Metrics = {}
    for kind, values in compared.items():
        exact, binary, topk = (jnp.sum(value, where=rollout.response_mask) for value in values)
        count = jnp.sum(rollout.response_mask, dtype=jnp.float32)
        metrics[f"divergence/exact_{kind}_mean"] = Mean(exact, count)
        metrics[f"divergence/binary_{kind}_over_exact"] = Mean(binary, exact)
        metrics[f"divergence/topk_{kind}_over_exact"] = Mean(topk, exact)
    return metrics


def loss_and_score(
    model: Model, params: Params, batch: Batch, objective: TokenLocal, *, temperature: float
) -> tuple[Float[Array, ""], TokenStats, Metrics]:
    """(the loss sum, `score`, its routing), the loss's gradient made in the same pass.

    The statistics carry no gradient. Equal to `objective.loss` of `score` up to rounding.
    """
    decoder, rollout = model.bind(params), batch.rollout
    hidden, ids, routing = _states_and_ids(decoder, rollout)
    valid = packing.flat(rollout.response_mask, rollout)
    if rollout.packing is not None:
        valid &= packing.cells(rollout).token >= 0
    weights = jnp.where(valid, packing.flat(objective.weights(rollout.response_mask), rollout), 0.0)

    # Flat: JAX fills the rows' structure with placeholders, which a record's fields refuse.
    alone = by_token(batch)
    if rollout.packing is not None:
        token = jnp.maximum(packing.cells(rollout).token, 0)
        alone = jax.tree.map(lambda leaf: leaf[token], alone)
    leaves, structure = jax.tree.flatten(alone)

    def losses(terms, rows):
        weights, *leaves = rows
        one = jax.tree.unflatten(structure, leaves)
        stats = _as_sampled(terms.logp[:, None], terms.entropy[:, None], one.rollout)
        return weights * objective.loss(stats, one)[:, 0]

    total, terms = fused_loss(
        losses,
        hidden,
        decoder.stored_unembedding(),
        ids,
        (weights, *leaves),
        temperature=temperature,
        soft_cap=model.config.final_soft_cap,
        stored_gradient=rollout.kept_count is not None,
        valid=valid,
        layout=head_layout(len(hidden), decoder.config.vocab_size),
    )
    logp, entropy = (packing.back(leaf, rollout) for leaf in (terms.logp, terms.entropy))
    return total, _as_sampled(logp, entropy, rollout), routing


def by_token(batch: Batch) -> Batch:
    """The batch with every response token as a sequence of one, without prompts."""
    rollout = replace(batch.rollout, prompt_experts=None, experts=None, packing=None)
    tokens = rollout.response_mask.size
    nothing = jnp.zeros((tokens, 0), jnp.int32)
    repeated = jnp.broadcast_to(rollout.finish_reason[:, None], rollout.response_mask.shape)

    def alone(leaf):  # [B, T, ...] -> [B*T, 1, ...]
        return flatten_tokens(leaf)[:, None]

    def fields(record, *others):
        own = {name: value for name, value in vars(record).items() if name not in others}
        return jax.tree.map(alone, own)

    return Batch(
        Rollout(
            prompt_tokens=nothing,
            prompt_mask=nothing.astype(bool),
            finish_reason=flatten_tokens(repeated),
            **fields(rollout, "prompt_tokens", "prompt_mask", "finish_reason"),
        ),
        **fields(batch, "rollout", "objective_state", "vocab_size"),
    )


def _stats(
    decoder: Decoder, hidden: Array, ids: Array, rollout: Rollout, temperature: float
) -> TokenStats:
    out = head(
        hidden,
        decoder.unembedding_matrix(),
        ids,
        temperature=temperature,
        soft_cap=decoder.config.final_soft_cap,
        # divergences are masks: no objective differentiates them; a normaliser is differentiated
        stored_gradient=rollout.kept_count is not None,
        layout=head_layout(len(hidden), decoder.config.vocab_size),
    )
    logp = packing.back(out.logit_at - out.lse[:, None], rollout)
    stats = _as_sampled(logp, packing.back(out.entropy, rollout), rollout)
    even = _uniform_logp(decoder, hidden, out.lse, temperature)
    if even is None or rollout.kept_count is not None:
        return stats
    return replace(stats, uniform_logp=packing.back(even, rollout))


def _as_sampled(
    logp: Float[Array, "B T J"], entropy: Float[Array, "B T"], rollout: Rollout
) -> TokenStats:
    """Statistics over the vocabulary, of the sampled token and the stored ids, as those of the
    distribution that the sampler drew from."""
    if rollout.kept_count is None:
        return TokenStats(logp[..., 0], logp[..., 1:], entropy)
    return renormalised(logp, rollout.kept_count)


def renormalised(logp: Float[Array, "B T J"], kept_count: Int[Array, "B T"]) -> TokenStats:
    """The policy given that its token is one of the first `kept_count` stored ids.

    log π'(v) = log π(v) - log Σ_{u kept} π(u), -inf for stored ids that were not kept; entropy
    -Σ_{kept} π' log π'. Column 0 of `logp` is the sampled token's, which is among the kept ones;
    any one shift of a token's columns gives the same. All of it is differentiable. A kept_count of
    0, as outside of responses, stands for all of the stored ids, so that all values are finite.
    """
    stored = logp[..., 1:]
    capture = stored.shape[-1]
    kept = jnp.arange(capture) < jnp.where(kept_count > 0, kept_count, capture)[..., None]
    normaliser = jax.nn.logsumexp(jnp.where(kept, stored, -jnp.inf), axis=-1)
    inside = jnp.where(kept, stored - normaliser[..., None], 0.0)
    entropy = -jnp.sum(jnp.where(kept, jnp.exp(inside) * inside, 0.0), axis=-1)
    return TokenStats(logp[..., 0] - normaliser, jnp.where(kept, inside, -jnp.inf), entropy)


def kept_sizes(rollout: Rollout) -> Metrics:
    """How many tokens the sampler's filters kept, and how often as many as it records: its cap
    may then have dropped some that the filters would keep. Empty where it did not filter."""
    if rollout.kept_count is None:
        return {}
    count = jnp.sum(rollout.response_mask, dtype=jnp.float32)
    full = rollout.kept_count == rollout.topk_ids.shape[-1]

    def mean(values):
        total = jnp.sum(values, where=rollout.response_mask, dtype=jnp.float32)
        return Mean(total, count)

    return {"truncation/kept": mean(rollout.kept_count), "truncation/at_capture": mean(full)}


def _uniform_logp(
    decoder: Decoder, hidden: Float[Array, "N D"], lse: Float[Array, " N"], temperature: float
) -> Float[Array, " N"] | None:
    """mean_v log π(v) = x · mean_v(w_v) / temperature - lse, lse = log Σ_v e^(z_v); no gradient.

    One dot product a token, since the mean of the logits is the logit of the mean row; dropped by
    the compiler where nobody reads it. A final soft-cap breaks that: None.
    """
    if decoder.config.final_soft_cap is not None:
        return None
    rows = jax.lax.stop_gradient(decoder.unembedding_matrix()).astype(jnp.float32)
    hidden, lse = jax.lax.stop_gradient((hidden.astype(jnp.float32), lse))
    return hidden @ rows.mean(axis=0) / temperature - lse


def last_layer(
    decoder: Decoder, hidden: Float[Array, "N D"], temperature: float
) -> Float[Array, "N 3"]:
    """Σ_v π(v)², Σ_v π(v)³ and mean((x/T)²) of the hidden state x, float32, without gradient.

    Σ π^n = exp(lse_n - n·lse), lse_n = log Σ_v e^(n·z_v): the head's at temperature / n, so that
    no logits are kept.
    """
    hidden = jax.lax.stop_gradient(hidden)
    unembedding = jax.lax.stop_gradient(decoder.unembedding_matrix())
    nothing = jnp.zeros((len(hidden), 1), jnp.int32)
    lse, twice, thrice = (
        head(
            hidden,
            unembedding,
            nothing,
            temperature=temperature / power,
            soft_cap=decoder.config.final_soft_cap,
            layout=head_layout(len(hidden), decoder.config.vocab_size),
        ).lse
        for power in (1, 2, 3)
    )
    square = jnp.mean(jnp.square(hidden.astype(jnp.float32) / temperature), axis=-1)
    found = jnp.exp(twice - 2 * lse), jnp.exp(thrice - 3 * lse), square
    return jnp.stack(found, axis=-1)


class _Exact(NamedTuple):
    tv: Float[Array, "B T"]
    kl: Float[Array, "B T"]


def _exact(
    sampler: Decoder,
    theirs: Array,
    decoder: Decoder,
    hidden: Array,
    ids: Array,
    pi: TokenStats,
    rollout: Rollout,
    temperature: float,
) -> _Exact:
    """Between the policies that are sampled from; kept sets are whole among the stored ids."""
    if rollout.kept_count is not None:
        mu = _stats(sampler, theirs, ids, rollout, temperature)
        both = mu.topk_logp, pi.topk_logp
        return _Exact(divergence.exact_tv(*both), divergence.exact_kl(*both))
    transform = temperature, decoder.config.final_soft_cap
    between = divergences(
        Policy(theirs, sampler.unembedding_matrix(), *transform),
        Policy(hidden, decoder.unembedding_matrix(), *transform),
        layout=head_layout(len(hidden), decoder.config.vocab_size),
    )
    return _Exact(packing.back(between.tv, rollout), packing.back(between.kl, rollout))


def token_states(
    decoder: Decoder, rollout: Rollout
) -> tuple[Float[Array, "N D"], Experts | None, Load | None]:
    """The state that predicts each response token, flat, or each cell of packed rows; the routing
    is the rollout's, if it has one."""
    recorded = None
    if rollout.experts is not None and rollout.prompt_experts is not None:
        recorded = Experts(rollout.prompt_experts, rollout.experts)
    tokens = (
        rollout.prompt_tokens,
        rollout.prompt_mask,
        rollout.response_tokens,
        rollout.response_mask,
    )
    if rollout.packing is not None:
        return packed_states(decoder, *tokens, rollout.packing, recorded)
    hidden, native, load = response_states(decoder, *tokens, recorded)
    return flatten_tokens(hidden), native, load


def _states_and_ids(
    decoder: Decoder, rollout: Rollout
) -> tuple[Float[Array, "N D"], Int[Array, "N J"], Metrics]:
    """The state that predicts each response token; its id and the stored top-K's; the routing."""
    hidden, native, load = token_states(decoder, rollout)
    ids = jnp.concatenate([rollout.response_tokens[..., None], rollout.topk_ids], axis=-1)
    return hidden, packing.flat(ids, rollout), _routing(rollout, native, load)


def _routing(rollout: Rollout, native: Experts | None, load: Load | None) -> Metrics:
    if load is None:
        return {}
    balance: Metrics = {
        "moe/aux_loss": Mean(load.loss(), jnp.float32(1)),
        "moe/max_load": Max(load.highest()),
    }
    if rollout.experts is None or rollout.prompt_experts is None or native is None:
        return balance
    pairs = (rollout.prompt_experts, native.prompt), (rollout.experts, native.response)
    counts = [
        [jnp.sum(count, dtype=jnp.float32) for count in differing_choices(*pair)] for pair in pairs
    ]
    (asked, of_asked), (answered, of_answered) = counts
    share = Mean(asked + answered, of_asked + of_answered)
    return balance | {"routing/differing_fraction": share, "mismatch/experts": share}


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
