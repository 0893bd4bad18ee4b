#!/usr/bin/env bash
# Trains the smallest recipe on the CPU of this machine, which needs nothing but Python 3.11 to 3.13:
#
#   bash launch/local.sh [--python PATH] [options of `dppo train`, such as --gin.STEPS=10]
#
# The environment goes to .venv at the top of the repository and is reused by the next call.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

parse_arguments "$@"
python=$(find_python)
make_environment "$root/.venv" "$python" ""
exec "$root/.venv/bin/dppo" train "$root/configs/recipes/arithmetic_cpu.gin" ${rest[@]+"${rest[@]}"}
