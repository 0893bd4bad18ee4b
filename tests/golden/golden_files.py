"""Reads the recorded outputs of the reference implementations; says in one line what is wrong."""

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROW_KEYS = {
    "impl": str,
    "loss_mode": str,
    "case": str,
    "clip_ratio_low": (int, float),
    "clip_ratio_high": (int, float),
    "clip_ratio_c": (int, float),
    "loss_agg_mode": str,
    "old_is": str,
    "loss": (int, float),
    "d_log_prob": list,
}
OPTIONAL_ROW_KEYS = {"token_mask", "metrics", "k"}
CASE_ARRAYS = ("rollout_log_prob", "old_log_prob", "log_prob", "advantages", "response_mask")
TOPK_KEYS = ("k", "topk_ids", "topk_rollout_logprobs", "topk_kl", "topk_tv")


class BadInput(Exception):
    """A file that does not say what it should; the message is one line for the user."""


@dataclass(frozen=True)
class Topk:
    """One entry of a top-K file: K stored slots of a case, and the recorded divergences."""

    case: str
    ids: np.ndarray  # [B, T, K]
    logp_rollout: np.ndarray  # [B, T, K]
    logp: np.ndarray  # [B, T, K], of the new policy
    tv: np.ndarray  # [B, T]
    kl: np.ndarray  # [B, T]


def array(values: Any, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    try:
        result = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise BadInput(f"{name} is not an array of numbers") from None
    if result.ndim < 2 or (shape is not None and result.shape != shape):
        raise BadInput(f"{name} has shape {result.shape}, expected {shape or '[B, T]'}")
    return result


def read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is not JSON: {error}") from None


def read_rows(path: Path) -> list[tuple[str, dict]]:
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise BadInput(f"{where} is not a JSON object")
        for key, kind in ROW_KEYS.items():
            if not isinstance(row.get(key), kind):
                raise BadInput(f"{where}: {key!r} is {row.get(key, 'missing')!r}")
        if unknown := sorted(row.keys() - ROW_KEYS.keys() - OPTIONAL_ROW_KEYS):
            raise BadInput(f"{where}: unknown key {unknown[0]!r}")
        rows.append((where, row))
    if not rows:
        raise BadInput(f"{path} has no rows")
    return rows


def advantages_in(path: Path) -> dict | None:
    """A file of advantages, KL penalties and aggregations: one JSON object over several lines."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError:
        return None
    return content if isinstance(content, dict) and "advantages" in content else None


def read_cases(path: Path) -> dict[str, dict[str, np.ndarray]]:
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise BadInput(f"{path} is not an object of cases")
    cases = {}
    for name, case in raw.items():
        if not isinstance(case, dict) or (missing := [k for k in CASE_ARRAYS if k not in case]):
            raise BadInput(f"{path}: case {name!r} has no {missing[0] if missing else 'arrays'!r}")
        shape = array(case["log_prob"], f"{path}: {name}/log_prob").shape
        cases[name] = {
            key: array(case[key], f"{path}: {name}/{key}", shape)
            for key in (*CASE_ARRAYS, *(k for k in case if k == "token_ids"))
        }
    return cases


def read_topk(path: Path, cases: dict[str, dict[str, np.ndarray]]) -> list[Topk]:
    """Entries with the new policy's log-probabilities inside, or in an .npz beside the file."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise BadInput(f"{path} is not a list of top-K entries")
    topks = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise BadInput(f"{path}: an entry is not an object")
        if missing := [key for key in TOPK_KEYS if key not in entry]:
            raise BadInput(f"{path}: an entry has no {missing[0]!r}")
        ids = array(entry["topk_ids"], f"{path}: topk_ids").astype(np.int64)
        if ids.ndim != 3 or ids.shape[-1] != entry["k"]:
            raise BadInput(f"{path}: topk_ids of k={entry['k']} have shape {ids.shape}")
        case = entry.get("case") or matching_case(ids, entry, cases, path)
        logp = entry.get("topk_new_logprobs")
        topks.append(
            Topk(
                case,
                ids,
                array(entry["topk_rollout_logprobs"], f"{path}: topk_rollout_logprobs", ids.shape),
                new_logprobs(path, ids)
                if logp is None
                else array(logp, f"{path}: topk_new_logprobs", ids.shape),
                array(entry["topk_tv"], f"{path}: topk_tv", ids.shape[:2]),
                array(entry["topk_kl"], f"{path}: topk_kl", ids.shape[:2]),
            )
        )
    return topks


def matching_case(ids: np.ndarray, entry: dict, cases: dict, path: Path) -> str:
    """The case whose sampled tokens have, in the slots that hold them, the same rollout values."""
    stored = array(entry["topk_rollout_logprobs"], f"{path}: topk_rollout_logprobs", ids.shape)
    for name, case in cases.items():
        if "token_ids" not in case or case["token_ids"].shape != ids.shape[:2]:
            continue
        held = ids == case["token_ids"][..., None]
        sampled = np.broadcast_to(case["rollout_log_prob"][..., None], ids.shape)
        if held.any() and np.allclose(stored[held], sampled[held], atol=1e-5):
            return name
    raise BadInput(f"{path}: no case of the inputs sampled the tokens of k={entry['k']}")


def new_logprobs(path: Path, ids: np.ndarray) -> np.ndarray:
    for candidate in sorted(path.parent.glob("*.npz")):
        with np.load(candidate) as arrays:
            if "new" in arrays and arrays["new"].shape[:2] == ids.shape[:2]:
                return np.take_along_axis(arrays["new"], ids, axis=-1).astype(np.float32)
    raise BadInput(f"{path}: no .npz beside it has the new policy's log-probabilities ('new')")
