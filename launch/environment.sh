# Sourced by local.sh and test.sh: finds a Python and makes, or reuses, a virtual environment.
# shellcheck shell=bash disable=SC2034  # the variables are for those who source it

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
rest=()             # arguments other than --python PATH
asked=${PYTHON:-}   # the Python asked for, by variable or by flag; empty if none
flagged=            # set when it was asked for by flag

fail() {
  echo "error: $*" >&2
  exit 2
}

parse_arguments() {
  while (($#)); do
    if [[ $1 == --python ]]; then
      (($# > 1)) || fail "--python needs a path"
      asked=$2 flagged=yes
      shift
    else
      rest+=("$1")
    fi
    shift
  done
}

# Prints the Python asked for, or else the first that will do.
find_python() {
  local candidate
  local supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
  local candidates=(python3 python3.13 python3.12 python3.11 python)
  [[ $asked ]] && candidates=("$asked")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c "$supported" 2>/dev/null; then
      "$candidate" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$candidate cannot make environments; on Debian and Ubuntu: apt install python3-venv"
      echo "$candidate"
      return
    fi
  done
  fail "${asked:-what is on PATH} is not Python 3.11, 3.12 or 3.13; give one with --python PATH"
}

# make_environment FOLDER PYTHON EXTRAS: installs the pinned dependencies with these extras of
# pyproject.toml, unless that was done before with the same Python, pins and place.
make_environment() {
  local folder=$1 python=$2 extras=$3 made_for stamp
  local stamp_file=$folder/installed-${extras:-none} log=$folder/install.log started=$SECONDS
  made_for="$root $("$python" -VV)"
  stamp=$(cat "$root/pyproject.toml" "$root/launch/constraints.txt" | cksum)
  if [[ $(cat "$folder/made-for" 2>/dev/null) != "$made_for" ]]; then
    "$python" -m venv --clear "$folder"
    echo "$made_for" >"$folder/made-for"
  fi
  [[ $(cat "$stamp_file" 2>/dev/null) == "$stamp" ]] && return
  echo "installing into $folder (minutes when nothing is cached; log: $log)" >&2
  if ! "$folder/bin/python" -m pip install --disable-pip-version-check \
    -c "$root/launch/constraints.txt" -e "$root${extras:+[$extras]}" >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    fail "pip could not install; all of its output: $log"
  fi
  echo "$stamp" >"$stamp_file"
  echo "installed in $((SECONDS - started)) s" >&2
}
