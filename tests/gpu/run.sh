#!/usr/bin/env bash
# Tests and times the GPU layers on a machine with a GPU.
#
# Usage: run.sh [RESULTS]      in a folder that tests/gpu/bundle.sh made
#
# Runs on GPU 0 (CUDA_VISIBLE_DEVICES picks another), with the logs in RESULTS
# (./results):
#   gtest      the layers' tests in Caffe, gradients by GradientChecker included
#   parity     GPU against CPU, float and double
#   training   200 iterations twice, which must give the same bits
#   memcheck, racecheck   parity under compute-sanitizer, where that is installed
#   benchmark  times beside InnerProduct and BatchNorm + Scale
#
# Exits with 0 if all passed and all budgets are met.
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
shared=$here/shell.sh
[[ -e $shared ]] || shared=$here/../../cmake/shell.sh
# shellcheck source=SCRIPTDIR/../../cmake/shell.sh
. "$shared"

(( $# < 2 )) || bad_usage "more than one folder"
[[ -e $here/gpu_bundle ]] ||
  die "there is no Caffe in $here" \
      "tests/gpu/bundle.sh makes a folder with one, and with this script."
results=${1:-$here/results}
mkdir -p -- "$results"
results=$(cd -- "$results" && pwd -P)

# ---- What the host brings ----

cache=$(ldconfig -p 2> /dev/null || /sbin/ldconfig -p 2> /dev/null || true)

driver=
for dir in ${LD_LIBRARY_PATH:+$(tr ':' ' ' <<< "$LD_LIBRARY_PATH")} \
    /usr/local/nvidia/lib64 /usr/lib/wsl/lib; do
  if [[ -e $dir/libcuda.so.1 ]]; then driver=$dir; break; fi
done
if [[ -z $driver ]] && ! grep -q 'libcuda\.so\.1' <<< "$cache"; then
  die "this machine has no NVIDIA driver (libcuda.so.1), so no usable GPU" \
      "Copy $here to a machine with one, and run it there."
fi

# The first folder that has all of CUDA's libraries that Caffe needs; or
# several that have them together, as pip installs them for some versions.
mapfile -t wanted < "$here/cuda_libraries"
candidates=()
while IFS= read -r dir; do candidates+=("$dir"); done < <(
  tr ':' '\n' <<< "${LD_LIBRARY_PATH:-}"
  for dir in "$here"/cuda/nvidia/*/lib "${CUDA_HOME:-/usr/local/cuda}/lib64" \
      /usr/local/cuda*/lib64; do
    echo "$dir"
  done
  for python in python3 /usr/bin/python3; do
    "$python" -c 'import glob, sys
for path in sys.path:
    print("\n".join(glob.glob(path + "/nvidia/*/lib")))' 2> /dev/null || true
  done)
found=()
missing=()
for library in "${wanted[@]}"; do
  for dir in "${candidates[@]}"; do
    if [[ -n $dir && -e $dir/$library ]]; then
      found+=("$dir")
      continue 2
    fi
  done
  grep -qF "$library " <<< "$cache" || missing+=("$library")
done
(( ! ${#missing[@]} )) ||
  die "Caffe needs ${missing[*]}, and this machine does not have that" \
      "Install CUDA 13, or get the libraries into this folder with" \
      "  pip install --no-deps --target '$here/cuda' 'nvidia-cublas==13.*' 'nvidia-curand==10.4.*'" \
      "and, if cuDNN is among them, nvidia-cudnn-cu13"

libraries=$(printf '%s\n' ${driver:+"$driver"} "${found[@]}" |
  awk 'NF && !seen[$0]++' | paste -sd :)

# Programs find the folder's own libraries by themselves. A C library that is
# older than the one Caffe was built with is passed by, with scripts that stand
# for the programs: some tests start their own program anew.
bin=$here/bin
run=(env "LD_LIBRARY_PATH=$libraries")
if ! "${run[@]}" "$bin/caffe" --version > "$results/start.log" 2>&1; then
  loader=("$here"/lib/c/ld-linux*)
  bin=$results/bin
  run=()
  mkdir -p -- "$bin"
  for program in "$here"/bin/*; do
    script=$bin/$(basename -- "$program")
    # shellcheck disable=SC2016  # the script's own
    printf '#!/usr/bin/env bash\nexec %q --argv0 "$0" --library-path %q %q "$@"\n' \
      "${loader[0]}" "$here/lib/c:$here/lib:$libraries" "$program" > "$script"
    chmod +x "$script"
  done
  "$bin/caffe" --version >> "$results/start.log" 2>&1 || {
    cat -- "$results/start.log" >&2
    die "Caffe does not start on this machine"
  }
fi
export CUDA_DEVICE_ORDER=PCI_BUS_ID GLOG_minloglevel=1

# ---- The steps ----

failed=()
status=0
"${run[@]}" "$bin/gpu_check" device > "$results/device.log" 2>&1 ||
  status=$?
cat -- "$results/device.log"
(( ! status )) || die "the GPU cannot be used (its message stands above)"

# step NAME COMMAND...: runs it with its output in RESULTS/NAME.log.
step() {
  local name=$1 begin=$SECONDS
  shift
  if "$@" > "$results/$name.log" 2>&1; then
    say "$name: passed in $(( SECONDS - begin )) s"
  else
    failed+=("$name")
    say "$name: FAILED; the end of $results/$name.log:"
    tail -n 15 -- "$results/$name.log"
  fi
}

gtest() {
  local tests
  "${run[@]}" "$bin/test.testbin" || return 1
  # All of nothing would pass as well.
  tests=$("${run[@]}" "$bin/test.testbin" --gtest_list_tests)
  [[ $tests == *GPUDevice* ]]
}

train() {  # RUN
  (cd -- "$here" && GLOG_minloglevel=0 "${run[@]}" "$bin/caffe" train \
     --solver="$results/solver.prototxt" 2> "$results/train$1.log") || {
    tail -n 5 -- "$results/train$1.log"
    return 1
  }
  sed -n 's/.*solver.cpp.*\] \(Iteration [0-9]*\) .*\(loss = .*\)/\1 \2/p' \
      "$results/train$1.log" > "$results/losses$1"
  mv -- "$results/run_iter_200.caffemodel" "$results/run$1.caffemodel"
}

training() {
  sed "\$a snapshot_prefix: \"$results/run\"" "$here/nets/solver.prototxt" \
    > "$results/solver.prototxt"
  train 1 && train 2 || return 1
  [[ $(wc -l < "$results/losses1") -ge 200 ]] || {
    echo "the log of a training has fewer than 200 losses"
    return 1
  }
  cmp "$results/losses1" "$results/losses2" &&
    cmp "$results/run1.caffemodel" "$results/run2.caffemodel" || return 1
  echo "200 losses and the weights are the same to the last bit"
  tail -n 1 "$results/losses1"
}

sanitizer() {  # TOOL
  local status=0
  compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all \
      "${run[@]}" "$bin/gpu_check" parity || status=$?
  # Races that it suspects in cuBLAS's kernels are not ours to judge.
  if [[ $1 == racecheck && $status == 9 ]] && ! grep -Eq \
      '(large_margin|bn)_[a-z_]*_f(32|64)' "$results/racecheck.log"; then
    echo "no race in the layers' kernels"
    return
  fi
  return "$status"
}

step gtest gtest
step parity "${run[@]}" "$bin/gpu_check" parity
step training training
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
if ! command -v compute-sanitizer > /dev/null; then
  say "memcheck, racecheck: not run, there is no compute-sanitizer"
elif sanitized=$(compute-sanitizer --target-processes all \
                   "${run[@]}" "$bin/gpu_check" device 2>&1 || true)
    [[ $sanitized == *"not supported"* ]]; then
  say "memcheck, racecheck: not run, compute-sanitizer refuses this device"
else
  step memcheck sanitizer memcheck
  step racecheck sanitizer racecheck
fi

say "benchmark"
"${run[@]}" "$bin/gpu_check" benchmark 2>&1 |
  tee "$results/benchmark.log" || failed+=(benchmark)

if (( ${#failed[@]} )); then
  say "FAILED: ${failed[*]} (logs in $results)"
  exit 1
fi
say "passed (logs in $results)"
