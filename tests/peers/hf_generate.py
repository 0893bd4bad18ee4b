"""Tokens a second of Hugging Face's generate on the CPU: python hf_generate.py --help."""

import contextlib
import os
import sys

import numpy as np
from sampling_bench import MODEL, parse_args, prompt_ids, report


def main() -> None:
    args = parse_args("transformers' generate with log-probabilities, a random Qwen3 in float32")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with contextlib.redirect_stdout(sys.stderr):
        import torch
        import transformers

        torch.set_num_threads(args.threads)
        transformers.set_seed(0)
        model = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                vocab_size=args.vocab,
                hidden_size=MODEL["width"],
                intermediate_size=MODEL["mlp"],
                num_hidden_layers=MODEL["layers"],
                num_attention_heads=MODEL["heads"],
                num_key_value_heads=MODEL["kv_heads"],
                head_dim=MODEL["head_size"],
                max_position_embeddings=args.prompt_tokens + args.new_tokens,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        )
        model = model.float().eval()
        ids = torch.from_numpy(prompt_ids(args))
        mask = torch.ones_like(ids)

    def run():
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=args.new_tokens,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            new = out.sequences[:, args.prompt_tokens :]
            logp = torch.stack(
                [
                    torch.log_softmax(logits.float(), -1).gather(1, new[:, t : t + 1])[:, 0]
                    for t, logits in enumerate(out.logits)
                ],
                dim=1,
            )
        return new.numel(), np.asarray(logp)

    report(args, "transformers generate", ["transformers", "torch"], run)


if __name__ == "__main__":
    main()
