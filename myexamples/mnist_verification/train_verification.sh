#!/usr/bin/env bash
# Softmax against large margins by verification: trains on the digits 0 to 4,
# compares pairs of the digits 5 to 9. Builds and gets what is missing, then
# runs mnist_verification.py, whose options it takes.
helper=myexamples/mnist_verification/mnist_verification.py
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

here=$ROOT/myexamples/mnist_verification
data=$ROOT/myexamples/mnist/data

# shellcheck disable=SC2119  # without options
build_caffe
"$PYTHON" -c 'import sklearn' 2>/dev/null ||
  need_packages "the ROC curves" python3-sklearn
need_plots
"$ROOT/myexamples/mnist/get_mnist.sh"
one_at_a_time "$here/runs/.lock"
make_lmdb "$here/train_lmdb" "$data" "$data/train" 0-4
make_lmdb "$here/test_lmdb" "$data" "$data/t10k" 0-4
# One thread for each net is faster, also when it is judged.
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
export RAYON_NUM_THREADS=${RAYON_NUM_THREADS:-1}
say "training on the classes 0 to 4 of $(cat "$data/dataset.txt")"
exec "$PYTHON" "$helper" "$@"
