"""A mixture of experts on eight devices: the numbers of one, however tokens find their experts."""

import json
from pathlib import Path

import pytest
from test_mesh import with_eight_devices

pytestmark = pytest.mark.multidevice


@pytest.fixture(scope="module")
def found():
    done = with_eight_devices(Path(__file__).parent / "sharded_experts.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_replayed_routing_on_a_mesh(found):
    """The sampler's choices (R3) and the scorer's own (R2), fsdp x expert: the loss and gradients
    of one device, where the routers would now choose other experts, and still learn."""
    replay = found["replay"]
    assert replay["same_own_choices"]
    assert replay["difference"] < 1e-5 * replay["largest"], replay
    assert replay["differing"] > 0.05 and replay["router_learns"] > 1e-3


def test_experts_on_a_mesh(found):
    assert found["same_tokens"] == [True, True]
    assert found["difference"] < 3e-5 * found["largest"]
    assert found["experts_stored"] == 1 / 8
    # Two experts a token, tokens over four of the devices' rows.
    assert found["sorted"] == [found["tokens"] * 2 // 4]
    assert {case["transport"] for case in found["layer"]} == {"ragged", "gathered"}
    for case in found["layer"]:
        assert case["difference"] < 1e-5, case
