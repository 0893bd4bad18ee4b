#!/usr/bin/env bash
# Trains on plain machines that ssh reaches, a process on each; the first is the coordinator.
#
#   launch/hosts.sh RECIPE --hosts HOST,HOST,... --workdir DIR [--dry-run]
#                   [--directory DIR] [--port 8476] [-- options of `dppo train`]
#
# --workdir is a folder that all of them see (NFS, Lustre); --directory holds this repository with
# its .venv on each (default: the path that it has here). HF_TOKEN and WANDB_API_KEY go to the hosts
# through ssh's standard input. SIGTERM to dppo on one host stops all of them behind a checkpoint, and
# the same command goes on from it.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/pods.sh"

recipe='' machines='' workdir='' directory=$repository port=8476 options=()
while (($#)); do
  case $1 in
  --hosts) need "$@" && machines=$2 && shift ;;
  --workdir) need "$@" && workdir=$2 && shift ;;
  --directory) need "$@" && directory=$2 && shift ;;
  --port) need "$@" && port=$2 && shift ;;
  --dry-run) dry=yes ;;
  --help) usage ;;
  --) shift && options=("$@") && break ;;
  -*) fail "unknown option $1 (--help shows them; options of dppo train follow a --)" ;;
  *) [[ ! $recipe ]] || fail "one recipe, not $recipe and $1" && recipe=$1 ;;
  esac
  shift
done
[[ $recipe ]] || fail "give a recipe (--help shows how)"
[[ $machines && $workdir ]] || fail "give --hosts and --workdir"
check_recipe "$recipe"
check_number --port "$port"
check_no_secret "${options[@]+"${options[@]}"}"
IFS=, read -ra names <<<"$machines"
for name in "${names[@]}"; do
  [[ $name =~ ^[A-Za-z0-9_.@-]+$ && $name != -* ]] || fail "host '$name' is no name or address"
done

# What each host's shell reads: assignments, which no list of processes shows.
tokens() {
  local name
  for name in "${secrets[@]}"; do
    [[ ${!name:-} ]] && printf 'export %s=%q\n' "$name" "${!name}"
  done
  return 0
}

check_program ssh
command=(.venv/bin/dppo train "$recipe" --workdir "$workdir" "${options[@]+"${options[@]}"}")
command+=(--coordinator "${names[0]#*@}:$port" --processes "${#names[@]}")
started=()
for place in "${!names[@]}"; do
  remote="cd $(printf %q "$directory") && eval \"\$(cat)\" &&"
  remote+=" exec$(printf ' %q' "${command[@]}" --process-id "$place")"
  if [[ $dry ]]; then
    run ssh "${names[place]}" "$remote"
  else
    # shellcheck disable=SC2029  # it is expanded here, each word quoted for the other side
    ssh "${names[place]}" "$remote" < <(tokens) 2>&1 | sed -u "s/^/[${names[place]}] /" &
    started+=($!)
  fi
done
status=0
for process in "${started[@]+"${started[@]}"}"; do wait "$process" || status=$?; done
exit "$status"
