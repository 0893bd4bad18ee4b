"""One program on one device and on eight: the same numbers, and shardings that stay."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.multidevice
HERE = Path(__file__).parent
MESH = ["--gin.sharding.MeshConfig.fsdp=4", "--gin.sharding.MeshConfig.tensor=2"]


def with_eight_devices(*command):
    paths = [str(HERE.parent.parent), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What eight_devices.py saw."""
    done = with_eight_devices(HERE / "eight_devices.py", tmp_path_factory.mktemp("eight"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"] == 8
    return found


def test_parameters_and_moments_are_sharded(found):
    """Matrices over fsdp x tensor, biases over tensor; norms are small and whole everywhere."""
    assert found["born_as_asked"]
    for name, fraction in found["fractions"].items():
        if "norm" in name or "count" in name or name == ".step":
            expected = 1
        else:
            expected = 1 / 2 if "bias" in name else 1 / 8
        assert fraction == expected, name
    assert found["response_rows"] == 16 // 4


def test_weights_are_sent_to_any_number_of_devices(found):
    """Once where the numbers divide, 6 to 2; 5 and 3 have no pieces in common, 2 and 4 have two."""
    assert found["sent"] == [[True, True, True, times] for times in (1, 3, 2, 4, 2)]


def test_weights_are_split_where_they_are_sent(found):
    """From one device, whose mesh splits nothing: by the rules for the mesh of the four."""
    apart = found["weights_apart"]
    for name, part in (apart["plain"] | apart["int8"] | apart["lora"]).items():
        if "scale" not in name and "lora" not in name:
            assert part == (1 if "norm" in name or "bias" in name else 1 / 4), name
    for name in ("q_lora_a", "o_lora_b"):
        assert apart["lora"][f"['adapters']['blocks']['{name}']"] == 1 / 4


def test_a_step_keeps_every_sharding_and_type(found):
    for kind in ("shardings", "types"):
        first, *later = found[kind]
        for after in later:
            assert after == first


def test_nothing_compiles_after_the_first_step(found):
    assert found["compilations"][0] > 0 and found["compilations"][1:] == [0, 0, 0]


def test_a_checkpoint_comes_back_on_another_mesh(found):
    assert found["restored_elsewhere"]


def test_adapters_step_as_on_one_device(found):
    """A is split where W's input is, B where its output is, and the step is the same."""
    adapters = found["adapters"]
    assert adapters["apart"] < 2e-6 < 1e-4 < adapters["moved"]
    fractions = adapters["fractions"]
    assert fractions["['blocks']['q_lora_a']"] == fractions["['blocks']['o_lora_b']"] == 1 / 4
    assert fractions["['blocks']['q_lora_b']"] == fractions["['blocks']['o_lora_a']"] == 1 / 2


@pytest.mark.parametrize(
    "recipe, steps",
    [("toy_recipe", 3), pytest.param("every_term_recipe", 2, marks=pytest.mark.slow)],
)
def test_eight_devices_train_as_one(dppo, request, recipe, steps, tmp_path):
    """The same draws, losses to 1e-4, over three steps of two gradient steps; also with a critic,
    its optimizer, a reference, and terms of entropy and KL."""
    path = request.getfixturevalue(recipe)
    flags = [f"--gin.STEPS={steps}", "--gin.PROMPTS_PER_STEP=16", "--gin.MICROBATCHES=2"]
    one = dppo("train", path, "--workdir", tmp_path / "one", *flags)
    assert one.status == 0, one.err
    eight = with_eight_devices(
        "-m", "dppo_jax", "train", path, "--workdir", tmp_path / "eight", *flags, *MESH
    )
    assert eight.returncode == 0, eight.stderr
    assert eight.stderr == ""
    for ours, theirs in zip(metrics(tmp_path / "eight"), metrics(tmp_path / "one"), strict=True):
        for name in ours.keys() - {"divergence/max", "ratio/max"}:
            if not name.startswith("time/"):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
        assert (ours["time/compilations"] > 0) == (ours["step"] == 0)
    accuracy = [
        json.loads((tmp_path / name / "summary.json").read_text())["accuracy_after"]
        for name in ("one", "eight")
    ]
    assert accuracy[0] == pytest.approx(accuracy[1], abs=1e-2)


def test_a_batch_that_the_mesh_does_not_divide(toy_recipe, tmp_path):
    flags = [*MESH, "--gin.PROMPTS_PER_STEP=6"]
    workdir = tmp_path / "run"
    refused = with_eight_devices(
        "-m", "dppo_jax", "train", toy_recipe, "--workdir", workdir, *flags
    )
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "prompts_per_step=6 is not divisible by the mesh's fsdp=4" in refused.stderr
    assert not workdir.exists()


def test_objectives_do_not_see_how_a_batch_is_spread():
    """Those that look at whole sequences, at pairs or at the batch, on rows over eight devices."""
    done = with_eight_devices(HERE / "sharded_objectives.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"] == 8 and len(found["differences"]) > 20
    assert max(found["differences"].values()) < 2e-5, found
