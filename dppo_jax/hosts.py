"""Several processes as one run: how they find each other, agree on things and end together.

A process a host, on TPU pods, GKE, Slurm or plain machines. What is told between hosts here goes
through the key-value store of JAX's coordinator, so it needs no device and can be told at any time.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from dppo_jax.clusters import Cluster, slurm_devices
from dppo_jax.multihost import any_process

_PEER = re.compile(r"JaxRuntimeError.*(Gloo|NCCL|peer|socket|UNAVAILABLE)", re.IGNORECASE)
FAILED, SEEN = "dppo/failed/", "dppo/seen/"
_AN_AGE_MS = 7 * 24 * 3600 * 1000  # where only a failure, which the watch sees, ends the wait
_leaving = threading.Lock()  # taken by the thread that ends this process
_over = threading.Event()  # nobody watches the others any more
_watcher = threading.Thread(target=lambda: _watch(), daemon=True)
_times: collections.Counter[str] = collections.Counter()  # how often a name has been used


def start(cluster: Cluster) -> None:
    """Joins the other processes, before any device is touched.

    Ends the process with one line where they do not all come within `cluster.timeout` seconds:
    JAX itself would abort with a stack trace, or wait on.
    """
    if cluster.coordinator and cluster.process_id == 0:
        _check_free(cluster.coordinator)
    waiting = ["the coordinator"]

    def give_up() -> None:
        print(f"dppo: {waiting[0]} within {cluster.timeout:g} s", file=sys.stderr)
        _leave(1)

    timer = threading.Timer(cluster.timeout, give_up)
    timer.daemon = True
    timer.start()
    options: dict[str, Any] = {}
    if cluster.coordinator is None:
        waiting[0] = "this cluster's other processes, as JAX finds them, did not all come"
        options["local_device_ids"] = slurm_devices(os.environ)
    else:
        options = dict(
            coordinator_address=cluster.coordinator,
            num_processes=cluster.processes,
            process_id=cluster.process_id,
            cluster_detection_method="deactivate",
        )
        waiting[0] = f"coordinator {cluster.coordinator} did not answer"
        if cluster.process_id:
            _knock(cluster.coordinator)
        waiting[0] = (
            f"coordinator {cluster.coordinator}: not all of the {cluster.processes} processes came"
        )
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is Preemption's
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=int(cluster.timeout) + 60,
            heartbeat_timeout_seconds=_heartbeat(),
        )
    except ValueError:
        if cluster.coordinator:
            raise
        return  # a TPU host that is told of no others
    finally:
        timer.cancel()
    _watcher.start()
    exchange("name", socket.gethostname())


def _heartbeat() -> int:
    """Seconds after which a silent process counts as dead."""
    return int(os.environ.get("DPPO_HEARTBEAT_SECONDS", "30"))


def _knock(address: str) -> None:
    """Returns once somebody listens there; for as long as it takes."""
    host, _, port = address.rpartition(":")
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        time.sleep(0.5)


def _check_free(address: str) -> None:
    """Raises ValueError where another program has the port, at which JAX would crash."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    port = int(address.rpartition(":")[2])
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise ValueError(
            f"coordinator {address}: port {port} of this machine cannot be had "
            f"({os.strerror(error.errno or 0)}): end what listens there, or choose another"
        ) from None


def _client() -> Any:
    """The connection to the coordinator; None for a process on its own."""
    if jax.process_count() == 1:
        return None
    from jax._src import distributed  # JAX has no public way to its key-value store

    return distributed.global_state.client


# ---- agreement ----------------------------------------------------------------------------------


def exchange(name: str, text: str) -> list[str]:
    """What every process says under a name, by process; all must ask together."""
    client = _client()
    if client is None:
        return [text]
    _times[name] += 1
    place = f"dppo/said/{name}/{_times[name]}"
    client.key_value_set(f"{place}/{jax.process_index()}", text)
    client.wait_at_barrier(place, _AN_AGE_MS)
    said = {int(key.rsplit("/", 1)[1]): value for key, value in client.key_value_dir_get(place)}
    return [said[process] for process in sorted(said)]


def check_same(facts: Mapping[str, str]) -> None:
    """Raises ValueError in every process where one has other facts than most; names both."""
    every = [json.loads(text) for text in exchange("facts", json.dumps(facts))]
    for name in facts:
        values = [each.get(name) for each in every]
        usual = collections.Counter(values).most_common(1)[0][0]
        others = [process for process, value in enumerate(values) if value != usual]
        if others:
            raise ValueError(
                f"{named(others)} has another {name} than the rest ({shown(values[others[0]])},"
                f" not {shown(usual)}): all hosts need the same code, configuration and devices"
            )


def shown(value: Any) -> str:
    """A fact short enough for a line."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def named(processes: list[int]) -> str:
    """The first of some processes, with its host's name, and how many more there are."""
    names = dict(_names())
    first = f"process {processes[0]} ({names.get(processes[0], '?')})"
    return first + (f" and {len(processes) - 1} more" if len(processes) > 1 else "")


def _names() -> Iterator[tuple[int, str]]:
    client = _client()
    for key, name in client.key_value_dir_get("dppo/said/name/1") if client else ():
        yield int(key.rsplit("/", 1)[1]), name


def code_facts() -> dict[str, str]:
    """What must not differ between hosts: versions, the package's source by its hash, devices."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    libraries = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "optax")}
    python = ".".join(map(str, sys.version_info[:2]))
    found = jax.local_devices()
    devices = f"{len(found)} x {found[0].device_kind}"
    return {
        "package source": digest.hexdigest()[:16],
        "python": python,
        **libraries,
        "set of devices": devices,
    }


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """Process 0 goes through alone, then the others: for files that the first to come makes."""
    client = _client()
    if client is None:
        yield
        return
    _times[name] += 1
    key = f"dppo/first/{name}/{_times[name]}"
    if jax.process_index():
        client.blocking_key_value_get(key, _AN_AGE_MS)
    yield
    if jax.process_index() == 0:
        client.key_value_set(key, "done")


def check_shared(directory: Path, seconds: float = 20.0) -> None:
    """Raises ValueError in every process where one does not see process 0's `directory`.

    Checkpoints are written by all into one folder. Network file systems may take a while to show
    a new file.
    """
    if _client() is None:
        return
    whole = directory.absolute()
    home = next(folder for folder in (whole, *whole.parents) if folder.is_dir())
    probe = home / f".dppo-{os.getpid()}-{time.time_ns()}"
    name, below = exchange("probe", f"{probe.name} {len(whole.relative_to(home).parts)}")[0].split()
    if jax.process_index() == 0:  # once all have come, who may have looked whether it is empty
        probe.touch()
    probe = [whole, *whole.parents][int(below)] / name
    ends = time.monotonic() + seconds
    while not (seen := probe.exists()) and time.monotonic() < ends:
        time.sleep(0.2)
    blind = [i for i, saw in enumerate(exchange("seen", str(seen))) if saw != "True"]
    if jax.process_index() == 0:
        probe.unlink()
    if blind:
        raise ValueError(
            f"{named(blind)} does not see process 0's {probe.parent}: put --workdir on a file"
            " system that all hosts share"
        )


# ---- ends ---------------------------------------------------------------------------------------


def fail_together(message: str, status: int) -> None:
    """Tells the other processes why this one ends, and ends it; returns where there are none."""
    client = _client() if jax.distributed.is_initialized() else None
    if client is None:
        return
    _leaving.acquire()  # for good: one thread ends this process
    if _PEER.search(message):
        # Most likely another has died: JAX soon knows which, and ends us with its name.
        time.sleep(_heartbeat() + 5)
    print(f"dppo: {message}", file=sys.stderr)
    with contextlib.suppress(Exception):  # the coordinator may be what has failed
        client.key_value_set(FAILED + str(jax.process_index()), json.dumps([status, message]))
    _leave_after_the_others(client, status)


def finish_together() -> None:
    """Waits until every process is done, so that a late failure of one is the failure of all."""
    client = _client() if jax.distributed.is_initialized() else None
    if client is not None:
        client.wait_at_barrier("dppo/done", _AN_AGE_MS)
        # An interpreter that ends aborts where a thread is in JAX's client.
        _over.set()
        if _watcher.is_alive():
            _watcher.join()
        jax.distributed.shutdown()


def _watch() -> None:
    """Ends this process, whatever it waits for, once another has told that it failed."""
    client, here = _client(), jax.process_index()
    if client is None:
        return
    while not _over.wait(1.0):
        try:
            told = client.key_value_dir_get(FAILED)
        except Exception:  # the coordinator is gone: JAX ends us, or the run is over
            return
        for key, text in told:
            process = int(key.removeprefix(FAILED))
            if process != here:
                _leaving.acquire()
                status, message = json.loads(text)
                print(f"dppo: {named([process])} stopped: {message}", file=sys.stderr)
                _leave_after_the_others(client, status)


def _leave_after_the_others(client: Any, status: int) -> None:
    """Ends this process; the coordinator once all have seen that one failed, or in 15 s."""
    with contextlib.suppress(Exception):
        client.key_value_set(SEEN + str(jax.process_index()), "")
        ends = time.monotonic() + (15 if jax.process_index() == 0 else 0)
        while time.monotonic() < ends and len(client.key_value_dir_get(SEEN)) < jax.process_count():
            time.sleep(0.2)
    _leave(status)


def _leave(status: int) -> None:
    """Ends the process from any thread: no handler that could wait for the others runs."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Preemption:
    """Notes SIGTERM, which schedulers send before they take a machine away."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def anywhere(self) -> bool:
        """Whether any process has been asked; all must ask together."""
        return any_process(self._asked)
