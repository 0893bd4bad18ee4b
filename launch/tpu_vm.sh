#!/usr/bin/env bash
# Trains on Cloud TPU VMs that are asked for by queued resources.
#
#   launch/tpu_vm.sh create NAME --zone ZONE --on v5p:4x4x4 [--spot | --reserved] [--slices 1]
#                           [--runtime VERSION]
#   launch/tpu_vm.sh train  NAME --zone ZONE --on ... RECIPE --image IMAGE --bucket BUCKET
#                           [--secret HF_TOKEN=SECRET ...] [-- options of `dppo train`]
#   launch/tpu_vm.sh keep   NAME ... as for create and train: both, again after each preemption
#   launch/tpu_vm.sh delete NAME --zone ZONE
#
# All take --project and --dry-run. The container of launch/Dockerfile runs on all workers; BUCKET is
# their /runs, the run is kept in BUCKET/NAME, and the same `train` goes on from its newest checkpoint.
# What a recipe reads lies in the bucket too: -- --gin.DATA_DIR=/runs/data --gin.HF_DIR=/runs/MODEL.
# A token is named by its secret in Secret Manager, which the workers read; its value appears in no
# command. Before the first call: `ssh-add ~/.ssh/google_compute_engine`, without which gcloud reaches
# one worker alone.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/pods.sh"

verb=${1:-} name='' zone='' on='' project=() spot=() slices=1 runtime='' image='' bucket='' recipe=''
tokens=() options=()
case $verb in
create | train | keep | delete) shift ;;
--help) usage ;;
*) fail "'$verb': create, train, keep or delete (--help shows how)" ;;
esac
while (($#)); do
  case $1 in
  --zone) need "$@" && zone=$2 && shift ;;
  --on) need "$@" && on=$2 && shift ;;
  --project) need "$@" && project=("--project=$2") && shift ;;
  --slices) need "$@" && slices=$2 && shift ;;
  --runtime) need "$@" && runtime=$2 && shift ;;
  --image) need "$@" && image=$2 && shift ;;
  --bucket) need "$@" && bucket=$2 && shift ;;
  --secret) need "$@" && tokens+=("$2") && shift ;;
  --spot | --reserved) spot=("$1") ;;
  --dry-run) dry=yes ;;
  --help) usage ;;
  --) shift && options=("$@") && break ;;
  -*) fail "unknown option $1 (--help shows them; options of dppo train follow a --)" ;;
  *) if [[ ! $name ]]; then name=$1; elif [[ ! $recipe ]]; then recipe=$1; else fail "what is $1?"; fi ;;
  esac
  shift
done
[[ $name ]] || fail "give the run a name"
check_name "$name"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone '$zone': give a zone, as us-east5-a"
check_number --slices "$slices"
check_no_secret "${options[@]+"${options[@]}"}" "${tokens[@]+"${tokens[@]}"}"
at=(--zone="$zone" "${project[@]+"${project[@]}"}")
tpus=(gcloud compute tpus)

slice_names() {
  local slice
  if ((slices == 1)); then echo "$name"; else
    for ((slice = 0; slice < slices; slice++)); do echo "$name-$slice"; done
  fi
}

create() {
  local nodes=(--node-id="$name")
  ((slices == 1)) || nodes=(--node-count="$slices" --node-prefix="$name")
  run "${tpus[@]}" queued-resources create "$name" "${at[@]}" "${nodes[@]}" \
    --accelerator-type="$(accelerator_type)" --runtime-version="$runtime" "${spot[@]+"${spot[@]}"}"
}

state() { # of the queued resource; NONE where there is none, UNKNOWN where nobody can tell now
  local said
  { said=$("${tpus[@]}" queued-resources describe "$name" "${at[@]}" \
    --format='value(state.state)' 2>&1 >&3); } 3>&1 && return
  if [[ $said == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "$said" >&2
    echo UNKNOWN
  fi
}

remove() {
  run "${tpus[@]}" queued-resources delete "$name" "${at[@]}" --force --quiet
}

# What every worker runs: mounts the bucket, reads the tokens, and starts the container.
worker() {
  local token
  cat <<'END'
set -e
command -v gcsfuse >/dev/null || {
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
}
sudo mkdir -p /mnt/runs
END
  echo "mountpoint -q /mnt/runs || sudo gcsfuse --implicit-dirs -o allow_other $bucket /mnt/runs"
  # The same folder for gcloud and for docker under sudo, whatever that takes for its home.
  [[ ! ${image%%/*} =~ (^|[.-])(gcr\.io|pkg\.dev)$ ]] ||
    printf '%s\n' "export DOCKER_CONFIG=\$HOME/.docker" \
      "gcloud auth configure-docker ${image%%/*} --quiet"
  # What a lost connection left running may still stop behind a checkpoint.
  echo "sudo docker stop --time 300 dppo >/dev/null 2>&1 || true"
  echo "sudo docker rm --force dppo >/dev/null 2>&1 || true"
  echo "tokens="
  for token in "${tokens[@]+"${tokens[@]}"}"; do
    echo "value=\$(gcloud secrets versions access latest --secret=${token#*=})"
    printf '%s\n' "tokens+=\"export ${token%%=*}=\$(printf %q \"\$value\")\"\$'\\n'"
  done
  # By standard input: docker keeps the variables that it is given in a file.
  echo "printf %s \"\$tokens\" | sudo -E docker run --interactive --init --name dppo --privileged" \
    "--network host --stop-timeout 300 --volume /mnt/runs:/runs --env JAX_PLATFORMS=tpu,cpu" \
    "--entrypoint bash $image -c 'eval \"\$(cat)\"; exec dppo \"\$@\"' dppo" \
    "train$(printf ' %q' "$recipe" --workdir "/runs/$name" "${patience[@]}" \
      "${options[@]+"${options[@]}"}")"
}

train() {
  local slice started=() status=0
  for slice in $(slice_names); do
    run "${tpus[@]}" tpu-vm ssh "$slice" "${at[@]}" --worker=all --command="$(worker)" &
    started+=($!)
  done
  for slice in "${started[@]}"; do wait "$slice" || status=$?; done
  return "$status"
}

complete() {
  gcloud storage ls "gs://$bucket/$name/summary.json" "${project[@]+"${project[@]}"}" >/dev/null 2>&1
}

keep() {
  if [[ $dry ]]; then
    echo "# until gs://$bucket/$name/summary.json exists; deleted and asked for again when preempted:"
    create
    train
    return
  fi
  local failed=0 began status
  gcloud storage ls "gs://$bucket" "${project[@]+"${project[@]}"}" >/dev/null ||
    fail "gs://$bucket cannot be listed from here, so that nobody could tell when the run is complete"
  until complete; do
    ((failed < 5)) || fail "$name failed five times in a row: its output says why"
    status=0
    case $(state) in
    NONE) create || status=$? ;;
    ACTIVE)
      began=$SECONDS
      train || status=$?
      # Bad input, which all hosts end with, will not get better.
      ((status != 2)) || fail "$name was refused: its output says why; the machines are still yours"
      ((SECONDS - began < 3600)) || status=0 # one that ran for an hour was interrupted
      ;;
    SUSPENDED) remove || status=$? ;;
    FAILED) remove || true && status=1 ;;
    *) sleep 60 && continue ;;
    esac
    if ((status)); then failed=$((failed + 1)) && sleep 60; else failed=0; fi
  done
  echo "complete: gs://$bucket/$name"
}

if [[ $verb == create || $verb == keep ]]; then
  [[ $on ]] || fail "give --on, as v5p:4x4x4"
  hardware "$on"
  accelerator_type >/dev/null
  case $kind in
  v4) known=tpu-ubuntu2204-base ;;
  v5e) known=v2-alpha-tpuv5-lite ;;
  v5p) known=v2-alpha-tpuv5 ;;
  v6e) known=v2-alpha-tpuv6e ;;
  esac
  runtime=${runtime:-$known}
fi
if [[ $verb == train || $verb == keep ]]; then
  [[ $recipe && $image && $bucket ]] || fail "give a recipe, --image and --bucket"
  check_recipe_of_image "$recipe"
  [[ $image =~ ^[A-Za-z0-9./:@_-]+$ ]] || fail "--image '$image' is no name of an image"
  [[ $bucket =~ ^[a-z0-9][a-z0-9._-]*$ ]] || fail "--bucket '$bucket': its name, without gs://"
  for token in "${tokens[@]+"${tokens[@]}"}"; do
    [[ $token =~ ^[A-Z_]+=[A-Za-z0-9_-]+$ ]] || fail "--secret VARIABLE=NAME_OF_THE_SECRET"
  done
fi
check_program gcloud
case $verb in delete) remove ;; *) "$verb" ;; esac
