"""The settings of every TPU platform are taken by the compiler that is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dppo_jax.kernels.plan import ENVIRONMENT
from dppo_jax.platform_flags import SETTINGS

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]


def compiled(*more):
    """The platforms that something was compiled for, and what was said."""
    paths = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "compile_with_flags.py"), *more],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.stdout.split(), done.stderr


def test_the_compiler_takes_the_settings_of_each_generation():
    found, said = compiled()
    assert found == [name for name in SETTINGS if name not in ("cpu", "gpu", "tpu")], said[-2000:]


def test_a_setting_that_it_does_not_know_would_be_seen():
    found, said = compiled("xla_tpu_is_unknown=true")
    assert found == [] and "Unknown command line flag 'xla_tpu_is_unknown'" in said
