"""Seconds of one step of tunix's GRPO learner on the CPU: python tunix_grpo_step.py --help."""

import contextlib
import os
import sys

from peer_bench import Clock, parse_args, prompt_ids, text_of


def main() -> None:
    args = parse_args("tunix GRPOLearner (no KL), a random Qwen3 in float32 on the CPU")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["HF_HUB_OFFLINE"] = "1"
    clock = Clock(args)
    with contextlib.redirect_stdout(sys.stderr):
        change = train(args, clock)
    packages = ["google-tunix", "jax", "jaxlib", "flax", "optax", "qwix", "numpy"]
    clock.report("tunix GRPOLearner", packages, args.threads, change)


class Words:
    """A tokenizer of one word a token; padding and end lie above the model's vocabulary."""

    def __init__(self, vocab: int):
        self.vocab = vocab

    def encode(self, text: str) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids) -> str:
        return text_of(ids)

    def bos_id(self) -> None:
        return None

    def pad_id(self) -> int:
        return self.vocab

    def eos_id(self) -> int:
        return self.vocab + 1


def train(args, clock: Clock) -> float:
    """Run all steps; the largest change of a weight."""
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    tokenizer = Words(args.vocab)
    length = args.prompt_tokens + args.response_tokens
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    model = qwen3.Qwen3(
        qwen3.ModelConfig(
            num_layers=args.layers,
            vocab_size=args.vocab,
            embed_dim=args.width,
            hidden_dim=args.intermediate,
            num_heads=args.heads,
            head_dim=args.head_size,
            num_kv_heads=args.kv_heads,
            rope_theta=1_000_000,
            norm_eps=1e-6,
            use_tied_embedding=args.tie,
            dtype=jax.numpy.float32,
            param_dtype=jax.numpy.float32,
        ),
        rngs=nnx.Rngs(args.seed),
    )
    # tunix leaves the MLP at zero; draw every matrix as transformers does, N(0, 0.02^2).
    rng = np.random.default_rng(args.seed)
    state = nnx.state(model, nnx.Param)
    nnx.update(
        model,
        jax.tree.map(
            lambda x: (
                jax.device_put(rng.normal(0, 0.02, x.shape).astype(x.dtype), x.sharding)
                if x.ndim > 1
                else x
            ),
            state,
        ),
    )

    def weights():
        return jax.tree.leaves(nnx.state(cluster.actor_trainer.model, nnx.Param))

    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: mesh for role in roles},
            rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(
                    optax.clip_by_global_norm(1.0), optax.adamw(args.lr, weight_decay=0.0)
                ),
                eval_every_n_steps=1 << 30,
                max_steps=1 << 30,  # the data end first
                mini_batch_size=args.prompts,
                train_micro_batch_size=args.micro_prompts,
                rollout_micro_batch_size=args.prompts,
                compute_logps_micro_batch_size=args.prompts,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=args.response_tokens,
                max_prompt_length=args.prompt_tokens,
                kv_cache_size=length,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                eos_tokens=[tokenizer.eos_id()],
            ),
        ),
    )
    before = [np.asarray(x) for x in weights()]

    def even_ids(prompts, completions, **_):
        return clock.reward([tokenizer.encode(text) for text in completions])

    learner = GRPOLearner(
        rl_cluster=cluster,
        algo_config=GRPOConfig(num_generations=args.samples, num_iterations=1, beta=0.0),
        reward_fns=even_ids,
    )

    def batches():
        """One batch a step; asked for the next one, the learner has dispatched the last step."""
        texts = np.array([text_of(ids) for ids in prompt_ids(args)])
        for batch in np.split(texts, args.warmup + args.steps):
            jax.block_until_ready(weights())
            clock.step_end()
            yield {"prompts": batch}
        jax.block_until_ready(weights())
        clock.step_end()

    learner.train(batches())
    after = weights()
    assert all(x.dtype == np.float32 for x in after)
    return max(
        float(np.abs(np.asarray(new) - old).max()) for new, old in zip(after, before, strict=True)
    )


if __name__ == "__main__":
    main()
