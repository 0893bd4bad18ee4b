"""Advantage estimators: pure functions of the quantities that their parameters name.

Groups are rows of [P, G]: G samples of one prompt. A group of one has nothing to compare with, and
a group whose rewards are all equal nothing to learn from: the estimators give exactly 0 there.
`keep_single=True` keeps a lone sample's reward instead, as verl does. `present` [P, G] says which
slots hold a sample where groups are unequal (the first ones of each row); absent ones get 0 and
count nowhere.
"""

from dppo_jax.advantages.groups import (
    gpg,
    group_mean_baseline,
    group_std_normalized,
    leave_one_out,
    max_rl,
    opo,
    pass_at_k,
)
from dppo_jax.advantages.inputs import (
    AdvantageInputs,
    Estimator,
    TokenAdvantages,
    estimate,
    inputs_of,
    named_inputs,
)
from dppo_jax.advantages.tokens import (
    distributional_gae,
    gae,
    optimal_token_baseline,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    returns_to_go,
    whiten,
)

__all__ = [
    "AdvantageInputs",
    "Estimator",
    "TokenAdvantages",
    "distributional_gae",
    "estimate",
    "gae",
    "gpg",
    "group_mean_baseline",
    "group_std_normalized",
    "inputs_of",
    "leave_one_out",
    "max_rl",
    "named_inputs",
    "opo",
    "optimal_token_baseline",
    "pass_at_k",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "returns_to_go",
    "whiten",
]
