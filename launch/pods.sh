# Sourced by the scripts that start runs on other machines: --dry-run, bad input, hardware, secrets.
# shellcheck shell=bash disable=SC2034  # the variables are for those who source it

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
secrets=(HF_TOKEN WANDB_API_KEY) # passed by name; their values are never written or printed
dry=
patience=(--host-timeout 1200) # machines come up, and pull their images, minutes apart

usage() { # the comment at the top of the script, which says how to call it
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
  exit "${1:-0}"
}

fail() {
  echo "error: $*" >&2
  exit 2
}

need() { # "$@", which begins with a flag: its value must be there
  [[ $# -ge 2 && $2 != --* ]] || fail "$1 needs a value"
}

# Runs a command, or prints it as it would be typed.
run() {
  if [[ $dry ]]; then
    printf '+'
    printf ' %q' "$@"
    echo
  else
    "$@"
  fi
}

check_name() {
  [[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "name '$1': at most 40 small letters, digits and dashes, beginning with a letter"
}

check_number() { # FLAG VALUE
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 is '$2', not a positive number"
}

check_recipe() {
  [[ $1 == *.gin ]] || fail "'$1' is no recipe: give a .gin file"
  [[ -f $1 || -f $repository/$1 ]] || fail "recipe $1 does not exist here"
}

check_recipe_of_image() { # the same path names it here and in what launch/Dockerfile makes
  check_recipe "$1"
  [[ $1 == configs/* && $1 != *..* ]] ||
    fail "the image holds recipes under configs/ alone, not $1: move it there, then build the image"
}

check_program() { # NAME: it will be called, unless this is a dry run
  [[ $dry ]] || command -v "$1" >/dev/null || fail "there is no $1 on this machine: install it"
}

check_no_secret() { # what would end up in process lists
  local name argument
  for name in "${secrets[@]}"; do
    [[ ${!name:-} ]] || continue
    for argument in "$@"; do
      [[ $argument != *"${!name}"* ]] || fail "an argument holds the value of $name: leave it out"
    done
  done
}

# hardware NAME: v5p:4x4x4 or h100:16, as for `dppo plan`, into kind, topology, chips and hosts.
hardware() {
  local size dimensions=2 example=4x4
  kind=${1%%:*} topology=${1#*:} chips=1
  case $kind in
  v4 | v5p | 7x) dimensions=3 example=4x4x4 ;;
  v5e | v6e) ;;
  h100 | h200 | b200 | a100) dimensions=1 example=16 ;;
  *) fail "hardware '$1': v4, v5p, 7x, v5e or v6e with a topology, as v5p:4x4x4; or a100, h100," \
    "h200, b200 with a number of GPUs, as h100:16" ;;
  esac
  IFS=x read -ra sizes <<<"$topology"
  [[ $1 == *:* && $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)*$ ]] && ((${#sizes[@]} == dimensions)) ||
    fail "hardware '$1': sizes as in $kind:$example"
  for size in "${sizes[@]}"; do chips=$((chips * size)); done
  per_host=4
  ((dimensions > 1)) || per_host=8
  ((chips >= per_host)) || per_host=$chips
  ((chips % per_host == 0)) || fail "hardware '$1': $chips chips are no whole hosts of $per_host"
  hosts=$((chips / per_host))
}

# What a pod's shell does with the words of a command: SIGTERM goes on to it, which the first process
# of a container must do itself. A run that was asked to stop ends with status 0, but without a
# summary it is not complete and must be started again. Status 2, bad input, will not get better.
pod_shell() { # FOLDER of the run
  echo "\"\$@\" & child=\$!; trap 'kill -TERM \$child' TERM;" \
    "while wait \$child; status=\$?; kill -0 \$child 2>/dev/null; do :; done;" \
    "[ \$status -ne 0 ] || [ -f $1/summary.json ] || exit 75; exit \$status"
}

# The accelerator type of Cloud TPU VMs and of xpk: v4 and v5p are named by their cores.
accelerator_type() {
  case $kind in
  v4 | v5p) echo "$kind-$((2 * chips))" ;;
  v5e) echo "v5litepod-$chips" ;;
  v6e) echo "v6e-$chips" ;;
  *) fail "$kind has no accelerator type: on GKE ask for it by gke.sh without --xpk" ;;
  esac
}
