"""A loss and its gradient, added up over the microbatches of a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dppo_jax import packing
from dppo_jax.packing import Budget
from dppo_jax.parts import microbatch, prompts_of
from dppo_jax.records import LossSum, Max, fold_metrics
from dppo_jax.sharding import mesh_here

Summed = Callable[..., tuple[Any, Any]]  # (rows, params, fixed) -> sums, each part's result


def accumulate(
    loss_of: Callable[..., LossSum],
    params: Any,
    rows: Any,
    microbatches: int,
    fixed: tuple[Any, ...] = (),
    *,
    apart: bool = False,
) -> tuple[Any, LossSum]:
    """Gradient and value of Σ loss_sum / Σ weight_sum over the microbatches of `rows`.

    `params` is any pytree of arrays, as is the gradient; the loss is of (params, rows, *fixed).
    Exact: sums are accumulated unreduced and divided once. Weights of zero give a zero gradient.
    `apart`: devices along `data` go through microbatches of their own and add up their gradients
    once. For losses of a microbatch that are sums over its prompts, and close over no array.
    """

    def value_and_grad(params, micro, fixed):
        def scalar(p):
            out = loss_of(p, micro, *fixed)
            return out.loss_sum, out

        (_, out), grads = jax.value_and_grad(scalar, has_aux=True)(params)
        return grads, out

    if microbatches == 1:
        grads, total = value_and_grad(params, rows, fixed)
    else:

        def summed(rows, params, fixed):
            def add(grads, index):
                micro = microbatch(rows, index, microbatches)
                more_grads, out = value_and_grad(params, micro, fixed)
                return jax.tree.map(jnp.add, grads, more_grads), out

            zeros = jax.tree.map(jnp.zeros_like, params)
            return jax.lax.scan(add, zeros, jnp.arange(microbatches))

        run = _apart_along_data(summed, rows, microbatches) if apart else summed
        grads, stacked = run(rows, params, fixed)
        total = LossSum(
            jnp.sum(stacked.loss_sum), jnp.sum(stacked.weight_sum), fold_metrics(stacked.metrics)
        )
    scale = 1.0 / jnp.where(total.weight_sum > 0, total.weight_sum, 1.0)
    return jax.tree.map(lambda g: g * scale, grads), total


def accumulate_packed(
    loss_of: Callable[..., LossSum],
    params: Any,
    rows: Any,
    of: packing.Plan,
    budget: Budget,
    fixed: tuple[Any, ...] = (),
) -> tuple[Any, LossSum]:
    """`accumulate` over the packed microbatches of a plan: as many as it uses, compiled once."""

    def value_and_grad(index):
        def scalar(p):
            out = loss_of(p, packing.take(rows, of, index, budget), *fixed)
            return out.loss_sum, out

        (_, out), grads = jax.value_and_grad(scalar, has_aux=True)(params)
        return grads, out

    def add(index, so_far):
        grads, total = so_far
        more, out = value_and_grad(index)
        both = jax.tree.map(lambda *pair: jnp.stack(pair), total, out)
        sums = jnp.sum(both.loss_sum), jnp.sum(both.weight_sum)
        total = LossSum(*sums, fold_metrics(both.metrics))
        return jax.tree.map(jnp.add, grads, more), total

    shapes = jax.eval_shape(value_and_grad, 0)
    empty, nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    for name, metric in nothing.metrics.items():
        if isinstance(metric, Max):
            nothing.metrics[name] = Max(jnp.full_like(metric.value, -jnp.inf))
    grads, total = jax.lax.fori_loop(0, of.count, add, (empty, nothing))
    scale = 1.0 / jnp.where(total.weight_sum > 0, total.weight_sum, 1.0)
    return jax.tree.map(lambda g: g * scale, grads), total


def _apart_along_data(summed: Summed, rows: Any, microbatches: int) -> Summed:
    """`summed` with each device along `data` on its own rows, where these are as many microbatches.

    The devices' sums are added up once, at the end. Left to compilers a gradient is summed over
    `data` in every microbatch: as often over the network, where `data` joins slices of TPUs.
    """
    mesh = mesh_here()
    devices = mesh.shape.get("data", 1)
    if devices == 1 or prompts_of(rows) % (devices * microbatches):
        return summed

    def local(rows, params, fixed):
        sums, stacked = summed(rows, params, fixed)
        return jax.lax.psum(sums, "data"), stacked

    whole, split = PartitionSpec(), PartitionSpec("data")
    return jax.shard_map(
        local,
        in_specs=(split, whole, whole),
        out_specs=(whole, split),
        # Only the first axis: JAX 0.12 wants such axes in the mesh's order, also with those of
        # `shard_map` inside; where no other splits, all: kernels want none left to the compiler.
        axis_names={"data"} if mesh.size > devices else set(mesh.axis_names),
        check_vma=False,
    )
