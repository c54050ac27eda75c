#!/usr/bin/env bash
# Makes myexamples/mnist/mnist_train_lmdb and mnist_test_lmdb, which the nets
# read, with Caffe's own converter; get_mnist.sh gets the images.
#
# Usage: myexamples/mnist/create_mnist.sh [--fashion]
#
#   --fashion   take Fashion-MNIST on purpose, as in get_mnist.sh
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

has_option --fashion "$@" || true
options=("$@")

here=$ROOT/myexamples/mnist
convert=$(example mnist/convert_mnist_data)
train_db=$here/mnist_train_lmdb
test_db=$here/mnist_test_lmdb

ready() {
  local db
  if [ -e "$train_db" ] && [ -e "$test_db" ]; then
    [ ${#options[@]} -eq 0 ] || [ "$(mnist_name)" = Fashion-MNIST ] ||
      die "$(rel "$train_db") holds $(mnist_name): move it,\
 $(rel "$test_db") and $(rel "$here/data") away to get Fashion-MNIST"
    # LMDBs of the user's own do not say what they hold.
    for db in "$train_db" "$test_db"; do
      [ ! -e "$here/data/dataset.txt" ] || [ ! -e "$db/dataset.txt" ] ||
        same_images "$db" "$here/data"
    done
    say "$(rel "$train_db") and $(rel "$test_db") are ready"
    exit 0
  fi
}
ready
[ -x "$convert" ] || die "$convert is missing: run cmake/build_caffe.sh first"
"$here/get_mnist.sh" "${options[@]}"
one_at_a_time "$here/.lock"
ready

make_lmdb "$train_db" "$here/data" "$here/data/train"
make_lmdb "$test_db" "$here/data" "$here/data/t10k"
