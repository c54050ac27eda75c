#!/usr/bin/env bash
# Runs every test of the project that this machine can run.
#
# Usage: tests/run.sh [--no-cuda]
#
# Installs what it needs, builds Caffe with the layers and their tests (see
# cmake/build_caffe.sh; $CAFFE_ROOT is honoured) and runs all tests, one stage
# after the other, whether or not an earlier one failed. Each stage leaves its
# log in build/test-logs. Ends with a table of the stages and with the number of
# tests that passed and failed; the exit status is 0 if none failed.
#
#   --no-cuda  leave out the GPU kernels' tests, for which CUDA's compiler is
#              downloaded (0.1 GB; build/ grows to about 1 GB with it)
# shellcheck source=SCRIPTDIR/../myexamples/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../myexamples/common.sh"

cuda=1
for argument; do
  case $argument in
    --no-cuda) cuda='' ;;
    *) bad_usage "unknown argument $argument" ;;
  esac
done

logs=$ROOT/build/test-logs
one_at_a_time "$logs/.lock"
rm -f -- "$logs"/*.log
trap 'exit 130' INT
trap 'exit 143' TERM
# The tests leave no byte code beside the sources.
export PYTHONDONTWRITEBYTECODE=1

stages=()    # "RESULT|SECONDS|NAME|WORDS", in their order
closings=()  # what the test runners ended with
passed=0     # single tests
failed=0
skipped=0
number=0
total=12

# sum_of LOG PATTERN: the sum of the numbers before the words of a closing
# line.
sum_of() {
  { grep -Eo -- "$2" "$1" || true; } | tr -dc '0-9\n' |
    awk '{ sum += $1 } END { print sum + 0 }'
}

# stage NAME PATTERN COMMAND...: runs a command with its output on the screen
# and in a log. PATTERN finds the closing lines of the command's test runner,
# which count its tests; without one, the stage counts as one test.
stage() {
  local name=$1 pattern=$2 log line status start=$SECONDS closing=''
  local result=passed good=0 bad=0 left=0
  shift 2
  number=$((number + 1))
  log=$logs/${name//[^a-zA-Z0-9]/-}.log
  say "[$number/$total] $name"
  # A pipeline's part is a subshell: a `die` ends the stage and not the run.
  set +e
  "$@" 2>&1 | tee -- "$log"
  status=${PIPESTATUS[0]}
  set -e
  if [ -n "$pattern" ]; then
    # Colours would hide the words from the patterns.
    sed 's/\x1b\[[0-9;]*m//g' "$log" | { grep -E -- "$pattern" || true; } \
      >"$logs/.closing"
    good=$(sum_of "$logs/.closing" '[0-9]+ passed|PASSED +\] [0-9]+')
    bad=$(sum_of "$logs/.closing" '[0-9]+ (failed|errors?)|FAILED +\] [0-9]+')
    left=$(sum_of "$logs/.closing" '[0-9]+ (skipped|ignored)')
    closing="$good passed, $bad failed"
    while IFS= read -r line; do
      closings+=("$name: $line")
    done <"$logs/.closing"
    rm -f -- "$logs/.closing"
    if [ "$status" -eq 0 ] && [ "$good" -eq 0 ]; then
      closing="ran no test"
      status=1
    fi
  else
    [ "$status" -ne 0 ] || good=1
  fi
  if [ "$status" -ne 0 ]; then
    result=FAILED
    # A runner that broke down has counted nothing.
    [ "$bad" -gt 0 ] || bad=1
    say "$name failed (exit status $status); its log is $(rel "$log")"
  fi
  passed=$((passed + good))
  failed=$((failed + bad))
  skipped=$((skipped + left))
  stages+=("$result|$((SECONDS - start))|$name|$closing")
}

# skip NAME WHY: a stage that this machine cannot run.
skip() {
  number=$((number + 1))
  say "[$number/$total] $1: SKIPPED, $2"
  skipped=$((skipped + 1))
  stages+=("SKIPPED|0|$1|$2")
}

# ---- What the tests need ----

# The Debian package of the cargo on the PATH: cargo, cargo-web or cargo-1.89.
cargo_package() {
  dpkg -S "$(readlink -f "$(command -v cargo)")" 2>/dev/null |
    sed -n '1s/^\(cargo[^:]*\):.*/\1/p'
}

# All of them at once, with those of the build: who cannot install them asks
# for them only once.
install_packages() {
  local missing pair modules cargo
  mapfile -t missing < <(cmake/build_caffe.sh --packages)
  modules=(pytest=python3-pytest xdist=python3-pytest-xdist h5py=python3-h5py
    pydot=python3-pydot numpy=python3-numpy scipy=python3-scipy
    sklearn=python3-sklearn cv2=python3-opencv nbconvert=python3-nbconvert
    ipykernel=python3-ipykernel)
  # nvcc comes from PyPI where there is none.
  [ -z "$cuda" ] || [ -n "${CUDA_HOME:-}" ] ||
    PATH=$PATH:/usr/local/cuda/bin command -v nvcc >/dev/null ||
    modules+=(pip=python3-pip)
  for pair in "${modules[@]}"; do
    "$PYTHON" -c "import ${pair%%=*}" 2>/dev/null || missing+=("${pair#*=}")
  done
  for pair in shellcheck=shellcheck dot=graphviz curl=curl npm=npm; do
    command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
  done
  [ -e "$fashion" ] || missing+=(dataset-fashion-mnist)
  cargo=$(printf '%s\n' "${missing[@]}" | grep -m 1 '^cargo') ||
    cargo=$(cargo_package) || cargo=''
  if [ -n "$cargo" ]; then
    cargo fmt --version >/dev/null 2>&1 ||
      missing+=("rustfmt${cargo#cargo}")
    cargo clippy --version >/dev/null 2>&1 ||
      missing+=("rust${cargo#cargo}-clippy")
  fi
  mapfile -t missing < <(printf '%s\n' "${missing[@]}" |
    awk '$0 && !seen[$0]++')
  [ ${#missing[@]} -eq 0 ] || need_packages "the tests" "${missing[@]}"
  echo "all there"
}

# The cargo that builds the library: the first one on the PATH may be too old.
use_the_builds_cargo() {
  local dir
  dir=$(cmake/find_cargo.sh 2>/dev/null) || return 0
  PATH=$dir:$PATH
}

# add_rust_tool NAME COMPONENT PACKAGE: for cargo NAME, which may come apart
# from cargo. Fails where it cannot be had.
add_rust_tool() {
  local package
  ! cargo "$1" --version >/dev/null 2>&1 || return 0
  say "cargo $1 is missing; installing it"
  if command -v rustup >/dev/null &&
      rustup component add "$2" >/dev/null 2>&1; then
    cargo "$1" --version >/dev/null 2>&1 && return
  fi
  package=$(cargo_package) || true
  # shellcheck disable=SC2059  # the format is one of the two calls below
  (need_packages "cargo $1" "$(printf "$3" "${package#cargo}")") &&
    cargo "$1" --version >/dev/null 2>&1
}

# ---- The stages ----

check_scripts() {
  local scripts
  mapfile -d '' -t scripts < <(find . \
    \( -path ./build -o -path ./target -o -path ./vendor -o -path ./.git \) -prune -o \
    -type f \( -name '*.sh' -o -path ./.ci/run \) -print0)
  shellcheck --external-sources -- "${scripts[@]}" &&
    echo "${#scripts[@]} scripts are clean"
}

run_gtests() {
  # Caffe's tests find their data from the root of its tree.
  cd -- "$CAFFE_ROOT" || return
  local tests=build/test/test.testbin
  # Make's, of all layers.
  [ ! -e build/.linked ] || tests=build/test/test_all.testbin
  "$tests" --gtest_color=no --gtest_filter="$1"
}

run_pytest() {
  local folder=$1
  shift
  "$PYTHON" -m pytest -p no:cacheprovider -ra --durations=5 "$@" \
    "tests/$folder"
}

closing_of_cargo='^test result: '
closing_of_gtest='^\[  (PASSED|FAILED)  \] [0-9]+ tests?[.,]'
closing_of_pytest='^=+ .*[0-9]+ (passed|failed|errors?|skipped).* in [0-9.]+s'

use_the_builds_cargo
stage "packages" '' install_packages
if [ "$failed" -gt 0 ] && ! can_install; then
  die "run this again when root has installed these packages"
fi
stage "build of Caffe" '' build_caffe --tests
use_the_builds_cargo
if add_rust_tool fmt rustfmt 'rustfmt%s'; then
  stage "cargo fmt" '' cargo fmt --check
else
  skip "cargo fmt" "rustfmt cannot be had for $(cargo --version)"
fi
if add_rust_tool clippy clippy 'rust%s-clippy'; then
  stage "cargo clippy" '' cmake/find_cargo.sh clippy --locked --all-targets -- -D warnings
else
  skip "cargo clippy" "clippy cannot be had for $(cargo --version)"
fi
stage "cargo test" "$closing_of_cargo" cmake/find_cargo.sh test --locked
if [ -z "$cuda" ]; then
  skip "cuda emulated" "--no-cuda"
elif cmake/cuda_toolkit.sh --compiler >/dev/null; then
  stage "cuda emulated" '' tests/cuda/run.sh
else
  skip "cuda emulated" "nvcc cannot be had (see above)"
fi
stage "shellcheck" '' check_scripts
for layer in LargeMarginInnerProductLayer BNLayer; do
  stage "gtest $layer" "$closing_of_gtest" run_gtests "${layer}*"
done
stage "pytest patch" "$closing_of_pytest" run_pytest patch
stage "pytest examples" "$closing_of_pytest" run_pytest examples
# Apart from each other, since a LOG(FATAL) in pycaffe ends its process.
stage "pytest e2e" "$closing_of_pytest" run_pytest e2e -n "$(nproc)"

# ---- The end ----

say "results, in $((SECONDS / 60)) min $((SECONDS % 60)) s; the logs are in \
$(rel "$logs")"
printf '%s\n' "${closings[@]}"
for line in "${stages[@]}"; do
  IFS='|' read -r result seconds name closing <<<"$line"
  line=$(printf '%-8s %5d s  %-34s %s' "$result" "$seconds" "$name" "$closing")
  printf '%s\n' "${line%"${line##*[! ]}"}"
done
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" -eq 0 ]
