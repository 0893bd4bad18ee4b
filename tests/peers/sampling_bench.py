"""What the scripts that time a peer's sampler share: flags, prompts, clock and report."""

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
from peer_bench import limit_threads

PRESETS = {  # as `dppo bench sample`: vocabulary, sequences, prompt tokens, response tokens
    "small-batch": (4096, 16, 64, 128),
    "large-batch": (1024, 128, 32, 128),
}
MODEL = {"width": 256, "layers": 4, "heads": 4, "kv_heads": 4, "head_size": 64, "mlp": 1024}


def parse_args(description: str) -> argparse.Namespace:
    """Command line of a sampling script; also restricts the process to `--threads` cores."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, after one that is not")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores to use")
    parser.add_argument("--new-tokens", type=int, help="instead of the preset's")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no more")
    args = parser.parse_args()
    if args.repeats < 1 or (args.new_tokens is not None and args.new_tokens < 1):
        parser.error("--repeats and --new-tokens must be at least 1")
    args.vocab, args.sequences, args.prompt_tokens, new_tokens = PRESETS[args.preset]
    args.new_tokens = args.new_tokens or new_tokens
    limit_threads(args.threads)
    return args


def prompt_ids(args: argparse.Namespace) -> np.ndarray:
    """Random prompts, [sequences, prompt tokens]."""
    shape = (args.sequences, args.prompt_tokens)
    return np.random.default_rng(0).integers(0, args.vocab, shape)


def report(
    args: argparse.Namespace,
    peer: str,
    packages: list[str],
    run: Callable[[], tuple[int, np.ndarray]],
) -> None:
    """Times `run`, which gives the tokens drawn and log-probabilities, and prints what it took."""
    seconds = []
    for _ in range(1 + args.repeats):
        began = time.perf_counter()
        tokens, logp = run()
        seconds.append(time.perf_counter() - began)
        if tokens != args.sequences * args.new_tokens:
            raise RuntimeError(f"{tokens} tokens; sampling ended early")
        if logp.size != tokens or not (np.isfinite(logp).all() and (logp < 0).all()):
            raise RuntimeError("not a log-probability for each token")
    seconds = seconds[1:]
    result = {
        "peer": peer,
        "preset": args.preset,
        "seconds": {"min": min(seconds), "median": statistics.median(seconds), "all": seconds},
        "tokens_per_second": tokens / statistics.median(seconds),
        "shape": MODEL
        | {"vocab": args.vocab, "sequences": args.sequences}
        | {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens},
        "threads": args.threads,
        "repeats": args.repeats,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{peer}, {args.preset}: {result['tokens_per_second']:,.0f} tokens a second")
