#!/usr/bin/env bash
# Trains on Slurm nodes with NVIDIA GPUs: one process a node, with all of its GPUs.
#
#   launch/slurm.sh RECIPE --nodes N --workdir DIR [--dry-run] [--gpus-per-node 8] [--time 24:00:00]
#                   [--partition P] [--account A] [--image IMAGE [--mount DIR ...]]
#                   [-- options of `dppo train`]
#
# --workdir is on a file system that all nodes share. Without --image (pyxis, made by
# launch/Dockerfile with EXTRA=cuda13) the .venv of this repository is used; with it --mount names what
# a recipe reads beside, such as its HF_DIR. Slurm warns five minutes before the time is over; the run
# then stops behind a checkpoint and is queued again, as after a preemption, until it is complete.
# Tokens stay in the environment, which sbatch hands on; Slurm's controller itself keeps the
# environment of a job while it has the job, for root alone.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/pods.sh"

recipe='' nodes='' workdir='' gpus=8 time=24:00:00 extra=() image='' mounts=() options=()
while (($#)); do
  case $1 in
  --nodes) need "$@" && nodes=$2 && shift ;;
  --workdir) need "$@" && workdir=$2 && shift ;;
  --gpus-per-node) need "$@" && gpus=$2 && shift ;;
  --time) need "$@" && time=$2 && shift ;;
  --partition | --account) need "$@" && extra+=("$1=$2") && shift ;;
  --image) need "$@" && image=$2 && shift ;;
  --mount) need "$@" && mounts+=("$2") && shift ;;
  --dry-run) dry=yes ;;
  --help) usage ;;
  --) shift && options=("$@") && break ;;
  -*) fail "unknown option $1 (--help shows them; options of dppo train follow a --)" ;;
  *) [[ ! $recipe ]] || fail "one recipe, not $recipe and $1" && recipe=$1 ;;
  esac
  shift
done
[[ $recipe ]] || fail "give a recipe (--help shows how)"
[[ $nodes && $workdir ]] || fail "give --nodes and --workdir"
[[ $workdir == /* ]] || fail "--workdir $workdir: give a path from /, the same on all nodes"
check_recipe "$recipe"
check_number --nodes "$nodes"
check_number --gpus-per-node "$gpus"
[[ $time =~ ^([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}$ ]] || fail "--time '$time' is no time of Slurm's"
check_no_secret "${options[@]+"${options[@]}"}"

mounted=$workdir:$workdir
for place in "${mounts[@]+"${mounts[@]}"}"; do
  [[ $image ]] || fail "--mount $place goes with --image: without one the nodes' own files are there"
  [[ $place =~ ^/[^,:]+$ ]] || fail "--mount '$place': give a folder from /, the same on all nodes"
  mounted+=,$place:$place
done

name=dppo-$(basename "$recipe" .gin)
where=(--chdir="$repository") program=$repository/.venv/bin/dppo
if [[ $image ]]; then
  check_recipe_of_image "$recipe"
  where=(--container-image="$image" --no-container-entrypoint --container-workdir=/dppo)
  where+=(--container-mounts="$mounted")
  program=dppo
fi
check_program sbatch
command=("$program" train "$recipe" --workdir "$workdir" "${patience[@]}")
command+=("${options[@]+"${options[@]}"}")

script() {
  cat <<END
#!/bin/bash
mkdir -p $(printf %q "$workdir")
export JAX_PLATFORMS=\${JAX_PLATFORMS:-cuda,cpu} # a node without its GPUs must fail
head=\$(scontrol show hostnames "\$SLURM_JOB_NODELIST" | head -n 1)
port=\$((20000 + SLURM_JOB_ID % 20000))
# A variable of each task, so that the shell of the task puts it in and not this one.
# All cores are the one task's: it grades answers in processes of its own.
srun --kill-on-bad-exit=1 --cpu-bind=none$(printf ' %q' "${where[@]}") bash -c \\
  'exec "\$@" --processes "\$SLURM_NNODES" --process-id "\$SLURM_NODEID"' \\
  dppo$(printf ' %q' "${command[@]}") --coordinator "\$head:\$port"
status=\$?
# Stopped behind a checkpoint: the queue has it back.
[ \$status -eq 0 ] && [ ! -f $(printf %q "$workdir/summary.json") ] && scontrol requeue "\$SLURM_JOB_ID"
exit \$status
END
}

submit=(sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus")
submit+=(--exclusive --time="$time" --signal=TERM@300 --requeue --open-mode=append)
submit+=(--output="$name-%j.log" --export=ALL "${extra[@]+"${extra[@]}"}")
if [[ $dry ]]; then
  run "${submit[@]}"
  script
else
  script | "${submit[@]}"
fi
