"""What the peer scripts share: shape flags, prompts, reward, step clock and report."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time

import numpy as np

SHAPE_FLAGS = {  # name: (default, help)
    "vocab": (
        1024,
        "token ids the model knows; padding and end ids lie above, so nothing ends early",
    ),
    "width": (256, "width of the residual stream"),
    "layers": (4, "decoder layers"),
    "heads": (4, "query heads"),
    "kv-heads": (4, "key and value heads"),
    "head-size": (64, "width of one head"),
    "intermediate": (1024, "width of the SwiGLU MLP"),
    "prompts": (16, "prompts a step"),
    "samples": (8, "samples a prompt"),
    "prompt-tokens": (32, "tokens of every prompt"),
    "response-tokens": (128, "tokens of every response"),
}


def parse_args(description: str) -> argparse.Namespace:
    """Command line of a peer script; also restricts the process to `--threads` cores."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before them")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores to use")
    parser.add_argument(
        "--micro-prompts",
        type=int,
        default=None,
        help="prompts a forward and backward pass (default: all; must divide --prompts)",
    )
    parser.add_argument("--lr", type=float, default=1e-6, help="AdamW learning rate")
    parser.add_argument("--seed", type=int, default=0, help="weights and prompts")
    parser.add_argument(
        "--tie",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="share embedding and unembedding",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no more")
    for name, (default, text) in SHAPE_FLAGS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    args = parser.parse_args()
    positive = ["steps", "threads", *(name.replace("-", "_") for name in SHAPE_FLAGS)]
    for name in positive:
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.warmup < 0:
        parser.error("--warmup must not be negative")
    if args.samples < 2:
        parser.error("--samples must be at least 2: advantages are relative to a group")
    if args.heads % args.kv_heads:
        parser.error("--kv-heads must divide --heads")
    if args.micro_prompts is None:
        args.micro_prompts = args.prompts
    if args.micro_prompts < 1 or args.prompts % args.micro_prompts:
        parser.error("--micro-prompts must divide --prompts")
    limit_threads(args.threads)
    return args


def limit_threads(threads: int) -> None:
    """Keep this process on `threads` cores; call before torch or jax is imported."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["MKL_NUM_THREADS"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) < threads:
            raise SystemExit(f"--threads {threads}: this process may use {len(allowed)} cores")
        os.sched_setaffinity(0, allowed[:threads])


def word(token_id: int) -> str:
    """The word that stands for a token id, in prompts and responses alike."""
    return f"t{token_id}"


def prompt_ids(args: argparse.Namespace) -> np.ndarray:
    """Random prompts, [all steps * prompts, prompt tokens]."""
    rng = np.random.default_rng(args.seed)
    rows = (args.warmup + args.steps) * args.prompts
    return rng.integers(0, args.vocab, size=(rows, args.prompt_tokens))


def text_of(ids) -> str:
    return " ".join(word(int(i)) for i in ids)


class Clock:
    """Marks the ends of steps and, within a step, the moment the rewards are asked for."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.ends: list[float] = []
        self.sampled: list[float] = []
        self.rewards: list[float] = []

    def step_end(self) -> None:
        """Call once when training starts and then at the end of every step."""
        self.ends.append(time.perf_counter())

    def reward(self, responses: list[list[int]]) -> list[float]:
        """Number of even token ids in each response; insists on full-length responses."""
        self.sampled.append(time.perf_counter())
        lengths = {len(ids) for ids in responses}
        if lengths != {self.args.response_tokens}:
            raise RuntimeError(f"responses of {sorted(lengths)} tokens; sampling ended early")
        expected = self.args.prompts * self.args.samples
        if len(responses) != expected:
            raise RuntimeError(f"{len(responses)} responses in one call, not {expected}")
        rewards = [float(sum(i % 2 == 0 for i in ids)) for ids in responses]
        self.rewards.extend(rewards)
        return rewards

    def report(self, peer: str, packages: list[str], threads: int, weight_change: float) -> None:
        """Print what was measured. `weight_change`: largest change of any weight."""
        args = self.args
        expected = args.warmup + args.steps
        if len(self.ends) != expected + 1 or len(self.sampled) != expected:
            raise RuntimeError(
                f"{len(self.ends) - 1} steps and {len(self.sampled)} rollouts, not {expected}"
            )
        if not weight_change > 0:
            raise RuntimeError("the optimizer changed no weight")
        seconds = np.diff(self.ends)[args.warmup :].tolist()
        sampling = (np.array(self.sampled) - self.ends[:-1])[args.warmup :].tolist()
        tokens = args.prompts * args.samples * args.response_tokens
        shape = {
            name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in SHAPE_FLAGS
        }
        result = {
            "peer": peer,
            "step_seconds": {
                "min": min(seconds),
                "median": statistics.median(seconds),
                "all": seconds,
            },
            "sampling_seconds": {  # part of the step, up to the call of the reward
                "min": min(sampling),
                "median": statistics.median(sampling),
            },
            "response_tokens_per_second": tokens / statistics.median(seconds),
            "steps": args.steps,
            "warmup": args.warmup,
            "shape": shape
            | {"micro_prompts": args.micro_prompts, "tied": args.tie, "dtype": "float32"},
            "threads": threads,
            "reward_mean": float(np.mean(self.rewards)),
            "reward_std": float(np.std(self.rewards)),
            "weight_change_max": weight_change,
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in packages},
            "machine": platform.machine(),
        }
        if args.json:
            print(json.dumps(result))
            return
        step, sample = result["step_seconds"], result["sampling_seconds"]
        print(f"{peer}: {step['min']:.3f} s a step (min), {step['median']:.3f} s (median)")
        print(f"  of which sampling {sample['min']:.3f} s (min), {sample['median']:.3f} s (median)")
        print(f"  {args.steps} steps after {args.warmup} warm-up, {threads} threads")
        for name in ("shape", "versions"):
            print(f"  {name}: " + ", ".join(f"{k} {v}" for k, v in result[name].items()))
        print(f"  reward {result['reward_mean']:.2f} +- {result['reward_std']:.2f}", end="")
        print(f", largest weight change {weight_change:.2e}")
        sys.stdout.flush()
