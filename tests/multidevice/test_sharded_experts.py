"""A mixture of experts on eight devices: the numbers of one, however tokens find their experts."""

import json
from pathlib import Path

import pytest
from test_mesh import with_eight_devices

pytestmark = pytest.mark.multidevice


def test_experts_on_a_mesh():
    done = with_eight_devices(Path(__file__).parent / "sharded_experts.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same_tokens"] == [True, True]
    assert found["difference"] < 1e-5 * found["largest"]
    assert found["experts_stored"] == 1 / 8
    # Two experts a token, tokens over four of the devices' rows.
    assert found["sorted"] == [found["tokens"] * 2 // 4]
    assert {case["transport"] for case in found["layer"]} == {"ragged", "gathered"}
    for case in found["layer"]:
        assert case["difference"] < 1e-5, case
