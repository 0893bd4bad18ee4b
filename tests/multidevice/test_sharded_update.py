"""Gradient steps of several microbatches: those of one device, their gradients summed once."""

import json
from pathlib import Path

import pytest
from test_mesh import with_eight_devices

pytestmark = pytest.mark.multidevice


@pytest.fixture(scope="module")
def seen():
    done = with_eight_devices(Path(__file__).parent / "sharded_update.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_steps_are_those_of_one_device(seen):
    assert seen["devices"] == 8 and len(seen["found"]) == 4
    for case in seen["found"]:
        assert case["parameters"] < 1e-5 * case["moved"] + 1e-6 < case["moved"], case
        assert case["metrics"] < 1e-4, case


def test_gradients_are_summed_over_data_once_a_step(seen):
    """And not in each of the four microbatches."""
    assert 1 <= seen["sent"] < 1.2
