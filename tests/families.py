"""Tiny models of the supported families as transformers makes them: odd sizes, uneven weights."""

import warnings
import zlib

import jax
import numpy as np
import pytest

from dppo_jax.models.hf_weights import leaves_of

SMALL = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=76,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,  # heads x head_dim is not the width
    rms_norm_eps=1e-5,
    max_position_embeddings=256,
    pad_token_id=0,
    tie_word_embeddings=False,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=64)
PLAIN = dict(rope_type="default", rope_theta=1e4)
GEMMA = dict(query_pre_attn_scalar=14, sliding_window=6, tie_word_embeddings=True)
# name -> (transformers' configuration class, what it is given beside SMALL)
FAMILIES = {
    "llama2": ("LlamaConfig", dict(rope_parameters=PLAIN, num_key_value_heads=6, head_dim=8)),
    "llama3": ("LlamaConfig", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "mistral": ("MistralConfig", dict(rope_parameters=PLAIN, sliding_window=5)),
    "qwen2": (
        "Qwen2Config",
        dict(rope_parameters=PLAIN | dict(rope_theta=1e6), tie_word_embeddings=True, head_dim=8),
    ),
    "r1_distill_qwen": ("Qwen2Config", dict(rope_parameters=PLAIN, head_dim=8)),
    "qwen3": ("Qwen3Config", dict(rope_parameters=YARN)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(
            rope_parameters=PLAIN,
            num_experts=7,
            num_experts_per_tok=3,
            moe_intermediate_size=20,
            norm_topk_prob=True,
        ),
    ),
    "gemma2": (
        "Gemma2Config",
        GEMMA | dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA
        | dict(
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                sliding_attention=PLAIN,
            ),
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
}


def transformers_model(family, head="CausalLM", **settings):
    """A float32 model with weights that leave nothing small, norms and biases included."""
    pytest.importorskip("torch", reason="parity needs the extra `parity`: PyTorch, transformers")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    import torch

    kind, changes = FAMILIES[family]
    gemma = kind.startswith("Gemma")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, kind)(**SMALL | changes | settings)
        make = getattr(transformers, f"AutoModelFor{head}")
        model = make.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight += 0.3 * noise + 2.0 * (gemma and name == "model.norm.weight")
            elif weight.ndim == 1:
                weight += 0.5 * noise
            else:
                # Embeddings that are tied and multiplied by √width would repeat their token.
                size = 1.5 if "proj" in name else 0.25 if gemma else 3.0
                weight.copy_(noise * size * weight.shape[-1] ** -0.5)
    return model.eval()


def saved(model, folder, **options):
    """The folder, written by transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def numbered_params(model):
    """Parameters drawn by the names of their tensors, so that no library takes part."""
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), model.abstract_params)
    for leaf in leaves_of(model):
        into = params
        for key in leaf.path:
            into = into[key]
        for name, index in leaf.names.items():
            noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape)
            if len(leaf.shape) == 2:
                noise *= 1.5 * leaf.shape[-1] ** -0.5
            elif "norm" in name:
                noise = 0.3 * noise + (not model.config.unit_offset_norms)
            into[index] = noise.T if leaf.transposed else noise
    return jax.tree.map(jax.numpy.asarray, params)


def left_padded(vocab_size, lengths=(13, 8, 1)):
    """Random tokens [rows, longest] and their mask."""
    longest = max(lengths)
    tokens = np.random.default_rng(0).integers(1, vocab_size, (len(lengths), longest))
    return tokens, np.arange(longest) >= longest - np.asarray(lengths)[:, None]


def torch_logits(model, tokens, mask):
    """transformers' logits, positions counted as here."""
    import torch

    mask = torch.from_numpy(mask)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return model(
        input_ids=torch.from_numpy(tokens), attention_mask=mask.long(), position_ids=positions
    ).logits
