"""`dppo plan` of the arithmetic recipe, in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def dppo_plan(
    overrides: Sequence[str], *options: str, status: int = 0
) -> subprocess.CompletedProcess:
    """With these overrides; what it printed, after the status that is expected."""
    recipe = "configs/recipes/arithmetic_cpu.gin"
    done = subprocess.run(
        [sys.executable, "-m", "dppo_jax", "plan", recipe]
        + [f"--gin.{override}" for override in overrides]
        + list(options),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=900,
    )
    assert done.returncode == status, done.stderr[-2000:]
    return done
