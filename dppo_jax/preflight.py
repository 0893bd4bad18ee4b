"""What a training run is refused for before anything is computed."""

from jax.sharding import Mesh

from dppo_jax.models.config import DecoderConfig
from dppo_jax.prompts.tokenizers import Tokenizer
from dppo_jax.sampling.generate import SamplingConfig
from dppo_jax.sharding import check_divides


def check_run(
    model: DecoderConfig,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    mesh: Mesh,
    prompts_per_step: int,
    minibatches: int,
    microbatches: int,
) -> None:
    """Raises ValueError with one line where parts of the configuration contradict each other."""
    sampling.check(model.vocab_size)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model vocab_size="
            f"{model.vocab_size}: set DecoderConfig.vocab_size to at least the tokenizer's"
        )
    if sampling.temperature == 0:
        raise ValueError("temperature=0 explores nothing: set a positive sampling temperature")
    if sampling.filters.on:
        raise ValueError(
            f"top_k={sampling.top_k}, top_p={sampling.top_p}, min_p={sampling.min_p}: training "
            "samples from the whole distribution, the one that it scores; leave these three at "
            "0, 1 and 0 (evaluation may set them)"
        )
    for name, parts in (("minibatches", minibatches), ("microbatches", microbatches)):
        if parts < 1:
            raise ValueError(f"{name}={parts} must be at least 1")
    if prompts_per_step % (minibatches * microbatches):
        raise ValueError(
            f"prompts_per_step={prompts_per_step} does not divide into minibatches={minibatches} x "
            f"microbatches={microbatches}: change one of them"
        )
    check_divides(
        mesh,
        ("data", "fsdp"),
        {
            "prompts_per_step": prompts_per_step,
            "prompts of a microbatch": prompts_per_step // (minibatches * microbatches),
        },
    )
    check_divides(mesh, ("fsdp",), {"width": model.width})
    check_divides(
        mesh,
        ("tensor",),
        {
            "vocab_size": model.vocab_size,
            "heads": model.heads,
            "kv_heads": model.kv_heads,
            "mlp_width": model.mlp_width,
        },
    )
