"""Each mesh axis and combinations of them: the loss and the gradients of one device."""

import json
from pathlib import Path

import pytest
from test_mesh import with_eight_devices

pytestmark = pytest.mark.multidevice


def sharded_steps(*arguments):
    done = with_eight_devices(Path(__file__).parent / "sharded_step.py", *arguments)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["devices"] == 8
    return seen


@pytest.fixture(scope="module")
def seen():
    return sharded_steps()


def test_loss_and_gradients_are_those_of_one_device(seen):
    axes = {axis for case in seen["found"] for axis in case["mesh"]}
    assert axes == {"data", "fsdp", "expert", "sequence", "tensor"}
    packed = {case["model"]: case["mesh"] for case in seen["found"] if case["rows"] == "packed"}
    assert packed.keys() == {"gemma", "mixture"}
    assert all("sequence" in mesh for mesh in packed.values())
    for case in seen["found"]:
        assert case["values"] < 1e-4 and case["gradients"] < 1e-4, case


@pytest.mark.slow
def test_each_axis_alone():
    found = sharded_steps("each-axis")["found"]
    assert {axis for case in found for axis in case["mesh"]} == {
        "data", "fsdp", "expert", "sequence", "tensor",
    }  # fmt: skip
    for case in found:
        assert len(case["mesh"]) == 1 and max(case["values"], case["gradients"]) < 1e-4, case


def test_columns_over_eight_devices_need_less_memory_on_each(seen):
    one, eight = seen["temporary"]
    assert eight < one / 4, seen["temporary"]
