#!/usr/bin/env bash
# Tests the GPU path as far as that goes without a GPU: tests/emulated.rs, with
# the kernels compiled by nvcc, too, for several architectures.
set -euo pipefail
unset CDPATH

if (( $# )); then
  echo "Usage: tests/cuda/run.sh   (needs g++ 11 or newer, cargo; gets nvcc)"
  [[ $1 == -h || $1 == --help ]] && exit
  exit 2
fi

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
LSOFTMAX_NVCC=$(cmake/cuda_toolkit.sh --compiler)/bin/nvcc
LSOFTMAX_NVCC_FLAGS="-Werror all-warnings -Xptxas -warn-spills"
for arch in $("$LSOFTMAX_NVCC" --list-gpu-arch | grep -Ex 'compute_(70|75|80|90|100|120)'); do
  LSOFTMAX_NVCC_FLAGS+=" -gencode arch=$arch,code=sm_${arch#compute_}"
done
export LSOFTMAX_NVCC LSOFTMAX_NVCC_FLAGS
# A folder of its own: another build script's outcome would be thrown away.
CARGO_TARGET_DIR=build/cuda_test exec cargo test --locked \
  --features emulated --test emulated
