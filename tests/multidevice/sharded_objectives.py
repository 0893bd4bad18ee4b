"""Run by test_mesh.py in a process of eight CPU devices: objectives on a batch spread over them.

Prints, for every method that looks beyond a token (prefix sums, summaries and products of a
sequence, pairs of a prompt, searches and sorts over the batch) and some that do not, the largest
relative difference of loss sum, metrics and gradient from the same on one device.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.append(str(Path(__file__).parent.parent / "contracts"))

from objective_batches import make_batch, suited_to  # noqa: E402

from dppo_jax.objectives.methods import METHODS  # noqa: E402

OF_TOKENS = ("dppo_topk_kl", "dr_grpo", "r2vpo", "dvpo")
OBJECTIVES = {method.name: method.factory() for method in METHODS}
CHOSEN = {n: o for n, o in OBJECTIVES.items() if o.scope != "token" or n in OF_TOKENS}


def difference(left, right):
    pairs = zip(*map(jax.tree.leaves, jax.device_get((left, right))), strict=True)
    return max(
        float(np.max(np.nan_to_num(np.abs(a - b) / (1 + np.abs(b)), nan=9.0), initial=0.0))
        for a, b in pairs
    )


def everything(batches):
    """One program, which compiles faster than one for each."""

    def of(objective, stats, batch):
        def loss_sum(stats):
            result = objective.loss(stats, batch)
            return result.loss_sum, result

        return jax.value_and_grad(loss_sum, has_aux=True)(stats)

    return {name: of(objective, *batches[name]) for name, objective in CHOSEN.items()}


def main() -> dict:
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    whole = {n: suited_to(n, o, *make_batch(seed=4, b=16, t=6)) for n, o in CHOSEN.items()}
    spread = jax.device_put(whole, rows)
    alone, eight = jax.jit(everything)(whole), jax.jit(everything)(spread)
    for _, gradient in eight.values():
        assert gradient.logp.sharding.num_devices == 8
    return {
        "devices": jax.device_count(),
        "differences": {name: difference(eight[name], alone[name]) for name in CHOSEN},
    }


if __name__ == "__main__":
    print(json.dumps(main()))
