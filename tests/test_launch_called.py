"""The launch scripts called for real, under stand-ins for gcloud, kubectl, sbatch and docker."""

import os
import subprocess
from pathlib import Path

import pytest
from test_launch import GKE, KEEP, KEY, RECIPE, REPOSITORY, SLURM, TOKEN, TPU_RUN
from test_launch import launch as dry

# Each call is kept; in plan a line a call says which comes next, its status and what it says.
RECORD = """#!/bin/bash
cd "${0%/*}"
given=
[[ ${0##*/} != kubectl && ${0##*/} != sbatch ]] || given=$(cat; echo .)
printf '%s\\0' "${0##*/}" "$@" "${given%.}" >>calls
printf '\\x1e' >>calls
"""
GCLOUD = f"""{RECORD}
mapfile -t plan <plan
IFS='|' read -r expected status out err <<<"${{plan[0]}}"
[[ " $* " == *" $expected "* ]] || kill $PPID # nothing that was planned
printf '%s\\n' "${{plan[@]:1}}" >plan
[[ ! $out ]] || echo "$out"
echo "$err" >&2
exit $status
"""


@pytest.fixture
def machine(tmp_path):
    """A PATH of stand-ins: call(script, *arguments) -> the process; calls() -> what was called."""
    for name in ("kubectl", "sbatch", "sleep"):
        (tmp_path / name).write_text(RECORD)
    (tmp_path / "gcloud").write_text(GCLOUD)
    for file in tmp_path.iterdir():
        file.chmod(0o755)

    def call(script, *arguments, plan=()):
        (tmp_path / "plan").write_text("".join("|".join(map(str, each)) + "\n" for each in plan))
        done = subprocess.run(
            ["bash", REPOSITORY / "launch" / script, *arguments],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HF_TOKEN": TOKEN},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not (tmp_path / "plan").read_text().strip(), done.stderr
        return done

    def calls():
        records = (tmp_path / "calls").read_text().split("\x1e")[:-1]
        return [record.split("\0")[:-1] for record in records]

    return call, calls


def shown(*arguments) -> list[list[str]]:
    """The commands of a dry run as a shell reads them."""
    lines = [line[2:] for line in dry(*arguments).stdout.splitlines() if line.startswith("+ ")]
    code = "".join(f"printf '%s\\0' {line}; printf '\\x1e'\n" for line in lines)
    records = subprocess.run(["bash", "-c", code], capture_output=True, text=True).stdout
    return [record.split("\0")[:-1] for record in records.split("\x1e")[:-1]]


def test_a_run_is_kept_through_preemptions(machine):
    """No resource, then a queue, a preemption in mid-run, an unreachable service, the end."""
    call, calls = machine
    absent = "ERROR: (gcloud) NOT_FOUND: Resource was not found"

    def found(state):
        return [("ls", 1, "", "no such object"), ("describe", 0, state, "a note of an update")]

    begins = [("ls", 1, "", ""), ("describe", 1, "", absent), ("create", 0, "", "")]
    plan = [
        ("gs://b", 0, "", ""),
        *begins, *found("WAITING_FOR_RESOURCES"), *found("ACTIVE"), ("ssh", 1, "", "lost"),
        *found("SUSPENDING"), *found("SUSPENDED"), ("delete", 0, "", ""), *begins,
        ("ls", 1, "", ""), ("describe", 1, "", "the service is unavailable"),
        *found("ACTIVE"), ("ssh", 0, "", ""), ("ls", 0, "gs://b/run-1/summary.json", ""),
    ]  # fmt: skip
    done = call(*KEEP, plan=plan)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("complete: gs://b/run-1\n")
    assert "the service is unavailable" in done.stderr
    made = [words for words in calls() if "create" in words or "ssh" in words]
    assert [words[:-1] for words in made] == shown(*KEEP) * 2
    assert all(TOKEN not in word for words in calls() for word in words)


def test_what_fails_again_and_again_is_given_up(machine):
    """Runs that end, and machines that cannot be asked for."""
    call, _ = machine
    failing = [("ls", 1, "", ""), ("describe", 0, "ACTIVE", ""), ("ssh", 1, "", "")]
    refused = [("ls", 1, "", ""), ("describe", 1, "", "NOT_FOUND"), ("create", 1, "", "quota")]
    plan = [("gs://b", 0, "", ""), *failing * 3, *refused * 2, ("ls", 1, "", "")]
    done = call(*KEEP, plan=plan)
    assert done.returncode == 2 and "run-1 failed five times in a row" in done.stderr


def test_what_will_not_get_better_is_given_up_at_once(machine):
    """Bad input, with which all hosts end; a bucket that nobody here can look into."""
    call, _ = machine
    begun = [("gs://b", 0, "", ""), ("ls", 1, "", ""), ("describe", 0, "ACTIVE", "")]
    done = call(*KEEP, plan=[*begun, ("ssh", 2, "", "dppo: steps=0")])
    assert done.returncode == 2 and "run-1 was refused" in done.stderr
    done = call(*KEEP, plan=[("gs://b", 1, "", "403")])
    assert done.returncode == 2 and "gs://b cannot be listed" in done.stderr


def test_deletion(machine):
    call, calls = machine
    arguments = ["tpu_vm.sh", "delete", "run-1", "--zone", "us-east5-a"]
    done = call(*arguments, plan=[("delete", 0, "", "")])
    assert done.returncode == 0
    assert [words[:-1] for words in calls()] == shown(*arguments)


@pytest.mark.parametrize(("arguments", "program"), [(GKE, "kubectl"), (SLURM, "sbatch")])
def test_what_is_submitted_is_what_a_dry_run_shows(machine, arguments, program):
    call, calls = machine
    assert call(*arguments).returncode == 0
    *before, (name, *words, given) = calls()
    assert name == program and TOKEN not in given
    text = dry(*arguments).stdout
    if program == "kubectl":
        ((_, *asked, _),) = before
        assert asked[:3] == ["get", "jobset", "arithmetic-cpu"]
        assert words == ["apply", "-f", "-"] and given == text.split("\n", 1)[1]
    else:
        assert [[name, *words]] == shown(*arguments) and given == text.split("\n", 1)[1]


def test_a_jobset_that_has_ended_gives_way(machine, tmp_path):
    call, calls = machine
    kubectl = (tmp_path / "kubectl").read_text()
    (tmp_path / "kubectl").write_text(f"{kubectl}\n[ $1 != get ] || echo Failed\n")
    assert call(*GKE).returncode == 0
    verbs = [words[1:4] for words in calls()]
    assert verbs[1] == ["delete", "jobset", "arithmetic-cpu"] and verbs[2][0] == "apply"


def test_without_the_program_it_is_one_line(tmp_path):
    for tool in ("bash", "dirname", "basename", "cut", "tr", "sed"):
        (tmp_path / tool).symlink_to(Path("/usr/bin") / tool)
    for arguments, program in ((GKE, "kubectl"), (SLURM, "sbatch"), (KEEP, "gcloud")):
        done = subprocess.run(
            ["bash", REPOSITORY / "launch" / arguments[0], *arguments[1:]],
            env={"PATH": str(tmp_path)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == f"error: there is no {program} on this machine: install it\n"


def test_what_a_tpu_worker_runs(tmp_path):
    """Tokens go from Secret Manager into the container by its standard input: no argument holds
    one, nor does a variable that docker would write down."""
    (train,) = shown(
        "tpu_vm.sh", "train", "r", "--zone", "us-east5-a", "--on", "v6e:4x4", *TPU_RUN,
        "WANDB_API_KEY=wandb", "--", "--gin.TEXT='a b'",
    )  # fmt: skip
    script = next(w for w in train if w.startswith("--command=")).removeprefix("--command=")
    log = f'printf "%s\\0" "$(basename "$0")" "$@" >>{tmp_path}/log; echo >>{tmp_path}/log\n'
    run = 'while [[ $1 != --entrypoint ]]; do shift; done; "$2" "${@:4}"'  # bash, not the image
    stand_ins = {
        "gcsfuse": "", "mountpoint": "exit 1", "mkdir": "",
        "docker": f"env >>$LOG.$1; [ $1 != stop ] || exit 1; [ $1 != run ] || {{ {run}; }}",
        "dppo": "env >>$LOG.dppo; exit 7",
        "gcloud": f"[ $1 = secrets ] && echo {KEY}; exit 0",
        "sudo": '[ "$1" = -E ] && shift; "$@"',
    }  # fmt: skip
    for name, does in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{log}{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "env")}
    environment["HOME"] = str(tmp_path)
    assert subprocess.run(["bash", "-c", script], env=environment).returncode == 7
    called = [line.split("\0")[:-1] for line in (tmp_path / "log").read_text().splitlines()]
    assert ["gcsfuse", "--implicit-dirs", "-o", "allow_other", "b", "/mnt/runs"] in called
    assert ["gcloud", "auth", "configure-docker", "us-docker.pkg.dev", "--quiet"] in called
    stop, remove, docker = (words for words in called if words[0] == "docker")
    assert stop == ["docker", "stop", "--time", "300", "dppo"] and remove[1] == "rm"
    assert docker[:2] == ["docker", "run"] and "JAX_PLATFORMS=tpu,cpu" in docker
    assert docker[docker.index("--entrypoint") + 2] == "us-docker.pkg.dev/p/d:tpu"
    asked = ["train", RECIPE, "--workdir", "/runs/r", "--host-timeout", "1200", "--gin.TEXT='a b'"]
    assert called[-1] == ["dppo", *asked]
    outside, inside = ((tmp_path / f"env.{name}").read_text() for name in ("run", "dppo"))
    assert f"WANDB_API_KEY={KEY}" in inside.splitlines() and KEY not in outside
    assert f"DOCKER_CONFIG={tmp_path}/.docker" in outside.splitlines()
    assert all(KEY not in word for words in called for word in words)
