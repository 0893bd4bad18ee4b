"""Meshes and the table of rules; what programs make of them is in multidevice/."""

from dataclasses import dataclass

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from dppo_jax.elsewhere import divide
from dppo_jax.sharding import MESH_AXES, MeshConfig, axes_of, spec_of


def test_sizes_of_a_mesh():
    devices = [None] * 8
    with pytest.raises(ValueError, match="data=3 x fsdp=-1 does not fit 8 devices"):
        MeshConfig(data=3).build(devices)
    with pytest.raises(ValueError, match="at most one is -1"):
        MeshConfig(data=-1)


@dataclass(frozen=True)
class Device:
    """What the arrangement of a mesh reads of a device."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self):
        """Of a slice of 2 x 2 chips."""
        return (self.id % 2, self.id // 2 % 2, 0)


def test_slices_are_joined_by_data_then_fsdp():
    devices = [Device(i, i // 4) for i in range(16)][::-1]  # four slices of four

    def slices_along(mesh, axis):
        """The slices met along an axis, from its first device."""
        along = np.moveaxis(mesh.arrange(devices), MESH_AXES.index(axis), -1)
        return [device.slice_index for device in along[0, 0, 0, 0]]

    mesh = MeshConfig(data=2, fsdp=-1, tensor=4)
    assert mesh.arrange(devices).shape == (2, 2, 1, 1, 4)
    assert slices_along(mesh, "tensor") == [0] * 4
    assert slices_along(mesh, "data") == [0, 2] and slices_along(mesh, "fsdp") == [0, 1]
    assert slices_along(MeshConfig(slices=4, expert=2), "expert") == [0, 0]
    with pytest.raises(ValueError, match="data=1 x fsdp=2 do not spread over 4 slices"):
        MeshConfig(fsdp=2, tensor=8).arrange(devices)
    with pytest.raises(ValueError, match="slices=2, but the devices are of 4 slices and 1 proc"):
        MeshConfig(slices=2).arrange(devices)
    # Elsewhere a process is a slice where the configuration says so.
    hosts = [Device(i, 0, "cpu", "cpu", i // 8) for i in range(16)]
    arranged = MeshConfig(data=2, slices=2).arrange(hosts)
    assert {device.process_index for device in arranged[0].flat} == {0}


def test_parts_of_hosts_are_no_torus():
    """Four hosts of 2 x 2 chips, one of each samples: host after host, on either side."""

    @dataclass(frozen=True)
    class Chip(Device):
        @property
        def coords(self):
            across, down = self.id % 4, self.id // 4
            return (across, down, 0)

    chips = [Chip(i, 0, process_index=i % 4 // 2 + i // 8 * 2) for i in range(16)]
    sampling, training = divide(chips, 1)
    assert [chip.id for chip in sampling] == [0, 2, 8, 10]
    arranged = MeshConfig(fsdp=4, sequence=3).arrange(training)
    assert [{chip.process_index for chip in row.flat} for row in arranged[0]] == [
        {0},
        {1},
        {2},
        {3},
    ]
    assert divide(chips, 0) == ([], chips)


def test_a_rule_takes_each_mesh_axis_once():
    """Experts' matrices are split by experts first, their width by what remains."""
    mesh = AbstractMesh((1, 2, 2, 2, 2), MESH_AXES)
    dense, mixture = ("embed", "mlp"), ("layers", "experts", "embed", "mlp")
    assert spec_of(dense, mesh) == P(("fsdp", "expert", "sequence"), "tensor")
    assert spec_of(mixture, mesh) == P(None, "expert", ("fsdp", "sequence"), "tensor")
    assert spec_of(mixture, mesh, "compute") == P(None, "expert", None, "tensor")
    # While decoding products are split both ways, so that what travels is a part of them.
    assert spec_of(dense, mesh, "decode") == P(("fsdp", "expert"), ("tensor", "sequence"))
    assert spec_of(mixture, mesh, "decode") == P(None, "expert", "fsdp", ("tensor", "sequence"))
    assert spec_of(("tokens", "width"), mesh, "compute") == P(("fsdp", "expert", "sequence"))
    assert spec_of(("tokens", "width"), mesh, "decode") == P(None, ("fsdp", "expert"))
    split = [axes_of(rows, mesh, "decode") for rows in ("queries", "groups", "tokens")]
    assert split == [
        ("fsdp", "expert", "sequence"),
        ("fsdp", "expert"),
        (),
    ]  # one step, then another
    assert axes_of("mlp", mesh, "decode", 6) == ("tensor",)
    assert spec_of(("batch",), mesh, "decode", (12,)) == P(("fsdp", "expert"))
