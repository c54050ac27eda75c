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

one_at_a_time "$ROOT/build/test-logs/.lock"  # tests/run.py has it, too

# The Debian package of the cargo on the PATH: cargo, cargo-web or cargo-1.89.
cargo_package() {
  dpkg -S "$(readlink -f "$(command -v cargo)")" 2>/dev/null |
    sed -n '1s/^\(cargo[^:]*\):.*/\1/p'
}

# The package that writes event files, for the tests alone.
tensorboardx=$ROOT/build/tensorboardX

has_tensorboardx() {
  PYTHONPATH=$tensorboardx "$PYTHON" -c 'import tensorboardX' 2>/dev/null
}

# What it depends on is Debian's.
get_tensorboardx() {
  ! has_tensorboardx || return 0
  say "getting tensorboardX from PyPI"
  rm -rf -- "$tensorboardx" "$tensorboardx.part"
  find_pip && pip_unpack "$tensorboardx.part" --quiet 'tensorboardX==2.6.*' ||
    return
  mv -- "$tensorboardx.part" "$tensorboardx" && has_tensorboardx
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
  # nvcc comes from PyPI where there is none, and so does tensorboardX.
  { { [ -z "$cuda" ] || [ -n "${CUDA_HOME:-}" ] ||
    PATH=$PATH:/usr/local/cuda/bin command -v nvcc >/dev/null; } &&
    has_tensorboardx; } || modules+=(pip=python3-pip)
  for pair in "${modules[@]}"; do
    "$PYTHON" -c "import ${pair%%=*}" 2>/dev/null || missing+=("${pair#*=}")
  done
  for pair in shellcheck=shellcheck dot=graphviz curl=curl npm=npm \
      column=bsdextrautils; do
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
  get_tensorboardx ||
    say "tensorboardX cannot be had: the tests of event files are left out"
}

# The cargo that builds the library: the first one on the PATH may be too old.
! cargo=$(cmake/find_cargo.sh 2>/dev/null) || PATH=$cargo:$PATH
options=()
if ! (install_packages); then
  can_install || die "run this again when root has installed these packages"
  options+=(--packages-failed)
fi
[ -n "$cuda" ] || options+=(--no-cuda)
cargo=$(cargo_package) || true
exec "$PYTHON" tests/run.py --cargo "${cargo:-cargo}" "${options[@]}"
