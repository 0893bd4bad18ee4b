"""Cuts the stored goldens out of the full recordings: python tests/golden/make.py SOURCE_DIR

SOURCE_DIR holds policy_losses.jsonl.gz, inputs.json, topk_divergence.json,
stories260K_logprobs.npz, advantages_kl_agg.json and META.json: outputs of Stable-RL and verl run
unmodified on CPU in float32 (META.json names the commits). Kept are one row for each
implementation, mode and case that this package composes, the top-K slots with the new policy's
log-probabilities at them, and the files of inputs, advantages, KL penalties and aggregations whole.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from golden_files import new_logprobs, read_json, read_rows  # noqa: E402
from golden_modes import MODES  # noqa: E402


def compressed(name: str, text: str) -> None:
    """Writes the same bytes for the same text: no time stamp."""
    (HERE / name).write_bytes(gzip.compress(text.encode(), mtime=0))


def short(values: Any) -> Any:
    """Floats with the digits that tell float32 numbers apart, and no more."""
    if isinstance(values, list):
        return [short(value) for value in values]
    return float(str(np.float32(values))) if isinstance(values, float) else values


def policy_losses(source: Path) -> None:
    kept = {}
    for _, row in read_rows(source / "policy_losses.jsonl.gz"):
        if (row["impl"], row["loss_mode"]) in MODES:
            kept.setdefault((row["impl"], row["loss_mode"], row["case"], row["old_is"]), row)
    lines = [json.dumps({k: short(v) for k, v in row.items()}) for row in kept.values()]
    compressed("policy_losses.jsonl.gz", "\n".join(lines) + "\n")


def topk_divergence(source: Path) -> None:
    path = source / "topk_divergence.json"
    entries = read_json(path)
    for entry in entries:
        logp = new_logprobs(path, np.asarray(entry["topk_ids"]))
        entry["topk_new_logprobs"] = logp.astype(float).tolist()
    text = json.dumps([{k: short(v) for k, v in entry.items()} for entry in entries])
    compressed("topk_divergence.json.gz", text)


def main(source: Path) -> None:
    policy_losses(source)
    topk_divergence(source)
    for name in ("inputs.json", "META.json", "advantages_kl_agg.json"):
        (HERE / name).write_bytes((source / name).read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
