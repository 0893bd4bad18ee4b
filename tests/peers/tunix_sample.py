"""Tokens a second of tunix's sampler on the CPU: python tunix_sample.py --help."""

import contextlib
import os
import sys

import numpy as np
from peer_bench import text_of
from sampling_bench import MODEL, parse_args, prompt_ids, report


def main() -> None:
    args = parse_args("tunix's sampler with log-probabilities, a random Qwen3 in float32")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["HF_HUB_OFFLINE"] = "1"
    with contextlib.redirect_stdout(sys.stderr):
        run = prepare(args)
    packages = ["google-tunix", "jax", "jaxlib", "flax"]
    report(args, "tunix sampler", packages, run)


def prepare(args):
    """A function that samples once."""
    import jax
    from flax import nnx
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.qwen3 import model as qwen3
    from tunix_grpo_step import Words

    model = qwen3.Qwen3(
        qwen3.ModelConfig(
            num_layers=MODEL["layers"],
            vocab_size=args.vocab,
            embed_dim=MODEL["width"],
            hidden_dim=MODEL["mlp"],
            num_heads=MODEL["heads"],
            head_dim=MODEL["head_size"],
            num_kv_heads=MODEL["kv_heads"],
            rope_theta=1_000_000,
            norm_eps=1e-6,
            use_tied_embedding=True,
            dtype=jax.numpy.float32,
            param_dtype=jax.numpy.float32,
        ),
        rngs=nnx.Rngs(0),
    )
    cache = CacheConfig(
        cache_size=args.prompt_tokens + args.new_tokens,
        num_layers=MODEL["layers"],
        num_kv_heads=MODEL["kv_heads"],
        head_dim=MODEL["head_size"],
    )
    tokenizer = Words(args.vocab)
    sampler = Sampler(model, tokenizer, cache)
    prompts = [text_of(ids) for ids in prompt_ids(args)]

    def run():
        out = sampler(
            prompts,
            max_generation_steps=args.new_tokens,
            max_prompt_length=args.prompt_tokens,
            return_logprobs=True,
            temperature=1.0,
            top_p=1.0,
            seed=0,
        )
        return sum(len(tokens) for tokens in out.tokens), np.concatenate(out.logprobs)

    return run


if __name__ == "__main__":
    main()
