"""The sampler's head on meshes of eight devices: the tokens of one, and what crosses the mesh."""

import json
from pathlib import Path

import pytest
from test_mesh import with_eight_devices

pytestmark = pytest.mark.multidevice


@pytest.fixture(scope="module")
def found():
    done = with_eight_devices(Path(__file__).parent / "sharded_sampler.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["heads"]) == 5
    return found


def test_tokens_and_records_are_those_of_one_device(found):
    """Plain rows and each filter, bias and penalty, greedy ones; kept sets cut for replay."""
    for case in found["heads"]:
        assert len(case["same_tokens"]) == 8 and all(case["same_tokens"].values()), case
        assert case["different_tokens"] > 30  # of 64 rows
        assert case["numbers"] < 1e-5, case


def test_nothing_need_be_stored(found):
    assert found["stored"] == [64, 0]


def test_no_row_and_no_part_of_the_vocabulary_is_gathered(found):
    """Only K candidates of each device, of its own rows, and one for greedy ones."""
    for case in found["heads"]:
        data, fsdp, tensor = case["mesh"]
        rows = 64 // (data * fsdp)
        if tensor > 1:
            assert case["gathered"] and not case["all_columns"], case
        candidates = ([rows, 5 * tensor], [rows, tensor])
        assert all(shape in candidates for shape in case["gathered"]), case
        assert not (case["all_rows"] and rows < 64), case


def test_the_decoding_loop_gathers_no_logits(found):
    """Nor the unembedding, which is gathered before it."""
    assert found["decoding"]["loops"]
    for shape in found["decoding"]["in_loops"]:
        assert max(shape) <= 64, shape  # neither 608 columns nor a device's 304
