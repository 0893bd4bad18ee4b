"""DAPO's dynamic sampling: groups that teach nothing give their place to new prompts.

train.train.dynamic_sampling = @dynamic_sampling.DynamicSampling()
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from dppo_jax.records import Rollout
from dppo_jax.sharding import constrain


@dataclass(frozen=True)
class DynamicSampling:
    """A step draws prompts until every group of its batch has a spread of rewards, up to a limit.

    A group without one has advantages of 0: all of its answers right, or all wrong. `max_batches`
    counts batches of prompts_per_step prompts, the first included. arXiv 2503.14476, section 3.2
    and eq. 11. Differs from the paper: at the limit the groups that are left stay in the batch,
    which keeps its shape; and more prompts are drawn in parts of prompts_per_step /
    rollout_batches, no more of them than the missing groups fill.
    """

    max_batches: int = 3

    def __post_init__(self):
        if self.max_batches < 2:
            raise ValueError(
                f"DynamicSampling.max_batches={self.max_batches}: the first batch counts, and it "
                "takes at least a second to replace anything"
            )


def with_spread(rewards: Float[np.ndarray, "P G"]) -> Bool[np.ndarray, " P"]:
    """The groups whose samples differ in reward."""
    return np.ptp(rewards, axis=1) > 0


def places(
    wanting: Bool[np.ndarray, " P"], offered: Bool[np.ndarray, " N"]
) -> Int[np.ndarray, " P"]:
    """For each of P groups the offered group that takes its place, -1 where it stays.

    The first that want one get the first that are offered.
    """
    taken = np.full(len(wanting), -1, np.int32)
    at, new = np.flatnonzero(wanting), np.flatnonzero(offered)
    count = min(len(at), len(new))
    taken[at[:count]] = new[:count]
    return taken


@jax.jit
def replaced(rollout: Rollout, part: Rollout, taken: Int[jax.Array, " P"]) -> Rollout:
    """The rollout with `part`'s group taken[p] in the place of group p where that is not -1."""
    prompts, offered = len(rollout.prompt_tokens), len(part.prompt_tokens)

    def replace(old: Any, new: Any) -> Any:
        shape = (len(old) // prompts, *old.shape[1:])
        old, new = old.reshape(prompts, *shape), new.reshape(offered, *shape)
        stays = (taken < 0).reshape(-1, *(1,) * len(shape))
        chosen = jnp.where(stays, old, new[jnp.maximum(taken, 0)])
        return constrain(chosen.reshape(-1, *shape[1:]), "batch")

    return jax.tree.map(replace, rollout, part)


@jax.jit
def joined(parts: list[Rollout]) -> Rollout:
    """One rollout of all prompts, in order."""
    return jax.tree.map(lambda *of: constrain(jnp.concatenate(of), "batch"), *parts)
