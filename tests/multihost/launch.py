"""Starts one command as several processes of a few CPU devices each, on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent.parent
SECONDS = 600  # the machine may be busy


class Ended(NamedTuple):
    """One process's end."""

    status: int
    out: str
    err: str

    @property
    def told(self) -> list[str]:
        """What `dppo` said of its end."""
        return [line for line in self.err.splitlines() if line.startswith("dppo: ")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices: int, programs: Path | None = None) -> dict[str, str]:
    flags = os.environ["XLA_FLAGS"]
    kept = {"JAX_COMPILATION_CACHE_DIR": str(programs)} if programs else {}
    return os.environ | kept | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "DPPO_HEARTBEAT_SECONDS": "10",
    }  # fmt: skip


def start(
    commands: Sequence[Sequence[object]], env: dict[str, str], folders: Sequence[Path]
) -> list[subprocess.Popen]:
    """A process for each command; their folders may differ, as hosts' disks do."""
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=env,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, folder in zip(commands, folders, strict=True)
    ]


def dppo(processes: int, *arguments: object, timeout: int = SECONDS) -> list[list[object]]:
    """The command line of each of the processes of one run."""
    hosts = ["--coordinator", f"127.0.0.1:{free_port()}", "--host-timeout", timeout]
    return [
        ["-m", "dppo_jax", *arguments, *hosts, "--processes", processes, "--process-id", i]
        for i in range(processes)
    ]


def ends(running: Sequence[subprocess.Popen], seconds: float = SECONDS) -> list[Ended]:
    """Waits for all; what is left at the end of the time is killed, and fails the test."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
    return [Ended(p.returncode, *output) for p, output in zip(running, outputs, strict=True)]


def wait_for(condition: Callable[[], bool], running: Sequence[subprocess.Popen]) -> None:
    """Until the condition holds; a process that ends before is told."""
    limit = time.monotonic() + SECONDS
    while not condition():
        if any(process.poll() is not None for process in running) or time.monotonic() > limit:
            raise AssertionError([(e.status, e.err) for e in ends(running, 30)])
        time.sleep(0.1)


def kill_worker(supervisor: subprocess.Popen) -> None:
    """SIGKILL to the process that trains, under the one that was started."""
    children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGKILL)
