"""What is refused before a run computes or writes anything, and the files it starts with."""

from collections.abc import Mapping
from pathlib import Path

from jax.sharding import AbstractMesh, Mesh

from dppo_jax.advantages import Estimator
from dppo_jax.critic import Critic, HeadCritic
from dppo_jax.dry_call import dry_call
from dppo_jax.models.decoder import DecoderConfig
from dppo_jax.multihost import is_writer
from dppo_jax.prompts.tokenizers import Tokenizer
from dppo_jax.records import Need, Objective
from dppo_jax.sampling.generate import SamplingConfig
from dppo_jax.sharding import check_divides


def check_sizes(
    model: DecoderConfig,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    mesh: Mesh,
    steps: int,
    prompts_per_step: int,
    minibatches: int,
    microbatches: int,
    max_prompt_tokens: int,
    rollout_batches: int = 1,
) -> None:
    """Refuses contradictions before anything is computed."""
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model vocab_size="
            f"{model.vocab_size}: set DecoderConfig.vocab_size to at least the tokenizer's"
        )
    check_layout(
        model, sampling, mesh, steps, prompts_per_step, minibatches, microbatches,
        max_prompt_tokens, rollout_batches,
    )  # fmt: skip


def check_counts(
    seed: int,
    eval_every: int,
    checkpoint_every: int,
    exact_divergence_every: int,
    samples_logged: int,
) -> None:
    """Refuses seeds beyond 32 bits and negative periods and counts."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: take one of 0 to {2**32 - 1}")
    counts = dict(
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
        exact_divergence_every=exact_divergence_every,
        samples_logged=samples_logged,
    )
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name}={count} must not be negative: 0 is never")


def check_layout(
    model: DecoderConfig,
    sampling: SamplingConfig,
    mesh: Mesh | AbstractMesh,
    steps: int,
    prompts_per_step: int,
    minibatches: int,
    microbatches: int,
    max_prompt_tokens: int,
    rollout_batches: int = 1,
) -> None:
    """What of it needs no tokenizer."""
    sampling.check(model.vocab_size)
    if steps < 1:
        raise ValueError(f"steps={steps}: a run takes at least 1")
    if sampling.temperature == 0:
        raise ValueError("temperature=0 explores nothing: set a positive sampling temperature")
    if sampling.filters.on and not sampling.replays:
        raise ValueError(
            f"top_k={sampling.top_k}, top_p={sampling.top_p}, min_p={sampling.min_p}: training "
            "samples from the whole distribution, the one that it scores; leave these three at "
            "0, 1 and 0 (evaluation may set them), or set truncated_sampling='replay'"
        )
    if sampling.replays and sampling.top_k > sampling.top_k_capture:
        raise ValueError(
            f"top_k={sampling.top_k} keeps more than the top_k_capture={sampling.top_k_capture} "
            "tokens that are recorded: raise top_k_capture to it"
        )
    counts = {"minibatches": minibatches, "microbatches": microbatches}
    for name, parts in (counts | {"rollout_batches": rollout_batches}).items():
        if parts < 1:
            raise ValueError(f"{name}={parts} must be at least 1")
    if prompts_per_step % (minibatches * microbatches):
        raise ValueError(
            f"prompts_per_step={prompts_per_step} does not divide into minibatches={minibatches} x "
            f"microbatches={microbatches}: change one of them"
        )
    if prompts_per_step % rollout_batches:
        raise ValueError(
            f"prompts_per_step={prompts_per_step} does not divide into "
            f"rollout_batches={rollout_batches}: change one of them"
        )
    check_divides(
        mesh,
        "batch",
        {
            "prompts_per_step": prompts_per_step,
            "prompts of a rollout batch": prompts_per_step // rollout_batches,
            "prompts of a microbatch": prompts_per_step // (minibatches * microbatches),
        },
    )
    lengths = {
        "max_prompt_tokens": max_prompt_tokens,
        "max_new_tokens": sampling.max_new_tokens,
    }
    check_divides(mesh, "columns", lengths, "compute")
    if mesh.shape["expert"] > 1 and not model.experts:
        raise ValueError(
            f"the mesh has expert={mesh.shape['expert']}, the model no experts: give its devices "
            "to fsdp"
        )
    _check_model_divides(model, mesh)


def check_routing(model: DecoderConfig, routing: str) -> None:
    """Refuses to replay the routing of a model that has none."""
    if routing != "native" and not model.experts:
        raise ValueError(f'routing="{routing}" needs a model with experts: leave it at "native"')


def _check_model_divides(model: DecoderConfig, mesh: Mesh | AbstractMesh) -> None:
    """Key-value heads are never copied: `tensor` is at most their number."""
    for axis, sizes in (
        ("embed", {"width": model.width}),
        ("vocab", {"vocab_size": model.vocab_size}),
        ("heads", {"heads": model.heads}),
        ("kv_heads", {"kv_heads": model.kv_heads}),
        ("mlp", {"mlp_width": model.mlp_width}),
        ("experts", {"experts": model.experts}),
    ):
        check_divides(mesh, axis, sizes)


def check_needs(
    needs: frozenset[Need],
    objective: Objective,
    advantage: Estimator,
    critic: Critic | HeadCritic | None,
    tokenizer: Tokenizer,
    mesh: Mesh,
    sampling: SamplingConfig,
) -> None:
    """Refuses an objective or an estimator without what it needs, and a critic that nobody uses."""
    if "uniform_logp" in needs and sampling.replays:
        raise ValueError(
            "the objective needs the mean log-probability over the vocabulary, which is -inf with "
            "top_k, top_p or min_p: leave them at 0, 1 and 0"
        )
    if "last_layer" in needs and sampling.replays:
        raise ValueError(
            "the objective needs sums over the whole vocabulary's distribution, which is not what "
            "top_k, top_p or min_p sample from: leave them at 0, 1 and 0"
        )
    if critic is not None:
        _check_critic(critic, objective, tokenizer, mesh)
    elif "values" in needs:
        raise ValueError(
            "the objective or the advantage estimator needs a critic: set train.critic to "
            "critic.ValueModel()"
        )
    dry_call(objective, advantage, critic, sampling)


def _check_critic(
    critic: Critic | HeadCritic, objective: Objective, tokenizer: Tokenizer, mesh: Mesh
) -> None:
    if "values" not in objective.needs:
        raise ValueError(
            "the critic would learn nothing: wrap the objective in objectives.with_value_loss()"
        )
    if tokenizer.vocab_size > critic.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the critic vocab_size="
            f"{critic.config.vocab_size}: set it to at least the tokenizer's"
        )
    _check_model_divides(critic.config, mesh)


def write_files(directory: Path, texts: Mapping[str, str]) -> None:
    """Each file as a whole or not at all; by the writing process."""
    if not is_writer():
        return
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        unfinished = directory / f"{name}.new"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(directory / name)
