#!/usr/bin/env bash
# Format, lint, types, then tests, in the environment of local.sh:
#
#   bash launch/test.sh [--all] [--python PATH] [options of pytest]
#
# As many processes as there are cores, four at most; -n 0 runs all in one.
#
# --all installs PyTorch, transformers, peft and libtpu too; tests that need them are skipped
# without it. Tests marked slow run with -m slow: every method trains; full-size steps compile.
# From plain PyPI, PyTorch brings CUDA along; for the small CPU build set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. With --python the environment is a
# second one, .venv-VERSION.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

extras="test"
if [[ ${1:-} == --all ]]; then
  extras="test,parity,plan"
  shift
fi
parse_arguments "$@"
python=$(find_python)
folder=$root/.venv
if [[ $flagged ]]; then
  folder+=-$("$python" -c 'import platform; print(platform.python_version())')
fi
make_environment "$folder" "$python" "$extras"

cd "$root"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
"$folder/bin/ruff" format --check .
"$folder/bin/ruff" check .
"$folder/bin/mypy"
"$folder/bin/python" -m pytest -m "not peer and not slow" -n auto --maxprocesses 4 --dist loadfile \
  ${rest[@]+"${rest[@]}"}
