"""Reproduces recorded policy losses of Stable-RL and verl with this package's objectives.

    python tests/golden/check.py policy_losses.jsonl.gz --inputs inputs.json [--topk FILE]
    python tests/golden/check.py advantages_kl_agg.json --inputs inputs.json

Prints the largest error of loss, token mask and gradient for each implementation and mode, or of
each advantage estimator, KL penalty and aggregation. Exit status: 0 all within tolerance, 1 some
error past it, 2 the files cannot be read.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # check this tree, installed or not

from golden_advantages import all_errors  # noqa: E402
from golden_files import (  # noqa: E402
    BadInput,
    Topk,
    advantages_in,
    array,
    read_cases,
    read_rows,
    read_topk,
)
from golden_modes import MODES, MU, REFERENCE_CAP, Mode, Unchecked, aggregation  # noqa: E402

from dppo_jax import divergence  # noqa: E402
from dppo_jax.records import Batch, Objective, Rollout, TokenStats  # noqa: E402

TOLERANCE = 1e-5
ERROR_NAMES = ("loss", "mask", "gradient")


def batch_of(case: dict, mode: Mode, old_is: str, topk: Topk | None) -> tuple[TokenStats, Batch]:
    logp = jnp.asarray(case["log_prob"])
    b, t = logp.shape
    slots = np.zeros((b, t, 0), np.float32)
    mask = jnp.asarray(case["response_mask"] > 0)
    rollout = Rollout(
        prompt_tokens=jnp.zeros((b, 0), jnp.int32),
        prompt_mask=jnp.zeros((b, 0), jnp.bool_),
        # a recording of K slots does not say which token was sampled: one that they hold
        response_tokens=jnp.asarray(
            topk.ids[..., 0] if topk else case.get("token_ids", np.zeros((b, t))), jnp.int32
        ),
        response_mask=mask,
        logp_rollout=jnp.asarray(case[mode.rollout_is or old_is]),
        topk_ids=jnp.asarray(topk.ids if topk else slots, jnp.int32),
        topk_logp_rollout=jnp.asarray(topk.logp_rollout if topk else slots),
        entropy_rollout=jnp.zeros((b, t)),
        finish_reason=jnp.zeros(b, jnp.int32),
    )
    stats = TokenStats(logp, jnp.asarray(topk.logp if topk else slots), jnp.zeros((b, t)))
    return stats, Batch(rollout, jnp.asarray(case["advantages"]), jnp.asarray(case[old_is]))


def evaluate(objective: Objective, stats: TokenStats, batch: Batch) -> tuple[float, np.ndarray]:
    def loss(logp: jax.Array) -> jax.Array:
        result = objective.loss(TokenStats(logp, stats.topk_logp, stats.entropy), batch)
        return result.loss_sum / result.weight_sum

    value, gradient = jax.value_and_grad(loss)(stats.logp)
    return float(value), np.asarray(gradient)


def relative_error(ours: Any, reference: Any) -> float:
    """max |ours - reference| / max(1, |reference|); NaN equals NaN (a batch without tokens)."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    error = np.abs(ours - reference) / np.maximum(1.0, np.abs(reference))
    return float(np.where(np.isnan(ours) & np.isnan(reference), 0.0, error).max(initial=0.0))


def check_row(row: dict, where: str, cases: dict, topks: list[Topk]) -> dict[str, float]:
    """Errors of one row by name; `Unchecked` where the package cannot be asked."""
    mode = MODES.get((row["impl"], row["loss_mode"]))
    if row["case"] not in cases:
        raise BadInput(f"{where}: case {row['case']!r} is not in the inputs")
    case = cases[row["case"]]
    if row["old_is"] not in ("old_log_prob", MU):
        raise BadInput(f"{where}: old_is is {row['old_is']!r}, not old_log_prob or {MU}")
    gradient = array(row["d_log_prob"], f"{where}: d_log_prob", case["log_prob"].shape)
    if mode is None:
        raise Unchecked("mode is not known")
    mask = case["response_mask"] > 0
    aggregate = aggregation(row["impl"], row["loss_agg_mode"], mask)
    topk = find_topk(topks, row) if mode.topk else None
    cap = min(row["clip_ratio_c"], REFERENCE_CAP)
    low, high = float(row["clip_ratio_low"]), float(row["clip_ratio_high"])
    try:
        objective = mode.build(low, high, float(cap), aggregate)
    except ValueError as refusal:
        raise Unchecked(str(refusal)) from None
    ours, our_gradient = evaluate(objective, *batch_of(case, mode, row["old_is"], topk))
    errors = {
        "loss": relative_error(ours, row["loss"]),
        "gradient": relative_error(our_gradient, gradient),
    }
    if "token_mask" in row:
        kept = array(row["token_mask"], f"{where}: token_mask", case["log_prob"].shape)
        # a token is kept where it has a gradient; without advantage no mask can be told
        decided = case["advantages"] != 0
        errors["mask"] = relative_error((our_gradient != 0)[decided], kept[decided])
    return errors


def find_topk(topks: list[Topk], row: dict) -> Topk:
    fitting = [topk for topk in topks if topk.case == row["case"]]
    if "k" in row:
        fitting = [topk for topk in fitting if topk.ids.shape[-1] == row["k"]]
    if not fitting:
        raise Unchecked("no top-K log-probabilities of its case beside the inputs (--topk)")
    return max(fitting, key=lambda topk: topk.ids.shape[-1])


def report_losses(rows: list[tuple[str, dict]], cases: dict, topks: list[Topk]) -> float:
    worst: dict[tuple[str, str], dict[str, float]] = {}
    counts: Counter = Counter()
    unchecked: Counter = Counter()
    for where, row in rows:
        key = (row["impl"], row["loss_mode"])
        try:
            errors = check_row(row, where, cases, topks)
        except Unchecked as reason:
            unchecked[(*key, str(reason))] += 1
            continue
        counts[key] += 1
        seen = worst.setdefault(key, {})
        for name, error in errors.items():
            seen[name] = float(np.maximum(seen.get(name, 0.0), error))  # keeps NaN
    print(f"{'implementation':15}{'mode':27}{'rows':>5}{'loss':>10}{'mask':>10}{'gradient':>10}")
    for key, seen in worst.items():
        figures = (f"{seen[n]:10.1e}" if n in seen else "         -" for n in ERROR_NAMES)
        print(f"{key[0]:15}{key[1]:27}{counts[key]:5}{''.join(figures)}")
    print(f"checked {counts.total()} of {len(rows)} rows")
    for (impl, mode, reason), count in unchecked.items():
        print(f"not checked: {impl} {mode}, {count} rows: {reason}")
    return float(np.max([e for seen in worst.values() for e in seen.values()], initial=0.0))


def report_advantages(recorded: dict, cases: dict) -> float:
    errors = all_errors(recorded, cases)
    for name, error in errors.items():
        print(f"{name:45}{error:10.1e}")
    print(f"checked {len(errors)} rows, errors are max |ours - reference|")
    return float(np.max(list(errors.values())))


def report_topk(topks: list[Topk]) -> float:
    worst = 0.0
    for topk in topks:
        stored = jnp.asarray(topk.logp_rollout), jnp.asarray(topk.logp)
        tv = relative_error(divergence.topk_slots_tv(*stored), topk.tv)
        kl = relative_error(divergence.topk_slots_kl(*stored), topk.kl)
        print(f"Top-K divergence {topk.case} k={topk.ids.shape[-1]}: TV {tv:.1e}, KL {kl:.1e}")
        worst = float(np.max([worst, tv, kl]))
    return worst


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", type=Path, help="policy losses, one JSON object a line, or advantages (.gz or not)"
    )
    parser.add_argument("--inputs", type=Path, help="cases (default: inputs.json beside FILE)")
    parser.add_argument(
        "--topk", type=Path, help="top-K entries (default: topk_divergence.json[.gz] beside INPUTS)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    inputs = options.inputs or options.file.parent / "inputs.json"
    try:
        if (recorded := advantages_in(options.file)) is not None:
            return conclude(report_advantages(recorded, read_cases(inputs)))
        rows, cases = read_rows(options.file), read_cases(inputs)
        topks = read_topk(options.topk, cases) if options.topk else topks_beside(inputs, cases)
        worst = np.max([report_losses(rows, cases, topks), report_topk(topks)])
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("errors are max |ours - reference| / max(1, |reference|); masks count where A is not 0")
    return conclude(worst)


def conclude(worst: float) -> int:
    print(f"largest error {worst:.1e}, tolerance {TOLERANCE:.0e}")
    return 0 if worst <= TOLERANCE else 1


def topks_beside(inputs: Path, cases: dict) -> list[Topk]:
    """The top-K entries beside the inputs, which nobody asked for: unusable ones are only named."""
    for name in ("topk_divergence.json", "topk_divergence.json.gz"):
        path = inputs.parent / name
        if path.exists():
            try:
                return read_topk(path, cases)
            except BadInput as error:
                print(f"not checked: {error}")
    return []


if __name__ == "__main__":
    sys.exit(main())
