"""The head on meshes of eight devices: the numbers of one, and what crosses the mesh."""

import json
from pathlib import Path

import pytest
from test_mesh import with_eight_devices

pytestmark = pytest.mark.multidevice


@pytest.fixture(scope="module")
def found():
    done = with_eight_devices(Path(__file__).parent / "sharded_head.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 8
    return found


def test_values_and_gradients_are_those_of_one_device(found):
    for case in found:
        assert case["value"] < 1e-5 and case["gradients"] < 2e-5, case


def test_the_matrix_gradient_leaves_as_the_matrix_is_stored(found):
    assert all(case["stored"] for case in found)


def test_no_logit_and_no_matrix_is_gathered_in_a_loop(found):
    """The stored matrix is gathered along D, once; across the vocabulary nothing ever is."""
    for case in found:
        assert case["loops"] and case["looped_gathers"] == 0, case
        assert case["gathers"] <= (2 if case["mesh"]["fsdp"] > 1 else 0), case
        split = {"tensor", "sequence"} & case["mesh"].keys()
        assert not (case["gathered_logits"] and split), case
