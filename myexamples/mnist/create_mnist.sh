#!/usr/bin/env bash
# Makes myexamples/mnist/mnist_{train,test}_lmdb with Caffe's own converter
# from the images that get_mnist.sh gets.
#
# Usage: myexamples/mnist/create_mnist.sh [--fashion]
#
# Makes myexamples/mnist/mnist_train_lmdb and mnist_test_lmdb, which the nets
# read, with Caffe's own converter; get_mnist.sh gets the images.
#
#   --fashion   take Fashion-MNIST on purpose, as in get_mnist.sh
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

[ $# -le 1 ] || bad_usage "more than one argument"
case ${1:-} in
  '' | --fashion) ;;
  *) bad_usage "unknown argument $1" ;;
esac
options=("$@")

here=$ROOT/myexamples/mnist
convert=$(example mnist/convert_mnist_data)
train_db=$here/mnist_train_lmdb
test_db=$here/mnist_test_lmdb
new=$here/lmdb.new

ready() {
  if [ -e "$train_db" ] && [ -e "$test_db" ]; then
    [ ${#options[@]} -eq 0 ] || [ "$(mnist_name)" = Fashion-MNIST ] ||
      die "$(rel "$train_db") holds $(mnist_name): move it,\
 $(rel "$test_db") and $(rel "$here/data") away to get Fashion-MNIST"
    say "$(rel "$train_db") and $(rel "$test_db") are ready"
    exit 0
  fi
}
ready
[ -x "$convert" ] || die "$convert is missing: run cmake/build_caffe.sh first"
"$here/get_mnist.sh" "${options[@]}"
one_at_a_time "$here/.lock"
ready

make_lmdb() {  # DB PREFIX
  local log
  if [ -e "$1" ]; then
    cmp -s "$1/dataset.txt" "$here/data/dataset.txt" ||
      die "$(rel "$1") is not made from $(rel "$here/data"): move it away"
    return
  fi
  rm -rf "$new"
  log=$(GLOG_logtostderr=1 "$convert" "$here/data/$2-images-idx3-ubyte" \
    "$here/data/$2-labels-idx1-ubyte" "$new" 2>&1) || {
    make_dir "$here"
    die "the conversion to $(rel "$1") failed: $log"
  }
  cp "$here/data/dataset.txt" "$new" || die "cannot write to $(rel "$new")"
  mv -T -- "$new" "$1"
  say "made $(rel "$1")"
}
make_lmdb "$train_db" train
make_lmdb "$test_db" t10k
