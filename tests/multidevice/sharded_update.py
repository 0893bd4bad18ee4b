"""Run by test_sharded_update.py with eight CPU devices: gradient steps of two microbatches.

Prints for each kind of update and its mesh how far parameters and metrics are from those of one
device, and what each of two devices sends to sum the gradients of four microbatches.
"""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sharded_step import DENSE, NEW, PROMPTS, SAMPLES, rollout_of

from dppo_jax import objectives
from dppo_jax.kernels.chips import CHIPS
from dppo_jax.metrics import reduce_metrics
from dppo_jax.models.decoder import Model
from dppo_jax.models.lora import LoraConfig, LoraModel
from dppo_jax.plan.hlo import costs_of
from dppo_jax.records import Batch
from dppo_jax.sharding import MeshConfig, batch_sharding, shardings_of
from dppo_jax.update import init_state, make_update

SGD = optax.sgd(1.0)
TOPK = objectives.dppo_topk_tv(delta=2.0)
KINDS = {
    "single pass": (TOPK, dict(data=2, fsdp=2, tensor=2)),
    "exact": (objectives.dppo_exact_tv(delta=2.0), dict(data=2, fsdp=2, sequence=2)),
    "of the minibatch": (objectives.kl_cov(), dict(data=2)),
    "adapters": (TOPK, dict(data=4)),
}


def batch_of_rows():
    rows = PROMPTS * SAMPLES
    advantages = np.random.default_rng(1).normal(size=(rows, 1)).astype(np.float32)
    return Batch(rollout_of(DENSE.vocab_size), np.broadcast_to(advantages, (rows, NEW)))


BATCH = batch_of_rows()
POLICY = jax.device_get(jax.jit(Model(DENSE).init)(jax.random.key(0)))
POLICY = jax.tree.map(lambda leaf: 3 * leaf, POLICY)


def case(kind):
    """The update, and (value, logical axes) of what it trains and of what else it takes."""
    objective, model = KINDS[kind][0], Model(DENSE)
    own = trained = POLICY, model.logical_axes
    more = []
    if kind == "exact":
        more = [(jax.tree.map(lambda leaf: 1.1 * leaf, POLICY), model.logical_axes)]
    if kind == "adapters":
        model = LoraModel(DENSE, LoraConfig(rank=4, targets=(".*",)))
        adapters = jax.device_get(jax.jit(model.init_adapters)(jax.random.key(1)))
        adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
        trained, more = (adapters, model.adapter_axes), [(None, ()), own]
    update = make_update(model, objective, SGD, temperature=0.9, microbatches=2)
    return update, trained, more


def difference(ours, theirs):
    largest = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *jax.device_get((ours, theirs)))
    return max(jax.tree.leaves(largest))


def stepped(update, trained, more, mesh=None):
    """Parameters and metrics after a step, on the mesh or on one device."""

    def placed(value, axes):
        if value is None:
            return None
        if mesh is None:
            return jax.tree.map(jnp.array, value)
        return jax.device_put(value, shardings_of(axes, mesh))

    rows = BATCH if mesh is None else jax.device_put(BATCH, batch_sharding(mesh))
    state, metrics = update(init_state(placed(*trained), SGD), rows, *(placed(*m) for m in more))
    return state.params, reduce_metrics(metrics)


def compared(kind):
    (update, trained, more), sizes = case(kind), KINDS[kind][1]
    mesh = MeshConfig(**{"fsdp": 1} | sizes).build(jax.devices()[: math.prod(sizes.values())])
    alone, true_metrics = stepped(update, trained, more)
    with jax.set_mesh(mesh):
        together, metrics = stepped(update, trained, more, mesh)
    assert metrics.keys() == true_metrics.keys()
    return {
        "kind": kind,
        "mesh": sizes,
        "parameters": difference(together, alone),
        "moved": difference(alone, trained[0]),
        "metrics": max(
            abs(value - true_metrics[name]) / (1 + abs(value)) for name, value in metrics.items()
        ),
    }


def sent():
    """Bytes of all-reduces that each of two devices takes part in, of an update of four
    microbatches, over those of the gradients."""
    model = Model(DENSE)
    mesh = MeshConfig(data=2, fsdp=1).build(jax.devices()[:2])
    update = make_update(model, TOPK, SGD, temperature=1.0, microbatches=4)
    with jax.set_mesh(mesh):
        params = jax.device_put(POLICY, shardings_of(model.logical_axes, mesh))
        rows = jax.device_put(BATCH, batch_sharding(mesh))
        text = update.lower(init_state(params, SGD), rows).compile().as_text()
    found = costs_of(text, CHIPS["v5e"])[0].collectives["all-reduce"].bytes
    return found / sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def main() -> dict:
    found = []
    for kind in KINDS:
        found.append(compared(kind))
        print(found[-1], file=sys.stderr, flush=True)
    return {"devices": jax.device_count(), "found": found, "sent": sent()}


if __name__ == "__main__":
    print(json.dumps(main()))
