"""The peer scripts run end to end at a tiny shape, where the peers are installed.

The peers' pins conflict with ours and each other's, so each has its own environment: name its
interpreter in DPPO_PEER_TRL_PYTHON or DPPO_PEER_TUNIX_PYTHON (default: the one running pytest).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHAPE = {
    "vocab": 64,
    "width": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 8,
    "intermediate": 64,
    "prompts": 4,
    "samples": 2,
    "prompt_tokens": 8,
    "response_tokens": 6,
}
PEERS = [
    # script, requirements file, package, variable naming the interpreter
    ("trl_dppo_step.py", "requirements-trl.txt", "trl", "DPPO_PEER_TRL_PYTHON"),
    ("tunix_grpo_step.py", "requirements-tunix.txt", "google-tunix", "DPPO_PEER_TUNIX_PYTHON"),
]


def environment() -> dict[str, str]:
    """This process's variables without those that would change the peer's interpreter."""
    drop = {"PYTHONWARNINGS", "PYTHONPATH", "PYTHONHOME"}
    return {name: value for name, value in os.environ.items() if name not in drop}


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=environment(), check=False
    )


def interpreter(requirements: str, package: str, variable: str) -> str:
    """The Python that has the pinned peer; skips the test where there is none."""
    python = os.environ.get(variable, sys.executable)
    pins = (HERE / requirements).read_text().splitlines()
    wanted = next(line for line in pins if line.startswith(f"{package}=="))
    query = f"import importlib.metadata as m; print(m.version({package!r}))"
    try:
        found = run([python, "-c", query])
    except OSError as error:
        pytest.skip(f"{variable}: {error}")
    if found.returncode:
        pytest.skip(f"{package} is not installed; set {variable} (see tests/peers/README.md)")
    version = found.stdout.strip()
    if f"{package}=={version}" != wanted:
        pytest.skip(f"{package} {version} is installed, {wanted} is wanted")
    return python


@pytest.mark.peer
@pytest.mark.parametrize("micro_prompts", [4, 2])
@pytest.mark.parametrize("script, requirements, package, variable", PEERS, ids=["trl", "tunix"])
def test_one_short_step(script, requirements, package, variable, micro_prompts):
    python = interpreter(requirements, package, variable)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SHAPE.items()]
    command = [python, str(HERE / script), "--steps=1", "--warmup=1", "--threads=1", "--json"]
    done = run([*command, *flags, f"--micro-prompts={micro_prompts}"])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # nothing else on standard output

    assert len(result["step_seconds"]["all"]) == result["steps"] == 1
    assert result["step_seconds"]["min"] == result["step_seconds"]["median"] > 0
    assert 0 < result["sampling_seconds"]["min"] < result["step_seconds"]["min"]
    assert result["shape"] == SHAPE | {
        "micro_prompts": micro_prompts,
        "tied": True,
        "dtype": "float32",
    }
    assert result["threads"] == 1
    assert f"{package}=={result['versions'][package]}" in (HERE / requirements).read_text()
    assert result["reward_std"] > 0
    # Adam's first steps are of size lr; weight decay is off and no gradient is zero throughout.
    assert 1e-6 < result["weight_change_max"] < 3e-6


SAMPLERS = [
    ("hf_generate.py", "requirements-hf.txt", "transformers", "DPPO_PEER_TRL_PYTHON"),
    ("tunix_sample.py", "requirements-tunix.txt", "google-tunix", "DPPO_PEER_TUNIX_PYTHON"),
]


@pytest.mark.peer
@pytest.mark.parametrize(
    "script, requirements, package, variable", SAMPLERS, ids=["transformers", "tunix"]
)
def test_a_peer_samples(script, requirements, package, variable):
    python = interpreter(requirements, package, variable)
    command = [python, str(HERE / script), "small-batch", "--repeats=1", "--new-tokens=3"]
    done = run([*command, "--threads=1", "--json"])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["shape"]["sequences"] == 16 and result["shape"]["new_tokens"] == 3
    assert result["tokens_per_second"] == pytest.approx(48 / result["seconds"]["median"])
    assert f"{package}=={result['versions'][package]}" in (HERE / requirements).read_text()


@pytest.mark.parametrize("script", [sampler[0] for sampler in SAMPLERS])
def test_an_unknown_preset_is_one_line(script):
    done = run([sys.executable, str(HERE / script), "huge"])
    assert done.returncode == 2 and "invalid choice: 'huge'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("script", [peer[0] for peer in PEERS])
def test_bad_shape_is_one_line(script):
    """Needs no peer: flags are checked before anything heavy is imported."""
    done = run([sys.executable, str(HERE / script), "--heads=3", "--kv-heads=2"])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--kv-heads must divide --heads")
