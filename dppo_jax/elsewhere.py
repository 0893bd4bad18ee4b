"""Rollouts on devices of their own: of every host some sample, and the others train.

    train.train.sampler_devices = 4     # the first 4 devices of each host sample

Weights, in the form that the rollout policy has cast them to (`rollout_policy`: bfloat16, int8), go

    trainer's mesh --program--> pieces --copies--> pieces --program--> sampler's mesh

JAX 0.10.2 has no program over two sets of devices. So one lays the weights out in as many pieces as
both sides can hold, each piece is copied from a device to another of its own host, and where the
sampler has more devices than pieces a second program divides them. No array is put together on a
host, and none crosses twice where the trainer's devices are a multiple of the sampler's.
"""

import collections
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dppo_jax.models.decoder import Params
from dppo_jax.multihost import row_parts, to_global_rows, to_local_rows
from dppo_jax.records import Prompts, Rollout
from dppo_jax.sampling.generate import SamplingConfig
from dppo_jax.sampling.rollouts import Lockstep, RolloutContext
from dppo_jax.sharding import MeshConfig, batch_sharding, check_divides, spec_of


def host_of(device: Any) -> int:
    """The process that a device is of."""
    return device.process_index


def divide(
    devices: Sequence[Any], sampler: int, host_of: Callable[[Any], int] = host_of
) -> tuple[list[Any], list[Any]]:
    """The first `sampler` devices of each host, and those that train; ValueError where none do."""
    hosts: dict[int, list[Any]] = {}
    for device in devices:
        hosts.setdefault(host_of(device), []).append(device)
    fewest = min(map(len, hosts.values()))
    if not 0 <= sampler < fewest:
        raise ValueError(
            f"sampler_devices={sampler} of a host's {fewest} devices: leave at least one to train"
        )
    if not sampler:
        return [], list(devices)
    # Host after host, so that each side's rows and pieces of weights lie on the same hosts.
    sampling = [device for own in hosts.values() for device in own[:sampler]]
    return sampling, [device for own in hosts.values() for device in own[sampler:]]


def sampler_mesh(home: Mesh, devices: Sequence[Any], width: int) -> Mesh:
    """The mesh of the devices that sample; ValueError where it takes no model of that width, or
    where hosts hold other rows of it than of the trainer's."""
    there = MeshConfig(fsdp=len(devices)).build(devices)
    check_divides(there, "embed", {"width": width})
    if row_parts(there) != row_parts(home):
        raise ValueError(
            f"sampler_devices: the mesh {dict(home.shape)} of the devices that train gives a host "
            "other prompts than those that sample; let each host's devices be whole rows of it"
        )
    return there


def check_source(there: Mesh, lockstep: bool) -> None:
    """Refuses a source that samples on the devices of one host alone."""
    if len({host_of(device) for device in there.devices.flat}) > 1 and not lockstep:
        raise ValueError("sampler_devices on several hosts goes with rollouts = @rollouts.Lockstep")


class Course(NamedTuple):
    """How an array lies as it leaves, as it arrives, and as it is wanted there."""

    leaves: NamedSharding
    arrives: NamedSharding
    wanted: NamedSharding


class Transfer:
    """Arrays of one mesh to another one of other devices of the same hosts.

    `axes` are the logical axes of the trees that are sent, from the root down to matrices, of which
    a form such as int8 may make several arrays: there they lie by the rules for that mesh, however
    they lie at home. `seconds` and `bytes`, over all hosts, are of what was sent last.
    """

    def __init__(self, home: Mesh, there: Mesh, axes: Any):
        self._there, self._axes = there, axes
        sides = list(home.devices.flat), list(there.devices.flat)
        common = math.gcd(*map(len, sides))
        for pieces in sorted((n for n in range(1, common + 1) if common % n == 0), reverse=True):
            halves = [np.array(side).reshape(pieces, -1) for side in sides]
            routes = _routes(*halves)
            if routes is not None:
                break
        else:
            raise ValueError("a host has devices to sample and none to train, or the other way")
        self._routes = routes
        self._sent_from, self._sent_to = (Mesh(half, ("piece", "copy")) for half in halves)
        self._programs: dict[Any, Any] = {}
        self._known: tuple[list[Array], list[Array]] = ([], [])  # as they are at home, and there
        self.seconds = self.bytes = 0.0

    def send(self, tree: Any) -> tuple[Any, Callable[[], None]]:
        """The tree there, on its way; and what waits for it and takes the time.

        What is the same array as before is not sent again.
        """
        began = time.monotonic()
        leaves, structure = jax.tree.flatten(tree)
        known = {id(old): new for old, new in zip(*self._known, strict=True)}
        courses = zip(leaves, self.courses(tree), strict=True)
        fresh = {id(leaf): (leaf, course) for leaf, course in courses if id(leaf) not in known}
        known |= dict(zip(fresh, self._arrived(list(fresh.values())), strict=True))
        sent = [known[id(leaf)] for leaf in leaves]
        self._known = leaves, sent

        def wait() -> None:
            jax.block_until_ready(sent)
            if fresh:
                self.seconds = time.monotonic() - began

        return jax.tree.unflatten(structure, sent), wait

    def _arrived(self, fresh: list[tuple[Array, Course]]) -> list[Array]:
        if not fresh:
            return []
        leaves, courses = zip(*fresh, strict=True)
        departing = self._laid_out(leaves, [course.leaves for course in courses])
        copies = [
            self._copied(leaf, course.arrives)
            for leaf, course in zip(departing, courses, strict=True)
        ]
        self.bytes = sum(len(self._routes) * bytes_of_a_shard(leaf) for leaf in copies)
        return self._laid_out(copies, [course.wanted for course in courses])

    def courses(self, tree: Any) -> list[Course]:
        """Of each array in a tree, or ShapeDtypeStruct."""

        def of(axes: tuple, arrays: Any) -> list[Course]:
            return [self._course(leaf, axes) for leaf in jax.tree.leaves(arrays)]

        found = jax.tree.map(of, self._axes, tree, is_leaf=lambda node: isinstance(node, tuple))
        return jax.tree.leaves(found, is_leaf=lambda node: isinstance(node, Course))

    def _course(self, leaf: Any, axes: tuple) -> Course:
        """In pieces along the dimension that the sampler's mesh splits."""
        wanted = NamedSharding(self._there, spec_of(axes, self._there, shape=leaf.shape))
        spec = (*wanted.spec, *(None,) * (leaf.ndim - len(wanted.spec)))
        split = ["fsdp" in ((part,) if isinstance(part, str) else part or ()) for part in spec]
        pieces = PartitionSpec(*("piece" if here else None for here in split))
        arrives = NamedSharding(self._sent_to, pieces)
        arrives = wanted if wanted.is_equivalent_to(arrives, leaf.ndim) else arrives
        return Course(NamedSharding(self._sent_from, pieces), arrives, wanted)

    @property
    def most_sent(self) -> int:
        """Devices that the same one sends its piece to, at the most."""
        return max(collections.Counter(self._routes.values()).values())

    def _laid_out(self, leaves: Sequence[Array], shardings: list[NamedSharding]) -> list[Array]:
        """The arrays as they are asked for, by one program for all that lie otherwise."""
        asked = list(zip(leaves, shardings, strict=True))
        moved = [leaf for leaf, goal in asked if not lies_so(leaf, goal)]
        if not moved:
            return list(leaves)
        goals = tuple(goal for leaf, goal in asked if not lies_so(leaf, goal))
        if goals not in self._programs:
            self._programs[goals] = relaying(goals)
        mesh = goals[0].mesh
        assert isinstance(mesh, Mesh), "arrays of a run live on real devices"
        with jax.set_mesh(mesh):
            made = iter(self._programs[goals](moved))
        return [leaf if lies_so(leaf, goal) else next(made) for leaf, goal in asked]

    def _copied(self, leaf: Array, arrives: NamedSharding) -> Array:
        """The same pieces on the other side's devices."""
        at_home = {shard.device: shard.data for shard in leaf.addressable_shards}
        parts = [
            jax.device_put(at_home[source], target)
            for target, source in self._routes.items()
            if source in at_home
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, arrives, parts)


def bytes_of_a_shard(leaf: Any) -> float:
    """Of an array with a sharding, or a ShapeDtypeStruct."""
    return float(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)


def relaying(goals: Sequence[NamedSharding]) -> Any:
    """The program that lays arrays out so."""
    return jax.jit(lambda arrays: arrays, out_shardings=list(goals))


def lies_so(leaf: Any, goal: NamedSharding) -> bool:
    return leaf.sharding.is_equivalent_to(goal, leaf.ndim)


def _routes(home: np.ndarray, there: np.ndarray) -> dict[Any, Any] | None:
    """For each device of `there` [pieces, copies] one of its host that holds its piece; None where
    a host has none."""
    found = {}
    for holders, targets in zip(home, there, strict=True):
        for place, target in enumerate(targets):
            near = [d for d in holders if d.process_index == target.process_index]
            if not near:
                return None
            found[target] = near[place % len(near)]
    return found


class Elsewhere:
    """A source whose work is done on devices of its own: weights go there, rollouts come back."""

    elsewhere = True

    def __init__(self, make: Any, context: RolloutContext, devices: Sequence[Any]):
        self._home = context.mesh
        self._mesh = sampler_mesh(self._home, devices, context.model.config.width)
        self._source = make(context._replace(mesh=self._mesh))
        check_source(self._mesh, isinstance(self._source, Lockstep))
        self._transfer = Transfer(self._home, self._mesh, context.model.policy_axes)
        # One rollout at a time, in the order in which they were asked for: that of all hosts.
        self._turn, self._asked, self._done = threading.Condition(), 0, 0

    def numbers(self) -> dict[str, float]:
        """Of the last weights that were sent."""
        return {
            "time/weight_transfer": self._transfer.seconds,
            "weights/bytes_sent": self._transfer.bytes,
        }

    def rollout(self, *asked: Any, **settled: Any) -> Rollout:
        """See `RolloutSource`, whose arguments are those of `begin`."""
        return self.begin(*asked, **settled)()

    def begin(
        self,
        params: Params,
        prompts: Prompts,
        key: Array,
        settings: SamplingConfig,
        *,
        first: int = 0,
        version: int = 0,
    ) -> Callable[[], Rollout]:
        """Sends what is needed, and gives what draws the rollout: in any thread, to be called once.

        To be asked by one thread alone, so that all hosts start their programs in one order.
        """
        check_divides(self._mesh, "batch", {"prompts of a rollout": len(prompts.tokens)})
        there, key = self._over(prompts, self._home, self._mesh), self._same_key(key)
        sent, wait = self._transfer.send(params)
        place, self._asked = self._asked, self._asked + 1

        def draw() -> Rollout:
            wait()
            with jax.set_mesh(self._mesh):
                drawn = jax.block_until_ready(
                    self._source.rollout(sent, there, key, settings, first=first, version=version)
                )
            return self._over(drawn, self._mesh, self._home)

        def finish() -> Rollout:
            with self._turn:
                self._turn.wait_for(lambda: self._done == place)
            try:
                return draw()
            finally:
                with self._turn:
                    self._done += 1
                    self._turn.notify_all()

        return finish

    def _same_key(self, key: Array) -> Array:
        """The key, of which every host has the words, as one of the devices that sample."""
        words = np.asarray(jax.random.key_data(key))
        with jax.set_mesh(self._mesh):
            return jax.random.wrap_key_data(jnp.asarray(words), impl=jax.random.key_impl(key))

    def _over(self, rows: Any, source: Mesh, target: Mesh) -> Any:
        """Rows of one mesh on the other one, each host's own."""
        if jax.process_count() == 1:
            return jax.device_put(rows, batch_sharding(target))
        return to_global_rows(to_local_rows(rows, batch_sharding(source)), batch_sharding(target))
