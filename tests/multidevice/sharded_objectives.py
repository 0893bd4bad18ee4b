"""Run by test_mesh.py in a process of eight CPU devices: objectives on a batch spread over them.

Prints, for one method of each way to look beyond a token (prefix sums, summaries and products of a
sequence, scans, searches and sorts over the batch), the largest relative difference of loss sum,
metrics and gradient from the same on one device.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.append(str(Path(__file__).parent.parent / "contracts"))

from objective_batches import make_batch  # noqa: E402

from dppo_jax import objectives  # noqa: E402

NAMES = ("cppo", "trm_avg", "gspo", "grpo_mis", "minpro", "bapo", "clip_cov", "kl_cov")


def difference(left, right):
    pairs = zip(*map(jax.tree.leaves, jax.device_get((left, right))), strict=True)
    return max(float(np.max(np.abs(a - b) / (1 + np.abs(b)), initial=0.0)) for a, b in pairs)


def main() -> dict:
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    whole = make_batch(seed=4, b=16, t=6)
    spread = jax.device_put(whole, rows)
    found = {"devices": jax.device_count(), "differences": {}}
    for name in NAMES:
        objective = getattr(objectives, name)()
        assert objective.scope != "token"

        def call(stats, batch, objective=objective):
            def loss_sum(stats):
                result = objective.loss(stats, batch)
                return result.loss_sum, result

            return jax.value_and_grad(loss_sum, has_aux=True)(stats)

        alone, eight = jax.jit(call)(*whole), jax.jit(call)(*spread)
        assert eight[1].logp.sharding.num_devices == 8
        found["differences"][name] = difference(eight, alone)
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
