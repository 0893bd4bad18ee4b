"""Seconds of one step of TRL's DPPOTrainer on the CPU: python trl_dppo_step.py --help."""

import contextlib
import os
import sys
import tempfile

from peer_bench import Clock, parse_args, prompt_ids, text_of, word


def main() -> None:
    args = parse_args("TRL DPPOTrainer (binary TV, no KL), a random Qwen3 in float32 on the CPU")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    clock = Clock(args)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as scratch:
        threads, change = train(args, clock, scratch)
    packages = ["trl", "torch", "transformers", "accelerate", "datasets", "tokenizers"]
    clock.report("trl DPPOTrainer", packages, threads, change)


def train(args, clock: Clock, scratch: str) -> tuple[int, float]:
    """Run all steps; the threads torch used and the largest change of a weight."""
    import datasets
    import tokenizers
    import torch
    import transformers
    from trl.experimental.dppo import DPPOConfig, DPPOTrainer

    torch.set_num_threads(args.threads)
    transformers.set_seed(args.seed)

    # One word a token; <pad> and <eos> lie above the model's vocabulary and are never sampled.
    pad, end = args.vocab, args.vocab + 1
    vocabulary = {word(i): i for i in range(args.vocab)} | {"<pad>": pad, "<eos>": end}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    prompts = [text_of(ids) for ids in prompt_ids(args)]
    assert {len(ids) for ids in tokenizer(prompts)["input_ids"]} == {args.prompt_tokens}

    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=args.vocab,
            hidden_size=args.width,
            intermediate_size=args.intermediate,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            head_dim=args.head_size,
            max_position_embeddings=args.prompt_tokens + args.response_tokens,
            tie_word_embeddings=args.tie,
            bos_token_id=None,
            eos_token_id=None,  # the trainer takes it from the tokenizer
            pad_token_id=None,
        )
    ).float()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}

    class StepEnds(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock.step_end()

        def on_step_end(self, *_, **__):
            clock.step_end()

    def even_ids(completion_ids, **_):
        return clock.reward(completion_ids)

    trainer = DPPOTrainer(
        model=model,
        reward_funcs=even_ids,
        args=DPPOConfig(
            output_dir=scratch,
            divergence_type="binary_tv",
            beta=0.0,  # no reference model
            scale_rewards="none",
            num_generations=args.samples,
            max_completion_length=args.response_tokens,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            per_device_train_batch_size=args.micro_prompts * args.samples,
            gradient_accumulation_steps=args.prompts // args.micro_prompts,
            num_iterations=1,
            max_steps=args.warmup + args.steps,
            learning_rate=args.lr,
            lr_scheduler_type="constant",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            seed=args.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[StepEnds()],
    )
    trainer.train()
    changes = [
        (value.detach() - before[name]).abs().max().item()
        for name, value in model.named_parameters()
    ]
    assert all(value.dtype == torch.float32 for value in model.parameters())
    return torch.get_num_threads(), max(changes)


if __name__ == "__main__":
    main()
