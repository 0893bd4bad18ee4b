"""Reads the weights of llama2.c's `.bin` files (karpathy/llama2.c, legacy version-0 export).

Seven int32: dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative where the head is
untied), max_seq_len; then float32 matrices, each [out, in], layer after layer.
"""

from pathlib import Path

import numpy as np

from dppo_jax.models.decoder import DecoderConfig, Params

HEADER = 7


def read_llama2c(path: str | Path, config: DecoderConfig) -> Params:
    """The file's weights as `Model(config)`'s parameters, on the host.

    Raises ValueError where the file is cut off or its sizes are not those of `config`.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a llama2.c .bin file")
    raw = path.read_bytes()
    if len(raw) < 4 * HEADER:
        raise ValueError(f"{path}: too short for a llama2.c header")
    width, mlp, layers, heads, kv_heads, vocab, max_length = np.frombuffer(raw, "<i4", HEADER)
    in_file = dict(
        width=width,
        mlp_width=mlp,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        vocab_size=abs(vocab),
        tied_embeddings=vocab > 0,
        head_size=width // max(1, heads),
    )
    for name, value in in_file.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{path} has {name}={value}, the recipe {name}={getattr(config, name)}: "
                "change the recipe's DecoderConfig"
            )
    weights = np.frombuffer(raw, "<f4", offset=4 * HEADER)
    offset = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal offset
        size = int(np.prod(shape))
        if offset + size > len(weights):
            raise ValueError(f"{path} is cut off: it ends inside its weights")
        offset += size
        return weights[offset - size : offset].reshape(shape)

    def projection(out: int, into: int) -> np.ndarray:  # stored [out, in], applied as x @ w
        return take(config.layers, out, into).swapaxes(1, 2)

    def rotated(out: int) -> np.ndarray:
        """Queries and keys: from rope on the pairs (2i, 2i+1) to rope on (i, i + d/2)."""
        matrix = take(config.layers, out, config.width)
        heads = matrix.reshape(config.layers, -1, config.head_size // 2, 2, config.width)
        return heads.swapaxes(2, 3).reshape(matrix.shape).swapaxes(1, 2)

    c = config
    keys = c.kv_heads * c.head_size
    params: Params = {"embedding": take(c.vocab_size, c.width)}
    blocks = {
        "attention_norm": take(c.layers, c.width),
        "q": rotated(c.width),
        "k": rotated(keys),
        "v": projection(keys, c.width),
        "o": projection(c.width, c.width),
        "mlp_norm": take(c.layers, c.width),
        "gate": projection(c.mlp_width, c.width),
        "down": projection(c.width, c.mlp_width),
        "up": projection(c.mlp_width, c.width),
    }
    params["blocks"] = blocks
    params["final_norm"] = take(c.width)
    take(2 * int(max_length) * c.head_size // 2)  # rope tables, which we compute
    if not c.tied_embeddings:
        params["unembedding"] = take(c.vocab_size, c.width)
    return params
