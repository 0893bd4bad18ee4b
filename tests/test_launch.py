"""The scripts that start runs on other machines: what they would do, bad input, no secrets."""

import gzip
import json
import os
import shlex
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent
RECIPE = "configs/recipes/arithmetic_cpu.gin"
TOKEN, KEY = "hf_secretOfTheTest", "wandb0123secret"

GKE = ["gke.sh", RECIPE, "--on", "v5p:4x4x4", "--image", "eu.pkg.dev/p/dppo:tpu", "--bucket", "b"]
GPUS = ["gke.sh", RECIPE, "--on", "h100:16", "--image", "r/d@sha256:0", "--claim", "c", "--spot"]
SLICES = [*GKE, "--slices", "2", "--name", "two", "--", "--gin.TEXT=\"a 'b' $HOME\n\t: \\c\""]
XPK = [*GKE[:-2], "--xpk", "cluster"]
SLURM = ["slurm.sh", RECIPE, "--nodes", "4", "--workdir", "/runs/a", "--partition", "gpu"]
HOSTS = ["hosts.sh", RECIPE, "--hosts", "alpha,me@beta", "--workdir", "/runs/a b"]
TPU = ["--zone", "us-east5-a", "--on", "v6e:8x8", "--project", "p"]
TPU_RUN = [RECIPE, "--image", "us-docker.pkg.dev/p/d:tpu", "--bucket", "b", "--secret"]
KEEP = ["tpu_vm.sh", "keep", "run-1", *TPU, *TPU_RUN, "HF_TOKEN=hf-token", "--spot"]
CREATE = ["tpu_vm.sh", "create", "run-1", *TPU, "--slices", "2"]
TRAIN = ["tpu_vm.sh", "train", "run-1", *TPU, *TPU_RUN, "HF_TOKEN=hf", "--slices", "2"]
DELETE = ["tpu_vm.sh", "delete", "run-1", "--zone", "us-east5-a"]
GOOD = [GKE, GPUS, SLICES, XPK, SLURM, HOSTS, KEEP, CREATE, TRAIN, DELETE]


def launch(script, *arguments):
    dry = [*arguments]
    dry.insert(dry.index("--") if "--" in dry else len(dry), "--dry-run")
    return subprocess.run(
        ["bash", REPOSITORY / "launch" / script, *dry],
        env={"PATH": os.environ["PATH"], "HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=60,
    )


def commands(text: str) -> list[list[str]]:
    """The commands of a dry run as their arguments."""
    lines = [line for line in text.splitlines() if line.startswith("+ ")]
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.parametrize("arguments", GOOD, ids=lambda a: "-".join(a[:2]).split("/")[0])
def test_dry_runs_print_no_secret(arguments):
    done = launch(*arguments)
    assert done.returncode == 0, done.stderr
    assert RECIPE in done.stdout or arguments in (CREATE, DELETE)
    assert TOKEN not in done.stdout + done.stderr and KEY not in done.stdout + done.stderr


def closed(schema):
    """The schema without room for misspelt fields, which the cluster would drop in silence."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: closed(each) for name, each in schema.items()}
    if "properties" in schema and "x-kubernetes-preserve-unknown-fields" not in schema:
        schema.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("anyOf", None)
    return schema


@pytest.fixture(scope="module")
def jobset():
    """Validates a JobSet and returns it."""
    file = REPOSITORY / "tests" / "golden" / "jobset_schema.json.gz"
    published = json.loads(gzip.decompress(file.read_bytes()))
    schema = closed(published["schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    validator = jsonschema.Draft202012Validator(schema)

    def check(text: str) -> dict:
        found = yaml.safe_load(text)
        validator.validate(found)
        assert found["apiVersion"] == f"{published['group']}/{published['version']}"
        return found

    wrong = yaml.safe_load(launch(*GKE).stdout)
    wrong["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        validator.validate(wrong)
    return check


def pods(found):
    (workers,) = found["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    return workers["replicas"], job, pod, pod["containers"][0]


def test_jobset_of_a_tpu_slice(jobset):
    found = jobset(launch(*GKE).stdout)
    replicas, job, pod, container = pods(found)
    assert replicas == 1 and job["parallelism"] == job["completions"] == 16
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"
    limits = job["template"]["metadata"]["annotations"]
    assert limits.pop("gke-gcsfuse/volumes") == "true"  # 5 GiB would end a large checkpoint
    assert len(limits) == 3 and set(limits.values()) == {"0"}
    names = {each["name"]: each.get("valueFrom") for each in container["env"]}
    assert names["HF_TOKEN"]["secretKeyRef"] == {
        "name": "dppo",
        "key": "HF_TOKEN",
        "optional": True,
    }
    assert set(names) == {"JAX_PLATFORMS", "HF_TOKEN", "WANDB_API_KEY"}
    # bad input ends the run; what failed or was preempted begins again
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    (rule,) = found["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_jobset_of_gpu_nodes(jobset):
    _, job, pod, container = pods(jobset(launch(*GPUS).stdout))
    assert job["completions"] == 2 and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    variables = {each["name"]: each for each in container["env"]}
    coordinator = variables["DPPO_COORDINATOR"]["value"]
    assert coordinator == "arithmetic-cpu-workers-0-0.arithmetic-cpu:8476"
    assert variables["DPPO_PROCESSES"]["value"] == "2"
    assert variables["JAX_PLATFORMS"]["value"] == "cuda,cpu"
    mounted = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    (memory,) = (v for v in pod["volumes"] if v["name"] == mounted["/dev/shm"])
    assert memory["emptyDir"] == {"medium": "Memory"}
    index = variables["DPPO_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_what_a_pod_runs(jobset, tmp_path):
    """The container's own command with a stand-in for dppo: arguments whole, statuses right."""
    found = jobset(launch(*SLICES).stdout)
    replicas, _, _, container = pods(found)
    assert replicas == 2 and found["metadata"]["name"] == "two"
    program = tmp_path / "dppo"
    program.write_text(
        f'#!/bin/bash\nprintf "%s\\0" "$@" >{tmp_path}/said\n'
        f"[ -e {tmp_path}/bad ] && exit 2\n[ -e {tmp_path}/long ] || exit 0\n"
        f'trap "touch {tmp_path}/stopped; exit 0" TERM\ntouch {tmp_path}/trapped\n'
        "while true; do sleep 0.05; done\n"
    )
    program.chmod(0o755)
    run = tmp_path / "runs"
    args = [each.replace("/runs/two", str(run)) for each in container["args"]]

    def start():
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.Popen([*container["command"], *args], env=path)

    def status():
        return start().wait()

    assert status() == 75  # ended, but not complete: to be started again
    (tmp_path / "long").touch()
    pod = start()
    while not (tmp_path / "trapped").exists():
        time.sleep(0.05)
    pod.terminate()  # goes on to dppo, which stops behind a checkpoint
    assert pod.wait() == 75 and (tmp_path / "stopped").exists()
    (tmp_path / "long").unlink()
    run.mkdir()
    (run / "summary.json").touch()
    assert status() == 0
    (tmp_path / "bad").touch()
    assert status() == 2
    said = (tmp_path / "said").read_text().split("\0")[:-1]
    words = ["train", RECIPE, "--workdir", str(run), "--host-timeout", "1200"]
    assert said == [*words, "--gin.TEXT=\"a 'b' $HOME\n\t: \\c\""]


def test_xpk():
    (words,) = commands(launch(*XPK).stdout)
    assert words[:3] == ["xpk", "workload", "create"]
    assert words[words.index("--tpu-type") + 1] == "v5p-128"
    shell = shlex.split(words[words.index("--command") + 1])
    assert shell[:2] == ["bash", "-c"] and shell[3:6] == ["bash", "dppo", "train"]
    assert words[words.index("--restart-on-exit-codes") + 1] == "1,75" and "exit 75" in shell[2]


def test_slurm(tmp_path):
    """The batch script under stand-ins for Slurm's commands: two tasks, and back into the queue."""
    done = launch(*SLURM, "--", "--gin.TEXT='a b'")
    first, script = done.stdout.split("\n", 1)
    assert "--nodes=4" in first and "--partition=gpu" in first and "--signal=TERM@300" in first
    assert "--export=ALL" in first
    (tmp_path / "scontrol").write_text(
        f'#!/bin/bash\n[ "$1" = show ] && printf "n1\\nn2\\n" || echo "$@" >>{tmp_path}/queue\n'
    )
    (tmp_path / "srun").write_text(
        "#!/bin/bash\nwhile [ $1 != bash ]; do shift; done\n"
        'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n'
    )
    (tmp_path / "dppo").write_text(f'#!/bin/bash\nprintf "%s|" "$@" >>{tmp_path}/said\n')
    for name in ("scontrol", "srun", "dppo"):
        (tmp_path / name).chmod(0o755)
    script = script.replace(str(REPOSITORY / ".venv" / "bin" / "dppo"), str(tmp_path / "dppo"))
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", script], env=variables | path, check=True)
    common = f"train|{RECIPE}|--workdir|/runs/a|--host-timeout|1200|--gin.TEXT='a b'|"
    common += "--coordinator|n1:20007|"
    assert (tmp_path / "said").read_text() == "".join(
        f"{common}--processes|2|--process-id|{i}|" for i in range(2)
    )
    assert (tmp_path / "queue").read_text() == "requeue 7\n"


def test_slurm_in_a_container():
    image = [*SLURM, "--image", "r/d", "--mount", "/models", "--mount", "/hf cache"]
    words = shlex.split(launch(*image).stdout.split("srun", 1)[1].split("bash -c")[0])
    assert "--container-mounts=/runs/a:/runs/a,/models:/models,/hf cache:/hf cache" in words
    assert "--container-image=r/d" in words and "--container-workdir=/dppo" in words


def test_plain_hosts(tmp_path):
    """With a stand-in for ssh: tokens arrive by standard input, no argument holds them."""
    ssh = tmp_path / "ssh"
    ssh.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$*" >>{tmp_path}/seen-$1\ncd {tmp_path}\nbash -c "true'
        ' && eval \\"\\$(cat)\\" && echo token=\\$HF_TOKEN >>got"\nexit 3\n'
    )
    ssh.chmod(0o755)
    done = subprocess.run(
        ["bash", REPOSITORY / "launch" / HOSTS[0], *HOSTS[1:]],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3
    assert (tmp_path / "got").read_text() == f"token={TOKEN}\n" * 2
    for place, host in enumerate(("alpha", "me@beta")):
        seen = (tmp_path / f"seen-{host}").read_text()
        assert TOKEN not in seen and f"--process-id {place}" in seen
        assert "--coordinator alpha:8476 --processes 2" in seen and "/runs/a\\ b" in seen


def test_tpu_vms():
    text = launch(*KEEP).stdout
    create, train = (line for line in text.splitlines() if line.startswith("+ "))
    (create,) = commands(create)
    assert create[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert "--accelerator-type=v6e-64" in create and "--spot" in create and "--project=p" in create
    assert "gcloud secrets versions access latest --secret=hf-token" in train
    assert "export HF_TOKEN=" in train and "--worker=all" in train
    (two,) = commands(launch(*CREATE).stdout)
    assert "--node-count=2" in two and "--node-prefix=run-1" in two
    both = launch(*TRAIN).stdout
    assert "ssh run-1-0 " in both and "ssh run-1-1 " in both
    (delete,) = commands(launch(*DELETE).stdout)
    assert delete[3:6] == ["queued-resources", "delete", "run-1"] and "--force" in delete


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gke.sh"], "give a recipe"),
        (["gke.sh", "nowhere.gin", *GKE[2:]], "recipe nowhere.gin does not exist"),
        ([*GKE, "--on", "v5p:4x4"], "sizes as in v5p:4x4x4"),
        ([*GKE, "--on", "v9:4"], "hardware 'v9:4'"),
        ([*GKE, "--on", "h100:2x2"], "sizes as in h100:16"),
        ([*GKE, "--on", "h100:12"], "no whole hosts of 8"),
        ([*GKE, "--name", "A_b"], "name 'A_b'"),
        ([*GKE, "--slices", "0"], "--slices is '0'"),
        ([*GKE, "--claim", "c"], "--bucket or --claim, not both"),
        ([*GKE, "--xpk", "c"], "no --bucket or --claim"),
        ([*GPUS[:-3], "--xpk", "c"], "h100 has no accelerator type"),
        (["gke.sh", str(REPOSITORY / RECIPE), *GKE[2:]], "recipes under configs/ alone"),
        ([*GKE, "--image", "x; y"], "is no name of an image"),
        ([*GKE, "--nodes", "3"], "unknown option --nodes"),
        ([*GKE, "--name"], "--name needs a value"),
        ([*GPUS, "--slices", "2"], "--slices is of TPUs"),
        ([*GKE, "--", f"--gin.TOKEN='{TOKEN}'"], "holds the value of HF_TOKEN"),
        ([*GKE, "--", "--gin.TEXT='\x1b'"], "holds a control character"),
        (["slurm.sh", RECIPE, "--nodes", "4"], "give --nodes and --workdir"),
        ([*SLURM, "--time", "soon"], "--time 'soon'"),
        ([*SLURM, "--workdir", "runs/a"], "give a path from /"),
        ([*SLURM, "--mount", "/models"], "goes with --image"),
        ([*SLURM, "--image", "r/d", "--mount", "models"], "give a folder from /"),
        (["hosts.sh", RECIPE, "--hosts", "a;b", "--workdir", "/r"], "host 'a;b'"),
        (["tpu_vm.sh", "start", "a"], "'start': create, train, keep or delete"),
        (["tpu_vm.sh", "create", "a", "--zone", "here"], "--zone 'here'"),
        (["tpu_vm.sh", "create", "a", "--zone", "us-east5-a"], "give --on"),
        ([*TRAIN[:7], RECIPE], "give a recipe, --image and --bucket"),
        ([*KEEP, "--secret", f"HF_TOKEN={TOKEN}"], "holds the value of HF_TOKEN"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = launch(*arguments)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("script", ["gke.sh", "slurm.sh", "hosts.sh", "tpu_vm.sh"])
def test_help_shows_how(script):
    done = launch(script, "--help")
    assert done.returncode == 0 and f"launch/{script} " in done.stdout
    assert "set -euo" not in done.stdout


def test_scripts_parse():
    for script in (REPOSITORY / "launch").glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
        assert len(script.read_text().splitlines()) <= 300
