#!/usr/bin/env bash
# How many blocks of each kernel an SM of a GPU holds at once. Needs no GPU.
#
# Usage: tests/cuda/occupancy.sh [--check | --float]
#
# occupancy.py says more; this gets nvcc for it.
# shellcheck source=SCRIPTDIR/../../cmake/shell.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../../cmake/shell.sh"
cd -- "$project"
nvcc=$(cmake/cuda_toolkit.sh --compiler)/bin/nvcc
exec "${PYTHON:-python3}" tests/cuda/occupancy.py --nvcc "$nvcc" "$@"
