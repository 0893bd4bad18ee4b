"""Supervised training on demonstrations: how a recipe makes its own base policy."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dppo_jax.models.decoder import Model, Params
from dppo_jax.multihost import split_rows
from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.tokenizers import Tokenizer
from dppo_jax.records import FINISH_STOP, LossSum, Mean, Metrics, Rollout, TrainState
from dppo_jax.scoring import score
from dppo_jax.sharding import batch_sharding
from dppo_jax.update import gradient_step, init_state

Demonstrate = Callable[[Example, np.random.Generator], str]


def worked_solution(example: Example, rng: np.random.Generator) -> str:
    """The example's own solution."""
    return example.solution


def demonstration_rows(
    examples: Sequence[Example],
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> dict[str, np.ndarray]:
    """Demonstrations as the fields of a `Rollout`, on the host, so that `score` reads them.

    A demonstration longer than max_response_tokens raises ValueError: it could never be sampled.
    """
    rows = len(examples)
    prompt_tokens = np.full((rows, max_prompt_tokens), tokenizer.pad_id, np.int32)
    prompt_mask = np.zeros((rows, max_prompt_tokens), bool)
    response_tokens = np.full((rows, max_response_tokens), tokenizer.pad_id, np.int32)
    response_mask = np.zeros((rows, max_response_tokens), bool)
    for row, (example, text) in enumerate(zip(examples, texts, strict=True)):
        prompt, response = tokenizer.encode(example.prompt), tokenizer.encode_response(text)
        if len(response) > max_response_tokens:
            raise ValueError(
                f"the demonstration of {example.id} has {len(response)} tokens, more than "
                f"max_new_tokens={max_response_tokens}: raise it"
            )
        prompt_tokens[row, -len(prompt) :], prompt_mask[row, -len(prompt) :] = prompt, True
        response_tokens[row, : len(response)] = response
        response_mask[row, : len(response)] = True
    nothing = np.zeros((rows, max_response_tokens), np.float32)
    return dict(
        prompt_tokens=prompt_tokens,
        prompt_mask=prompt_mask,
        response_tokens=response_tokens,
        response_mask=response_mask,
        logp_rollout=nothing,
        topk_ids=np.zeros((rows, max_response_tokens, 0), np.int32),
        topk_logp_rollout=nothing[..., None][..., :0],
        entropy_rollout=nothing,
        finish_reason=np.full((rows,), FINISH_STOP, np.int32),
    )


def train_supervised(
    model: Model,
    params: Params,
    source: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    mesh: Mesh,
    demonstrate: Demonstrate,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch_size: int,
    max_prompt_tokens: int,
    max_response_tokens: int,
    seed: int,
    report: Callable[[int, float], None] = lambda step, loss: None,
    report_every: int = 20,
) -> Params:
    """Minimises the mean negative log-likelihood of the demonstrations' response tokens.

    Each step draws `batch_size` examples at random and has each demonstrated anew.
    """

    def loss_of(params: Params, rollout: Rollout) -> LossSum:
        logp = score(model, params, rollout, temperature=1.0).logp
        loss_sum = -jnp.sum(jnp.where(rollout.response_mask, logp, 0.0))
        count = jnp.sum(rollout.response_mask, dtype=jnp.float32)
        return LossSum(loss_sum, count, {"loss/nll": Mean(loss_sum, count)})

    def step_of(state: TrainState, rollout: Rollout) -> tuple[TrainState, Metrics]:
        return gradient_step(state, loss_of, rollout, optimizer, microbatches=1)

    jitted = jax.jit(step_of, donate_argnums=0)
    state = init_state(params, optimizer)
    rng = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        examples = [source[int(i)] for i in rng.integers(len(source), size=batch_size)]
        rows = demonstration_rows(
            examples,
            [demonstrate(example, rng) for example in examples],
            tokenizer,
            max_prompt_tokens=max_prompt_tokens,
            max_response_tokens=max_response_tokens,
        )
        rollout = Rollout(**split_rows(rows, batch_sharding(mesh)))
        state, metrics = jitted(state, rollout)
        if step % report_every == 0 or step == steps:
            nll = metrics["loss/nll"]
            report(step, float(nll.sum) / float(nll.count))
    return state.params
