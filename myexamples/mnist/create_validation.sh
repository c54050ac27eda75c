#!/usr/bin/env bash
# Cuts the training images of MNIST for choices that the test images must not
# see: makes myexamples/mnist/mnist_fit_lmdb of the first 50,000 of the 60,000
# and mnist_validation_lmdb of the last 10,000, in their order and whatever
# their classes, with Caffe's own converter.
#
# Usage: myexamples/mnist/create_validation.sh
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

[ $# -eq 0 ] || bad_usage "unknown argument $1"

here=$ROOT/myexamples/mnist
fit_db=$here/mnist_fit_lmdb
validation_db=$here/mnist_validation_lmdb
train_db=$here/mnist_train_lmdb

ready() {
  if [ -e "$fit_db" ] && [ -e "$validation_db" ]; then
    same_images "$fit_db" "$train_db"
    same_images "$validation_db" "$train_db"
    say "$(rel "$fit_db") and $(rel "$validation_db") are ready"
    exit 0
  fi
}
"$here/create_mnist.sh"
[ -e "$train_db/dataset.txt" ] ||
  die "$(rel "$train_db") does not say which images it holds: name them in its\
 dataset.txt, or move it away"
ready
[ -x "$(example mnist/convert_mnist_data)" ] ||
  die "$(example mnist/convert_mnist_data) is missing: run\
 cmake/build_caffe.sh first"
"$here/get_mnist.sh"
same_images "$train_db" "$here/data"
one_at_a_time "$here/.lock"
ready
make_lmdb "$fit_db" "$train_db" "$here/data/train" fit
make_lmdb "$validation_db" "$train_db" "$here/data/train" validation
