"""The rollout engine and the sampler in lockstep draw on eight devices what they draw on one."""

import json
from pathlib import Path

import pytest
from test_mesh import with_eight_devices

pytestmark = pytest.mark.multidevice


@pytest.fixture(scope="module")
def found():
    done = with_eight_devices(Path(__file__).parent / "sharded_engine.py")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "mesh", ["fsdp 2 x sequence 2 x tensor 2", "data 2 x fsdp 2 x tensor 2", "data 8"]
)
def test_the_mesh_changes_no_token(found, mesh):
    one = found[mesh]
    assert len(one["same_tokens"]) == 15 and all(one["same_tokens"])
    assert one["logp_difference"] < 1e-4
    assert one["part_of_the_pages"] == 1 / 8
    assert one["cached_tokens"] > 0
    assert not any(one["held"])
    assert one["compiled_again"] == 0
    assert one["waits"] == (mesh != "data 8")


@pytest.mark.parametrize("case", ["lockstep", "panels", "uneven"])
def test_devices_with_a_copy_each_draw_alone(found, case):
    one = found[case]
    assert one["same_tokens"] and one["same_ends"]
    assert one["logp_difference"] < 1e-4
    assert len(one["lengths"]) > 2 or case != "lockstep"
    assert one["panels"] == (case != "lockstep")
    assert not one["waits"]


@pytest.mark.parametrize("case", ["lockstep", "panels"])
def test_cpu_devices_read_the_same_weights(found, case):
    assert set(found[case]["memories"]) == {1}


def test_heads_that_do_not_divide_are_refused(found):
    assert "kv_heads=2 is not divisible by the mesh's tensor=8" in found["refused"]
