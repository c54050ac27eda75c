#!/usr/bin/env bash
# Cuts the training images of MNIST for choices that the test images must not
# see: makes myexamples/mnist/mnist_fit_lmdb of the first 50,000 of the 60,000
# and mnist_validation_lmdb of the last 10,000, in their order and whatever
# their classes, with Caffe's own converter.
#
# Usage: myexamples/mnist/create_validation.sh
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

here=$ROOT/myexamples/mnist
convert=$(example mnist/convert_mnist_data)
fit_db=$here/mnist_fit_lmdb
validation_db=$here/mnist_validation_lmdb
new=$here/validation.new

# same_images DB: ends the script where DB holds a part of other images than
# mnist_train_lmdb does.
same_images() {
  cmp -s "$1/dataset.txt" "$here/mnist_train_lmdb/dataset.txt" ||
    die "$(rel "$1") is not made from the images of\
 $(rel "$here/mnist_train_lmdb"): move it away"
}

ready() {
  if [ -e "$fit_db" ] && [ -e "$validation_db" ]; then
    same_images "$fit_db"
    same_images "$validation_db"
    say "$(rel "$fit_db") and $(rel "$validation_db") are ready"
    exit 0
  fi
}
"$here/create_mnist.sh"
ready
[ -x "$convert" ] || die "$convert is missing: run cmake/build_caffe.sh first"
"$here/get_mnist.sh"
one_at_a_time "$here/.lock"
ready

count=$(od -An -tu1 -j4 -N4 "$here/data/train-images-idx3-ubyte" |
  awk '{ print (($1 * 256 + $2) * 256 + $3) * 256 + $4 }')
# A sixth: 10,000 of 60,000.
fit=$((count - count / 6))

# bytes FILE FIRST COUNT: COUNT bytes of FILE from byte FIRST (from 0).
bytes() {
  dd if="$1" iflag=skip_bytes,count_bytes,fullblock bs=1M skip="$2" \
    count="$3" status=none
}

# cut_idx FILE HEADER SIZE FIRST COUNT: the idx file of COUNT items of SIZE
# bytes from item FIRST (from 0) of an idx file.
cut_idx() {
  local octal
  printf -v octal '\\%03o' $(($5 >> 24 & 255)) $(($5 >> 16 & 255)) \
    $(($5 >> 8 & 255)) $(($5 & 255))
  bytes "$1" 0 4
  printf '%b' "$octal"
  bytes "$1" 8 $(($2 - 8))
  bytes "$1" $(($2 + $3 * $4)) $(($3 * $5))
}

make_lmdb() {  # DB FIRST COUNT
  local log
  if [ -e "$1" ]; then
    same_images "$1"
    return
  fi
  rm -rf "$new"
  make_dir "$new"
  { cut_idx "$here/data/train-images-idx3-ubyte" 16 784 "$2" "$3" \
      >"$new/images" &&
    cut_idx "$here/data/train-labels-idx1-ubyte" 8 1 "$2" "$3" \
      >"$new/labels"; } || die "cannot write to $(rel "$new"): is the disk full?"
  log=$(GLOG_logtostderr=1 "$convert" "$new/images" "$new/labels" \
    "$new/lmdb" 2>&1) || {
    make_dir "$here"
    die "the conversion to $(rel "$1") failed: $log"
  }
  cp "$here/data/dataset.txt" "$new/lmdb" || die "cannot write to $(rel "$new")"
  mv -T -- "$new/lmdb" "$1"
  rm -rf "$new"
  say "made $(rel "$1"): $3 images"
}
make_lmdb "$fit_db" 0 "$fit"
make_lmdb "$validation_db" "$fit" $((count - fit))
