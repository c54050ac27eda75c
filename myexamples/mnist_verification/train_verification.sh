#!/usr/bin/env bash
# Softmax against large margins by verification: trains on the digits 0 to 4,
# compares pairs of the digits 5 to 9. Builds and gets what is missing, then
# runs mnist_verification.py, whose options it takes.
helper=myexamples/mnist_verification/mnist_verification.py
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

here=$ROOT/myexamples/mnist_verification
data=$ROOT/myexamples/mnist/data
convert=$(example mnist/convert_mnist_data)
new=$here/data.new

make_lmdb() {  # DB PREFIX
  local log
  if [ -e "$1" ]; then
    cmp -s "$1/dataset.txt" "$data/dataset.txt" ||
      die "$(rel "$1") is not made from $(rel "$data"): move it away"
    say "$(rel "$1") is ready"
    return
  fi
  rm -rf "$new"
  make_dir "$new"
  "$PYTHON" "$here/split_digits.py" "$data/$2" "$new/$2" 0-4 || exit 1
  log=$(GLOG_logtostderr=1 "$convert" "$new/$2-images-idx3-ubyte" \
    "$new/$2-labels-idx1-ubyte" "$new/lmdb" 2>&1) || {
    make_dir "$here"
    die "the conversion to $(rel "$1") failed: $log"
  }
  cp "$data/dataset.txt" "$new/lmdb" || die "cannot write to $(rel "$new")"
  mv -T -- "$new/lmdb" "$1"
  rm -rf "$new"
  say "made $(rel "$1")"
}

# shellcheck disable=SC2119  # without options
build_caffe
"$PYTHON" -c 'import sklearn' 2>/dev/null ||
  need_packages "the ROC curves" python3-sklearn
need_plots
"$ROOT/myexamples/mnist/get_mnist.sh"
one_at_a_time "$here/runs/.lock"
make_lmdb "$here/train_lmdb" train
make_lmdb "$here/test_lmdb" t10k
# One thread for each net is faster, also when it is judged.
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
export RAYON_NUM_THREADS=${RAYON_NUM_THREADS:-1}
say "training on the classes 0 to 4 of $(cat "$data/dataset.txt")"
"$PYTHON" "$helper" "$@"
