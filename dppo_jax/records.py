"""The nouns of one training step, each a frozen pytree; every field with shape, dtype and mask.

Axes: P prompts, G samples a prompt, B = P*G sequences, L prompt columns, T response columns,
K stored top-K slots. Log-probabilities are natural, float32, of the distribution that was sampled
from (temperature applied), and say whose they are: ``logp_rollout`` (the sampler's, mu),
``logp_old`` (the trainer's recomputation before the update), ``logp`` (current, differentiable),
``logp_ref`` (a frozen reference).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FINISH_LENGTH = 0  # the token budget ran out
FINISH_STOP = 1  # the policy sampled an end token, which is part of the response

# What an objective asks of the training loop beside the rollout and the scored policy: Batch.*_old,
# Batch.logp_ref, TokenStats.exact_*, TokenStats.uniform_logp, TokenStats.values (and their _old),
# TokenStats.last_layer. Exact divergences are from the policy that sampled, or (`_old`) from that
# before the step's updates: an objective asks for one of them at most.
Need = Literal[
    "logp_old", "logp_ref", "exact_divergence", "exact_divergence_old", "uniform_logp", "values",
    "last_layer",
]  # fmt: skip
EXACT: frozenset[Need] = frozenset({"exact_divergence", "exact_divergence_old"})

# How far the loss at a token looks: at what is recorded of that token alone, at the other tokens of
# its sequence, at the other samples of its prompt, or at the whole batch (`Objective.statistics`).
Scope = Literal["token", "sequence", "prompt", "batch"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts, left-padded so that every response starts at the same column."""

    tokens: Int[Array, "P L"]  # pad columns hold any id; only `mask` says which are real
    mask: Bool[Array, "P L"]  # True at prompt tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packing:
    """Where sequences with a prompt each stand in rows of cells, without their padding."""

    row: Int[Array, " B"]
    start: Int[Array, " B"]  # the cell of a sequence's first token
    rows: int = field(metadata={"static": True})
    columns: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollout:
    """What the sampler returns. Row b = p*G + g is sample g of prompt p."""

    prompt_tokens: Int[Array, "P L"]  # once for all of its samples
    prompt_mask: Bool[Array, "P L"]
    response_tokens: Int[Array, "B T"]
    response_mask: Bool[Array, "B T"]  # True at sampled tokens, the end token included
    logp_rollout: Float[Array, "B T"]  # of the sampled token; 0 outside response_mask
    topk_ids: Int[Array, "B T K"]  # the sampler's K most likely ids, most likely first
    topk_logp_rollout: Float[Array, "B T K"]  # their log-probabilities; 0 outside response_mask
    entropy_rollout: Float[Array, "B T"]  # nats; 0 outside response_mask
    finish_reason: Int[Array, " B"]  # FINISH_LENGTH or FINISH_STOP
    # Where the sampler's filters were replayed: it drew from the first so many of topk_ids alone,
    # and every log-probability here is of those, renormalised; 0 outside response_mask.
    kept_count: Int[Array, "B T"] | None = None
    # Training steps done when the token was drawn; None where all are of the same parameters.
    policy_version: Int[Array, "B T"] | None = None
    # The experts that each fed token went to, for a replay of the routing; negative where nothing
    # is recorded (a response's last token is never fed): the router chooses there.
    prompt_experts: Int[Array, "P L layers k"] | None = None
    experts: Int[Array, "B T layers k"] | None = None
    packing: Packing | None = None  # how the model is to see it; put in by the update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """A rollout with what the objective needs beside the current policy."""

    rollout: Rollout
    advantages: Float[Array, "B T"]  # the sequence's advantage at each of its tokens
    logp_old: Float[Array, "B T"] | None = None  # only where an objective's anchor needs it
    topk_logp_old: Float[Array, "B T K"] | None = None
    logp_ref: Float[Array, "B T"] | None = None  # of the sampled token, by the reference
    uniform_logp_old: Float[Array, "B T"] | None = None  # TokenStats.uniform_logp before the update
    values_old: Float[Array, "B T *Q"] | None = None  # the critic's, before the update
    returns: Float[Array, "B T *R"] | None = None  # what the critic is trained towards
    # >= 0, of each token's loss, terms added to it apart: put in by `objectives.corrected`
    loss_weights: Float[Array, "B T"] | None = None
    objective_state: Any = None  # TrainState's, put in by the update: without a batch axis
    # Objective.statistics of the whole minibatch, put in by the update where it takes that in parts
    statistics: Any = None
    # V, put in by the update where metrics by token id are wanted; not an array.
    vocab_size: int | None = field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenStats:
    """The scored policy at each response token; values outside response_mask mean nothing."""

    logp: Float[Array, "B T"]  # of the sampled token
    topk_logp: Float[Array, "B T K"]  # of Rollout.topk_ids
    entropy: Float[Array, "B T"]  # nats
    exact_tv: Float[Array, "B T"] | None = None  # from the anchor's policy, over the vocabulary
    exact_kl: Float[Array, "B T"] | None = None  # KL(anchor's policy || current), nats
    uniform_logp: Float[Array, "B T"] | None = None  # mean over the vocabulary of log π(v)
    values: Float[Array, "B T *Q"] | None = None  # the critic's: a number, or Q quantiles
    # Σ π², Σ π³ over the vocabulary, and mean((x/T)²) of the hidden state x; no gradient
    last_layer: Float[Array, "B T 3"] | None = None


class Mean(NamedTuple):
    """A metric that leaves a step unreduced: sums and counts add over microbatches and hosts."""

    sum: Float[Array, "*stacked"]
    count: Float[Array, "*stacked"]  # type: ignore[assignment]  # nobody calls tuple.count


class Max(NamedTuple):
    """A metric that combines by maximum."""

    value: Float[Array, "*stacked"]


class Counts(NamedTuple):
    """A metric by token id, added up over the run in `TrainState.token_counts`."""

    value: Int[Array, "*stacked 3 V"]  # masked with A > 0, masked with A < 0, all response tokens


Metric = Mean | Max | Counts
Metrics = dict[str, Metric]


def fold_metrics(stacked: Metrics) -> Metrics:
    """Combines metrics stacked along a leading axis, one entry a microbatch."""

    def fold(metric: Metric) -> Metric:
        if isinstance(metric, Max):
            return Max(jnp.max(metric.value))
        if isinstance(metric, Counts):
            return Counts(jnp.sum(metric.value, axis=0))
        return Mean(jnp.sum(metric.sum), jnp.sum(metric.count))

    return {name: fold(metric) for name, metric in stacked.items()}


class LossSum(NamedTuple):
    """An objective's result before division: loss = loss_sum / weight_sum.

    Both add over microbatches and hosts, so accumulation is exact. `weight_sum` does not depend on
    the parameters.
    """

    loss_sum: Float[Array, "*stacked"]
    weight_sum: Float[Array, "*stacked"]
    metrics: Metrics


class TokenLocal(NamedTuple):
    """An objective's loss a token where each depends on that token's own statistics alone.

    loss_sum = sum of weights(response_mask) * loss(stats, batch). The head then makes loss and
    gradient in one pass over the logits (`kernels.head.fused_loss`).
    """

    loss: Callable[[TokenStats, Batch], Float[Array, "B T"]]  # 0 outside response_mask
    weights: Callable[[Bool[Array, "B T"]], Float[Array, "B T"]]


class Objective(NamedTuple):
    """A pure loss and what the training loop must provide for it."""

    loss: Callable[[TokenStats, Batch], LossSum]
    needs: frozenset[Need] = frozenset()
    token_local: TokenLocal | None = None  # the same loss, where it can be had token by token
    # A state that the objective carries from gradient step to gradient step, as a pytree of arrays:
    # the loss reads it in Batch.objective_state, `next_state` sees the whole step's metrics.
    initial_state: Any = ()
    next_state: Callable[[Any, Metrics], Any] | None = None
    scope: Scope = "batch"
    # What a loss of scope "batch" must know of the whole minibatch: arrays without batch axis or
    # gradient, made of TokenStats.logp, topk_logp and entropy. The loss reads them in
    # Batch.statistics, and where that is None takes what it is given for the whole.
    statistics: Callable[[TokenStats, Batch], Any] | None = None
    # response mask -> each token's weight and the weights' total, so that terms can be added
    aggregate: Callable[[Bool[Array, "B T"]], Any] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a gradient step changes."""

    params: Any  # pytree of float32 arrays
    opt_state: Any
    step: Int[Array, ""]  # gradient steps taken
    objective_state: Any = ()  # Objective.initial_state and what next_state made of it
    rollout_memory: Any = ()  # what the rollout policy remembers from step to step
    token_counts: Any = ()  # Counts.value over all gradient steps; () where nobody asks
    critic: Any = ()  # a TrainState of the critic's own parameters, where there is one
