"""Errors of this package's advantages, KL penalties and aggregations against recorded ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden_files import BadInput, array
from golden_modes import aggregation

from dppo_jax import advantages
from dppo_jax.objectives import kl

GROUPED: dict[str, Callable[..., Any]] = {
    "rloo": advantages.leave_one_out,
    "opo": advantages.opo,
    "gpg": advantages.gpg,
    "reinforce_plus_plus_baseline": advantages.reinforce_plus_plus_baseline,
}
BOUNDED = {"ceiling": 10.0}
ESTIMATES: dict[str, kl.KlEstimate] = {
    "k1": kl.k1,
    "k1+": kl.k1_plus,
    "abs": kl.absolute,
    "k2": kl.k2,
    "k2+": kl.k2,
    "k3": partial(kl.k3, **BOUNDED),
    "k3+": partial(kl.k3_plus, **BOUNDED),
}
SECOND_NAMES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


def absolute_error(ours: Any, reference: Any) -> float:
    return float(np.abs(np.asarray(ours, np.float64) - np.asarray(reference, np.float64)).max())


class Samples:
    """The recorded samples as [P, G] and [P*G, T], the slots that a group does not fill empty."""

    def __init__(self, inputs: dict[str, Any]):
        names = list(dict.fromkeys(inputs["index"]))
        members = [[i for i, name in enumerate(inputs["index"]) if name == n] for n in names]
        self.columns = inputs["T"]
        self.shape = len(names), max(map(len, members))
        self.present = np.arange(self.shape[1]) < np.array([[len(m)] for m in members])
        self.order = np.concatenate(members)
        lengths = self.by_group(inputs["lengths"]).reshape(-1, 1)
        self.mask = np.arange(self.columns) < lengths
        self.rewards = self.by_group(inputs["scores"]).astype(np.float32)
        last = np.arange(self.columns) == lengths - 1
        self.token_rewards = np.where(last, self.rewards.reshape(-1, 1), 0).astype(np.float32)
        self.values = self.by_group(inputs["values"]).reshape(-1, self.columns).astype(np.float32)

    def by_group(self, values: Any) -> np.ndarray:
        values = np.asarray(values)
        out = np.zeros((*self.shape, *values.shape[1:]), values.dtype)
        out[self.present] = values[self.order]
        return out

    def error(self, ours: Any, reference: Any) -> float:
        """At response tokens; what the references write elsewhere is not defined."""
        theirs = self.by_group(reference).reshape(-1, self.columns)
        ours = np.broadcast_to(np.asarray(ours).reshape(len(theirs), -1), theirs.shape)
        return absolute_error(ours[self.mask], theirs[self.mask])

    def estimated(self, row: dict[str, Any]) -> Any:
        """[P, G], [B, T] or both advantages and returns; a lone sample's reward kept as verl."""
        kind, rewards = row["estimator"], jnp.asarray(self.rewards)
        tokens, mask = jnp.asarray(self.token_rewards), jnp.asarray(self.mask)
        if kind == "gae":
            values = jnp.asarray(self.values)
            return advantages.gae(tokens, mask, values, gamma=row["gamma"], lam=row["lam"])
        if kind == "reinforce_plus_plus":
            return advantages.reinforce_plus_plus(tokens, mask)
        estimator = GROUPED.get(kind)
        if kind == "grpo":
            normal = row["kwargs"].get("norm_adv_by_std_in_grpo")
            estimator = (
                advantages.group_std_normalized if normal else advantages.group_mean_baseline
            )
        if estimator is None:
            raise BadInput(f"advantages: estimator {kind!r} is not known")
        given = {"rewards": rewards, "present": jnp.asarray(self.present)}
        if "response_mask" in advantages.named_inputs(estimator):
            given["response_mask"] = mask
        return estimator(**given, keep_single=True)


def advantage_errors(recorded: dict[str, Any]) -> dict[str, float]:
    """The largest error of each recorded estimator, returns included."""
    samples, errors = Samples(recorded["inputs"]), {}
    for row in recorded["advantages"]:
        found = samples.estimated(row)
        settings = row.get("kwargs") or {k: row[k] for k in ("gamma", "lam") if k in row}
        name = " ".join([row["estimator"], *(f"{k}={v}" for k, v in settings.items())])
        if isinstance(found, advantages.TokenAdvantages):
            errors[name] = max(
                samples.error(found.advantages, row["advantages"]),
                samples.error(found.returns, row["returns"]),
            )
        else:
            errors[name] = samples.error(found, row["advantages"])
    return errors


def kl_errors(recorded: dict[str, Any], case: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest error of each estimate's value and of its gradient to the log-probability."""
    errors = {}
    logp, logp_ref = jnp.asarray(case["log_prob"]), jnp.asarray(case["old_log_prob"])
    for row in recorded["kl_penalty"]["rows"]:
        name = row["kind"].removesuffix("+")
        estimate = ESTIMATES.get(SECOND_NAMES.get(name, name) + row["kind"][len(name) :])
        if estimate is None:
            raise BadInput(f"kl_penalty: kind {row['kind']!r} is not known")
        value, pullback = jax.vjp(partial(estimate, logp_ref=logp_ref), logp)
        (gradient,) = pullback(jnp.ones_like(value))
        expected = array(row["grad_log_prob"], f"kl_penalty {row['kind']}", logp.shape)
        errors[f"KL {row['kind']}"] = max(
            absolute_error(value, row["value"]), absolute_error(gradient, expected)
        )
    return errors


def aggregation_errors(recorded: dict[str, Any], case: dict[str, np.ndarray]) -> dict[str, float]:
    mask = case["response_mask"] > 0
    errors = {}
    for row in recorded["agg_loss"]:
        weights = aggregation("verl", row["mode"], mask)(jnp.asarray(mask))
        ours = (weights.token * case["log_prob"]).sum() / weights.total
        errors[f"aggregation {row['mode']}"] = absolute_error(ours, row["loss"])
    return errors


def all_errors(recorded: dict[str, Any], cases: dict[str, Any]) -> dict[str, float]:
    """Every row of a file of advantages, KL penalties and aggregations, by name."""
    try:
        case = cases["synthetic_wide"]
        return (
            advantage_errors(recorded)
            | kl_errors(recorded, case)
            | aggregation_errors(recorded, case)
        )
    except (KeyError, TypeError, IndexError) as error:
        raise BadInput(
            f"not a file of advantages, KL penalties and aggregations: {error!r}"
        ) from None
