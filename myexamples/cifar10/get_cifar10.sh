#!/usr/bin/env bash
# Downloads CIFAR-10 (its binary version) and makes what the nets read:
#   myexamples/cifar10/data    32x32 PNGs, train.txt, val.txt and the mean
#   myexamples/cifar10+/data   the same, padded to 40x40 with zeros
#
# CIFAR10_MIRRORS: URLs of folders with cifar-10-binary.tar.gz, to try instead
# of the usual one.
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

here=$ROOT/myexamples/cifar10
parts=$here/data.download
plain=$here/data
padded=$ROOT/myexamples/cifar10+/data
mirrors=${CIFAR10_MIRRORS:-https://www.cs.toronto.edu/~kriz}

ready() {
  if [ -e "$plain" ] && [ -e "$padded" ]; then
    say "CIFAR-10 is ready in $(rel "$plain") and $(rel "$padded")"
    exit 0
  fi
}
ready
one_at_a_time "$here/.lock"
ready
[ -e "$CAFFE_ROOT/python/caffe/proto/caffe_pb2.py" ] ||
  die "no built pycaffe in $CAFFE_ROOT: run cmake/build_caffe.sh first"
"$PYTHON" -c 'import numpy, PIL, google.protobuf' 2>/dev/null ||
  need_packages "CIFAR-10" python3-numpy python3-pil python3-protobuf

mkdir -p "$parts"
read -r sha file <"$here/cifar10.sha256"
urls=()
for mirror in $mirrors; do
  urls+=("${mirror%/}/$file")
done
fetch "$parts/$file" "$sha" "${urls[@]}" ||
  die "CIFAR-10 could not be downloaded. Run this again to go on where it\
 stopped, or put $file into $(rel "$parts") yourself and run this again"

make_data() {  # DATA OPTION...
  [ ! -e "$1" ] || return 0
  local data=$1
  shift
  say "making $(rel "$data")"
  rm -rf "$data.new"
  "$PYTHON" "$here/make_images.py" "$parts/$file" "$data.new" \
    --listed-as "$(rel "$data")" "$@" || { rm -rf "$data.new"; exit 1; }
  mv -T -- "$data.new" "$data"
}
make_data "$plain" --mean cifarmean.binaryproto
make_data "$padded" --mean meancifar.binaryproto --pad 4
rm -rf "$parts"
say "CIFAR-10 is ready in $(rel "$plain") and $(rel "$padded")"
