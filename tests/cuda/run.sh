#!/usr/bin/env bash
# Tests the GPU path on the CPU, and compiles the kernels with nvcc.
#
# Usage: tests/cuda/run.sh
#
# As far as that goes without a GPU: tests/emulated.rs, with the kernels
# compiled by nvcc, too, for several architectures, and a look at the registers
# that they take (occupancy.sh). Needs g++ 11 or newer and cargo; gets nvcc.
# shellcheck source=SCRIPTDIR/../../cmake/shell.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../../cmake/shell.sh"

(( ! $# )) || bad_usage "unknown argument $1"
cd -- "$project"
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
LSOFTMAX_NVCC=$(cmake/cuda_toolkit.sh --compiler)/bin/nvcc
LSOFTMAX_NVCC_FLAGS="-Werror all-warnings -Xptxas -warn-spills"
for arch in $("$LSOFTMAX_NVCC" --list-gpu-arch | grep -Ex 'compute_(70|75|80|90|100|120)'); do
  LSOFTMAX_NVCC_FLAGS+=" -gencode arch=$arch,code=sm_${arch#compute_}"
done
export LSOFTMAX_NVCC LSOFTMAX_NVCC_FLAGS
tests/cuda/occupancy.sh --check
# A folder of its own: another build script's outcome would be thrown away.
CARGO_TARGET_DIR=build/cuda_test exec cargo test --locked \
  --features emulated --lib --test emulated
