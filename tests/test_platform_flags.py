"""Compiler settings: merged with what is set, printed for shells, and taken by the compilers."""

import os
import subprocess
import sys

import pytest

from dppo_jax import platform_flags
from dppo_jax.platform_flags import SETTINGS, apply, here


def test_what_is_set_already_wins():
    given = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/x"}
    apply("gpu", given)
    words = given["XLA_FLAGS"].split()
    assert words[:2] == ["--xla_gpu_enable_latency_hiding_scheduler=false", "--xla_dump_to=/x"]
    names = [word.partition("=")[0] for word in words]
    assert len(set(names)) == len(names) == 1 + len(SETTINGS["gpu"]) - 1
    assert given["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
    again = dict(given)
    apply("gpu", again)
    assert again == given


def test_every_setting_says_why_and_stands_once():
    for platform, settings in SETTINGS.items():
        assert all(len(setting.why) > 20 and setting.value for setting in settings), platform
        assert len({setting[:2] for setting in settings}) == len(settings)


@pytest.mark.parametrize(
    ("environment", "platform"),
    [
        ({"JAX_PLATFORMS": "cpu", "TPU_ACCELERATOR_TYPE": "v5p-128"}, "cpu"),
        ({"JAX_PLATFORMS": "tpu,cpu", "TPU_ACCELERATOR_TYPE": "v5p-128"}, "v5p"),
        ({"JAX_PLATFORMS": "tpu", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}, "v5e"),
        ({"JAX_PLATFORMS": "tpu"}, "tpu"),
        ({"JAX_PLATFORMS": "cuda"}, "gpu"),
    ],
)
def test_the_platform_of_a_machine(environment, platform):
    assert here(environment) == platform
    apply(platform, environment)


def test_a_chip_is_known_by_its_pci_id(monkeypatch, tmp_path):
    for slot, (vendor, device) in enumerate([("0x8086", "0x0062"), ("0x1ae0", "0x001f")]):
        (tmp_path / f"0000:00:0{slot}.0").mkdir()
        (tmp_path / f"0000:00:0{slot}.0" / "vendor").write_text(f"{vendor}\n")
        (tmp_path / f"0000:00:0{slot}.0" / "device").write_text(f"{device}\n")
    monkeypatch.setattr(platform_flags, "_PCI", tmp_path)
    assert here({"JAX_PLATFORMS": "tpu,cpu"}) == "tpu"  # an Intel device, and Google's NVMe disk
    (tmp_path / "0000:00:01.0" / "device").write_text("0x006f\n")
    assert here({"JAX_PLATFORMS": "tpu,cpu"}) == "v6e"
    told = {"JAX_PLATFORMS": "tpu", "TPU_ACCELERATOR_TYPE": "v5p-128"}
    assert here(told) == "v5p" and here({"JAX_PLATFORMS": "cpu"}) == "cpu"


def test_installed_plugins_decide_where_nobody_asks(monkeypatch):
    for installed, platform in (("libtpu", "tpu"), ("jax_cuda13_plugin", "gpu"), ("", "cpu")):
        monkeypatch.setattr(platform_flags, "find_spec", lambda name, one=installed: name == one)
        assert here({}) == platform


def test_a_shell_gets_them_and_xla_takes_those_for_gpus():
    module = [sys.executable, "-m", "dppo_jax.platform_flags"]
    code = f'eval "$({" ".join(module)} gpu)" && {sys.executable} -c "import jax; jax.devices()"'
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(["bash", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # XLA aborts at a flag that it does not know
    unknown = subprocess.run([*module, "v9"], env=environment, capture_output=True, text=True)
    assert "unknown platform 'v9'; known: cpu, tpu" in unknown.stderr
