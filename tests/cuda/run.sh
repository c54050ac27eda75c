#!/usr/bin/env bash
# Tests the GPU path as far as that goes without a GPU.
set -euo pipefail
unset CDPATH

usage() {
  cat <<'END'
Usage: tests/cuda/run.sh

1. compiles the kernels (src/cuda/*.cu) with nvcc for several architectures;
2. builds the crate with the feature `cuda`;
3. compiles the same kernels for the CPU (emulate.hpp) into a stand-in for the
   driver, libcuda.so.1, twice: with ThreadSanitizer, and with AddressSanitizer
   and UBSan;
4. runs the layers' GPU path from the bridge to those kernels (*_test.cpp) and
   compares it with the CPU path;
5. runs it once more with the barriers taken out of the kernels, where
   ThreadSanitizer must object.

Needs g++ 11 or newer and cargo; gets nvcc with cmake/cuda_toolkit.sh. What it
builds stays in build/cuda_test.
END
}

if (( $# )); then
  usage
  [[ $1 == -h || $1 == --help ]] && exit
  exit 2
fi

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
project=$(cd -- "$here/../.." && pwd -P)
out=$project/build/cuda_test

say() { printf 'tests/cuda: %s\n' "$*"; }
die() {
  printf 'tests/cuda: FAILED: %s\n' "$1" >&2
  shift
  if (( $# )); then printf '  %s\n' "$@" >&2; fi
  exit 1
}

CXX=${CXX:-g++}
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
echo '#include <barrier>
int main() {}' | "$CXX" -std=c++20 -x c++ -fsyntax-only - 2> /dev/null ||
  die "$CXX cannot compile C++20's <barrier>" "apt-get install g++ (11 or newer)"
command -v cargo > /dev/null ||
  die "there is no cargo" "Install Rust, as cmake/build_caffe.sh does."

mkdir -p -- "$out"
exec 9>> "$out/lock"
flock 9

# Runs a command; its output is shown only if it fails.
quietly() {  # LOG COMMAND...
  local log=$out/$1.log
  shift
  "$@" > "$log" 2>&1 && return
  local status=$?
  # The first lines tell; a broken kernel fails everything after.
  head -n 60 -- "$log" | cut -c 1-300 >&2
  die "$(basename -- "$log" .log), exit status $status" "The whole log: $log"
}

# Waits for the background jobs PIDS, any of which may have failed.
wait_for() {
  local pid status=0
  for pid; do wait "$pid" || status=1; done
  (( ! status )) || exit 1
}

# ---- 1. nvcc ----

toolkit=$("$project/cmake/cuda_toolkit.sh" --compiler)
nvcc=$toolkit/bin/nvcc
known=$("$nvcc" --list-gpu-arch)
architectures=()
flags=()
for arch in 70 75 80 90 100 120; do
  if grep -qx "compute_$arch" <<< "$known"; then
    architectures+=("$arch")
    flags+=(-gencode "arch=compute_$arch,code=sm_$arch")
  fi
done
(( ${#architectures[@]} >= 2 )) ||
  die "$nvcc knows fewer than two of the architectures 70 to 120"
last=${architectures[-1]}
flags+=(-gencode "arch=compute_$last,code=compute_$last")

kernels=()
for source in "$project"/src/cuda/*.cu; do
  name=$(basename -- "$source" .cu)
  quietly "nvcc-$name" "$nvcc" -Werror all-warnings -Xptxas -warn-spills \
      -fatbin -O3 "${flags[@]}" -o "$out/$name.fatbin" "$source"
  quietly "nvcc-$name-ptx" "$nvcc" -ptx -arch="compute_${architectures[0]}" \
      -o "$out/$name.ptx" "$source"
  # The stand-in's copy of the file: the kernels that nvcc saw, registered.
  {
    printf '#include "emulate.hpp"\n#include "standin.hpp"\n'
    printf '#include "%s.cu"\n' "$name"
    sed -n 's/^\.visible \.entry \([A-Za-z0-9_]*\).*/STANDIN_KERNEL(\1)/p' \
        "$out/$name.ptx"
  } > "$out/$name.cpp"
  count=$(grep -c STANDIN_KERNEL "$out/$name.cpp") ||
    die "there is no kernel in src/cuda/$name.cu"
  say "nvcc compiles $count kernels of $name.cu for sm_${architectures[*]}"
  kernels+=("$name")
done

# ---- 2. the crate ----

say "building the crate with the feature cuda"
# One architecture: the embedded image is checked, not run.
CARGO_TARGET_DIR=$out/cargo LSOFTMAX_NVCC=$nvcc \
  LSOFTMAX_NVCC_FLAGS=-arch=sm_${architectures[0]} \
  quietly cargo cargo build --locked --features cuda \
    --manifest-path "$project/Cargo.toml"
say "compiling the kernels and the tests for the CPU"

# ---- 3. the stand-in and the tests ----

common=(-std=c++20 -O1 -g -fno-omit-frame-pointer -Wall -Wextra -Werror
        "-I$here")
# -param: emulate.hpp says why.
thread=(-fsanitize=thread --param tsan-distinguish-volatile=1)
# shellcheck disable=SC2034  # named by reference
address=("-fsanitize=address,undefined" -fno-sanitize-recover=all)

# A stand-in in $out/NAME with the kernels of the folder SOURCES.
build_standin() {  # NAME SOURCES FLAGS...
  local name=$1 sources=$2 kernel inputs=("$here/libcuda.cpp")
  shift 2
  mkdir -p -- "$out/$name"
  for kernel in "${kernels[@]}"; do inputs+=("$out/$kernel.cpp"); done
  quietly "build-$name" "$CXX" "${common[@]}" "$@" -fPIC -shared \
      "-I$sources" -isystem "$toolkit/include" -Wl,-soname,libcuda.so.1 \
      -o "$out/$name/libcuda.so.1" "${inputs[@]}" -pthread
}

build_test() {  # NAME TEST FLAGS...
  local name=$1 test=$2
  shift 2
  mkdir -p -- "$out/$name"
  quietly "build-$name-$test" "$CXX" "${common[@]}" "$@" \
      "-I$project/include" "-I$out/cargo/cxxbridge" -o "$out/$name/$test" \
      "$here/$test.cpp" "$out/cargo/debug/liblsoftmax.a" -ldl -pthread
}

# Kernels without their barriers.
mkdir -p -- "$out/mutants"
for kernel in "${kernels[@]}"; do
  sed '/^ *__syncthreads();/d' "$project/src/cuda/$kernel.cu" \
    > "$out/mutants/$kernel.cu"
done

tests=()
for test in "$here"/*_test.cpp; do tests+=("$(basename -- "$test" .cpp)"); done

# Two jobs at a time.
build_all() {  # SANITIZER
  local -n sanitizer=$1
  local test
  build_standin "$1" "$project/src/cuda" "${sanitizer[@]}"
  for test in "${tests[@]}"; do build_test "$1" "$test" "${sanitizer[@]}"; done
}
build_all thread &
first=$!
build_all address &
second=$!
wait_for "$first" "$second"
build_standin no_barriers "$out/mutants" "${thread[@]}" &
mutant=$!
say "running the tests"

# ---- 4. the tests ----

# Where the C library is loaded at random, old ThreadSanitizers may not start.
plain=()
if setarch "$(uname -m)" -R true 2> /dev/null; then
  plain=(setarch "$(uname -m)" -R)
fi
export TSAN_OPTIONS=halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1

run_all() {  # SANITIZER
  local test
  for test in "${tests[@]}"; do
    LD_LIBRARY_PATH=$out/$1 \
      quietly "$test-$1" "${plain[@]}" "$out/$1/$test"
  done
}
run_all thread &
first=$!
run_all address &
second=$!
wait_for "$mutant" "$first" "$second"
say "GPU path = CPU path, no race, no bad access: ${tests[*]}"

for test in "${tests[@]}"; do
  quietly "$test-without-driver" "${plain[@]}" "$out/address/$test" \
      --without-driver
  say "without a driver ($test): $(tail -n 1 -- "$out/$test-without-driver.log")"
done

# ---- 5. the tests can fail ----

for test in "${tests[@]}"; do
  log=$out/$test-no_barriers.log
  if LD_LIBRARY_PATH=$out/no_barriers "${plain[@]}" "$out/thread/$test" \
      > "$log" 2>&1; then
    die "$test passes with kernels that have no barriers"
  fi
  grep -q 'ThreadSanitizer: data race' "$log" ||
    die "$test finds no race in kernels that have no barriers" \
        "The whole log: $log"
done
say "kernels without their barriers are caught"

say "passed; emulated only, nothing here has run on a GPU"
