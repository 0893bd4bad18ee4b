"""Several local processes of CPU devices: the numbers of one process, and clear ends."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import agreement
import numpy as np
import pytest

import launch
from dppo_jax import hosts
from dppo_jax.clusters import Cluster, cluster_of, slurm_devices
from dppo_jax.prompts.store import prepare

pytestmark = pytest.mark.multidevice
HERE = Path(__file__).parent

RECIPE = """
from __gin__ import dynamic_registration
from dppo_jax import initial_policy
from dppo_jax import optimizer
from dppo_jax import train
from dppo_jax.models import decoder
from dppo_jax.prompts import tokenizers
import toy_rewards
include "configs/recipes/arithmetic_cpu.gin"
STEPS = 1000
PROMPTS_PER_STEP = 8
SAMPLES_PER_PROMPT = 2
MINIBATCHES = 1
MAX_NEW_TOKENS = 16
TOP_K_CAPTURE = 4
LEARNING_RATE = 1e-2
DATA_DIR = "{data}"
tokenizers.train_sentencepiece.path = "{data}/tokenizer.model"
decoder.DecoderConfig.width = 16
decoder.DecoderConfig.layers = 1
decoder.DecoderConfig.heads = 2
decoder.DecoderConfig.kv_heads = 2
decoder.DecoderConfig.head_size = 8
decoder.DecoderConfig.mlp_width = 32
optimizer.adamw.warmup_steps = 0
train.train.initial_policy = @initial_policy.random_policy()
train.train.verifier = @toy_rewards.even_digits
train.train.eval_prompts = 12
train.train.checkpoint_every = 2
"""


def metrics(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    prepare("arithmetic", folder / "data", largest=39, held_out=100)  # each process reads them all
    (folder / "hosts.gin").write_text(RECIPE.format(data=folder / "data"))
    return folder / "hosts.gin"


def assert_same_numbers(ours: list[dict], theirs: list[dict]):
    for a, b in zip(ours, theirs, strict=False):  # runs end where they are told to
        names = {name for name in a if not name.startswith(("time/", "mismatch/"))}
        assert names == {name for name in b if not name.startswith(("time/", "mismatch/"))}
        for name in names:
            if a[name] is None or b[name] is None:  # a mean of nothing
                assert a[name] == b[name], name
                continue
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-6), name


def environment(recipe: Path, processes: int) -> dict[str, str]:
    """Several processes have two devices each, one alone has four."""
    devices = 2 if processes > 1 else 4
    return launch.environment(devices, recipe.parent / f"programs{processes}")


def train_until(recipe: Path, run: Path, steps: int, processes: int):
    """The run of some processes, under way and `steps` steps far."""
    commands = launch.dppo(processes, "train", recipe, "--workdir", run)
    env = environment(recipe, processes)
    running = launch.start(commands, env, [HERE] * processes)
    launch.wait_for(lambda: len(metrics(run)) >= steps, running)
    return running


def stopped(running: list[subprocess.Popen], run: Path) -> int:
    """SIGTERM to the last process alone: all must stop behind a checkpoint, whose step it is."""
    running[-1].send_signal(signal.SIGTERM)
    ended = launch.ends(running)
    done = len(metrics(run))
    assert [e.status for e in ended] == [0] * len(ended), ended
    for each in ended:
        (line,) = each.told
        assert f"has a checkpoint of step {done} of 1000" in line
    assert (run / "checkpoints" / str(done)).is_dir()
    return done


@pytest.fixture(scope="module")
def one_process(recipe) -> Path:
    """Some steps of one process with the four devices."""
    run = recipe.parent / "one"
    stopped(train_until(recipe, run, 6, 1), run)
    return run


def test_two_processes_are_one_run(recipe, one_process):
    """They stop together, one process reads their checkpoint, two read its, and die together."""
    run = recipe.parent / "two"
    done = stopped(train_until(recipe, run, 2, 2), run)
    done = stopped(train_until(recipe, run, done + 1, 1), run)
    running = train_until(recipe, run, done + 1, 2)
    since = time.monotonic()
    launch.kill_worker(running[1])
    ended = launch.ends(running)
    assert time.monotonic() - since < 60
    assert [e.status for e in ended] == [1, 1]
    assert "process 1 died or lost its network" in ended[0].told[-1], ended[0].err
    assert "goes on from the newest checkpoint" in ended[0].told[-1]
    assert "ended by SIGKILL" in ended[1].told[-1]
    assert "Check failure stack trace" not in ended[0].err

    found = metrics(run)
    assert [line["step"] for line in found] == list(range(len(found)))
    assert_same_numbers(found, metrics(one_process))
    assert found[1]["time/compilations"] == 0
    # each process keeps the answers that it graded; together they are those of one process
    kept = [run / "answers.jsonl", run / "answers-1.jsonl"]
    rows = [json.loads(line) for file in kept for line in file.read_text().splitlines()]
    alone = [json.loads(x) for x in (one_process / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == len(alone) == 12
    by_id = {row["example"]["id"]: row["answers"] for row in rows}
    assert by_id == {row["example"]["id"]: row["answers"] for row in alone}


def evaluated(recipe: Path, run: Path, processes: int) -> dict:
    name = run.parent / f"answers{processes}.jsonl"
    command = ["eval", recipe, "--checkpoint", run, "--answers", name]
    env = environment(recipe, processes)
    commands = launch.dppo(processes, *command, "--json")
    ended = launch.ends(launch.start(commands, env, [HERE] * processes))
    assert {e.status for e in ended} == {0}, ended
    assert not any(e.out.count("sets") for e in ended[1:])
    return json.loads(ended[0].out.splitlines()[-1])["sets"]


@pytest.mark.slow
def test_evaluation_does_not_depend_on_processes(recipe, one_process):
    alone = evaluated(recipe, one_process, 1)
    assert evaluated(recipe, one_process, 2) == evaluated(recipe, one_process, 4) == alone


@pytest.mark.slow
def test_four_processes_go_on_where_two_stopped(recipe, one_process):
    run = recipe.parent / "four"
    done = stopped(train_until(recipe, run, 2, 2), run)
    done = stopped(train_until(recipe, run, done + 1, 4), run)
    running = train_until(recipe, run, done + 1, 4)
    launch.kill_worker(running[0])  # the coordinator, this time
    ended = launch.ends(running)
    assert [e.status for e in ended] == [1] * 4
    for each in ended[1:]:
        assert "process 0, the coordinator, died" in each.told[-1], each.err
    assert_same_numbers(metrics(run), metrics(one_process))


def test_processes_agree(tmp_path):
    port = launch.free_port()
    commands = [[HERE / "agreement.py", i, port, tmp_path] for i in range(2)]
    ended = launch.ends(launch.start(commands, launch.environment(2), [HERE] * 2))
    found = [json.loads(e.out.splitlines()[-1]) for e in ended]
    alone = agreement.drawn_by_engine()
    for here, each in enumerate(found):
        assert each["said"] == [["a", "b"], ["c", "d"]]
        assert each["made"] and each["any"] == [False, True]
        assert each["gathered"] == [0, 10, 11]
        assert each["exact"] == [[1 / 3], [1 / 3 + 1]]
        assert each["same"] == each["shared"] == "" and not each.get("late")
        assert "process 1 (" in each["other"] and "another configuration" in each["other"]
        assert "process 1 (" in each["apart"] and "put --workdir on a file" in each["apart"]
        split, both, tensor = (each["rows"][n] for n in ("split", "held_by_both", "tensor"))
        assert split["share"] == [here, 2, [0, 1], True]
        assert split["whole"] == [*range(8), *range(100, 108)]
        assert split["split"] == list(range(here * 8, here * 8 + 8))
        assert tensor["share"] == [0, 1, [0], here == 0]
        assert tensor["whole"] == list(range(8)) and tensor["parts"] == [0]
        for rows in (split, both, tensor):
            assert rows["back"] and rows["back_from_copies"]
        assert each["engine"]["tokens"] == alone["tokens"]
        assert each["engine"]["own"] == alone["tokens"][here * 4 : here * 4 + 4]
        np.testing.assert_allclose(each["engine"]["logp"], alone["logp"], atol=1e-5)
        # one device of each process draws for the other, which trains
        sampler = each["sampler"]
        assert sampler["same"] and "on several hosts goes with" in sampler["refused"]
        assert 1 <= sampler["bytes"] < 1.2  # norms are whole on each, all else is there once
    # an error of one process ends both, with its own status and words
    assert [e.status for e in ended] == [2, 2]
    assert ended[1].told == ["dppo: the verifier's server did not start"]
    (line,) = ended[0].told
    assert "process 1 (" in line and line.endswith("stopped: the verifier's server did not start")


def test_another_configuration_on_one_host(recipe, tmp_path):
    commands = launch.dppo(2, "train", recipe, "--workdir", tmp_path / "run")
    commands[1].append("--gin.SEED=7")
    ended = launch.ends(launch.start(commands, launch.environment(1), [HERE] * 2))
    assert [e.status for e in ended] == [2, 2]
    for each in ended:
        (line,) = each.told
        assert "process 1 (" in line and "has another configuration than the rest" in line
        assert "train.train.seed is 0 here and 7 there" in line or "SEED is 0 here" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_other_code_on_one_host(recipe, tmp_path):
    package = shutil.copytree(HERE.parent.parent / "dppo_jax", tmp_path / "dppo_jax")
    shutil.copytree(HERE.parent.parent / "configs", tmp_path / "configs")
    with (package / "scoring.py").open("a") as file:
        file.write("# changed on this host alone\n")
    commands = launch.dppo(2, "train", recipe, "--workdir", tmp_path / "run")
    here = launch.environment(1)
    there = here | {"PYTHONPATH": os.pathsep.join([str(tmp_path), here["PYTHONPATH"]])}
    running = [
        launch.start([command], env, [HERE])[0]
        for command, env in zip(commands, (here, there), strict=True)
    ]
    ended = launch.ends(running)
    assert [e.status for e in ended] == [2, 2]
    for each in ended:
        (line,) = each.told
        assert "process 1 (" in line and "has another package source than the rest" in line
    assert not (tmp_path / "run").exists()


PARTIAL = """
train.train.rollouts = @rollouts.continuous()
train.train.partial_rollouts = @partial_rollouts.PartialRollouts()
partial_rollouts.PartialRollouts.extra_prompts = 4
"""


@pytest.mark.slow
def test_what_works_in_one_process_is_refused_on_every_host(recipe, tmp_path):
    refused = tmp_path / "refused.gin"
    refused.write_text(
        "from __gin__ import dynamic_registration\nfrom dppo_jax import partial_rollouts\n"
        "from dppo_jax import train\nfrom dppo_jax.sampling import rollouts\n"
        f'include "{recipe}"\n{PARTIAL}\n'
    )
    commands = launch.dppo(2, "train", refused, "--workdir", tmp_path / "run")
    ended = launch.ends(launch.start(commands, launch.environment(1), [HERE] * 2))
    assert [e.status for e in ended] == [2, 2]
    for each in ended:
        (line,) = each.told
        assert "one process" in line or "process 0 (" in line or "process 1 (" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_sample_ahead_on_a_device_each(recipe):
    """They train what one process does that samples ahead on the devices that it trains on."""
    ahead = recipe.parent / "ahead.gin"
    ahead.write_text(
        "from __gin__ import dynamic_registration\nfrom dppo_jax import train\n"
        f'include "{recipe}"\ntrain.train.async_depth = 1\n'
    )
    alone, run = recipe.parent / "ahead_alone", recipe.parent / "ahead_apart"
    stopped(train_until(ahead, alone, 5, 1), alone)
    with ahead.open("a") as file:
        file.write("train.train.sampler_devices = 1\n")
    done = stopped(train_until(ahead, run, 2, 2), run)
    stopped(train_until(ahead, run, done + 2, 2), run)
    found, told = metrics(run), {"time/weight_transfer", "weights/bytes_sent"}
    assert all(told <= set(line) and line["weights/bytes_sent"] > 0 for line in found)
    assert_same_numbers(
        [{k: x for k, x in line.items() if k not in told} for line in found], metrics(alone)
    )


def test_an_unreachable_coordinator():
    """One that is not there, and one that waits for somebody who never comes."""
    recipe = "configs/recipes/arithmetic_cpu.gin"
    missing, waiting = (launch.dppo(2, "train", recipe, timeout=3) for _ in range(2))
    env = launch.environment(1)
    ended = launch.ends(launch.start([missing[1], waiting[0]], env, [launch.TESTS.parent] * 2))
    assert [e.status for e in ended] == [1, 1], ended
    assert [len(e.told) for e in ended] == [1, 1]
    assert "did not answer within 3 s" in ended[0].told[0]
    assert "not all of the 2 processes came within 3 s" in ended[1].told[0]


def test_what_hosts_are_told():
    assert cluster_of(environment={}) is None
    told = {"DPPO_COORDINATOR": "a:1", "DPPO_PROCESSES": "4", "DPPO_PROCESS_ID": "2"}
    assert cluster_of(environment=told) == Cluster("a:1", 4, 2, 300.0)
    assert cluster_of("b:2", None, 3, 9.0, environment=told) == Cluster("b:2", 4, 3, 9.0)
    slurm = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    assert cluster_of(environment=slurm) == Cluster()
    assert cluster_of(environment=slurm | {"SLURM_NTASKS": "1"}) is None
    assert slurm_devices(slurm) is None
    assert slurm_devices(slurm | {"SLURM_GPUS_ON_NODE": "4"}) == [0, 1, 2, 3]
    assert slurm_devices(slurm | {"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS": "8"}) is None


def test_a_port_that_another_program_has():
    """JAX would crash with a segmentation fault."""
    with socket.create_server(("", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ValueError, match=r"cannot be had \(Address already in use\)"):
            hosts.start(Cluster(address, 2, 0))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "2"], "give all three of --coordinator"),
        (["--coordinator", "here", "--processes", "2", "--process-id", "0"], "not HOST:PORT"),
        (["--coordinator", "h:1", "--processes", "2", "--process-id", "2"], "numbered from 0"),
        (["--coordinator", "h:70000", "--processes", "2", "--process-id", "0"], "not HOST:PORT"),
    ],
)
def test_flags_that_make_no_cluster(dppo, flags, message):
    done = dppo("train", "configs/recipes/arithmetic_cpu.gin", *flags)
    assert done.status == 2 and message in done.err and len(done.err.splitlines()) == 1


def test_the_parent_passes_statuses_on():
    """A child that is only ever one process: what it says and how it ends reach the caller."""
    code = "import sys; from dppo_jax.supervise import supervise; sys.exit(supervise(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "nowhere.gin"],
        env=launch.environment(1), capture_output=True, text=True, cwd=HERE,
    )  # fmt: skip
    assert done.returncode == 2 and "nowhere.gin" in done.stderr
