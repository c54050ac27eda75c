#!/usr/bin/env bash
# Puts the MNIST images into myexamples/mnist/data: the true ones where a
# mirror can be reached, else Fashion-MNIST (the same format, harder) from
# Debian's package. data/dataset.txt says which.
#
# MNIST_MIRRORS: URLs of folders with the four .gz files, to try instead of
# the usual ones.
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

here=$ROOT/myexamples/mnist
data=$here/data
parts=$here/data.download
mirrors=${MNIST_MIRRORS:-"
  https://storage.googleapis.com/cvdf-datasets/mnist
  https://ossci-datasets.s3.amazonaws.com/mnist
  http://yann.lecun.com/exdb/mnist"}

ready() {
  if [ -e "$data/dataset.txt" ]; then
    say "$(cat "$data/dataset.txt") is ready in $(rel "$data")"
    exit 0
  fi
}
ready
[ ! -e "$data" ] || die "$(rel "$data") is not this script's: move it away"
one_at_a_time "$here/.lock"
ready

read_int32() {  # FILE OFFSET
  od -An -tu1 -j"$2" -N4 "$1" |
    awk '{ print (($1 * 256 + $2) * 256 + $3) * 256 + $4 }'
}

# Caffe's converter reads past the end of a short file without a word.
check_idx() {  # FILE MAGIC HEADER_SIZE
  local size want i
  [ "$(read_int32 "$1" 0)" = "$2" ] ||
    die "${1##*/} is no MNIST file: it does not begin with $2"
  want=$(read_int32 "$1" 4)
  for ((i = 8; i < $3; i += 4)); do
    want=$((want * $(read_int32 "$1" "$i")))
  done
  size=$(stat -c %s "$1")
  [ "$size" -eq $((want + $3)) ] ||
    die "${1##*/} has $size bytes where its header says $((want + $3))"
}

from_mirrors() {
  local mirror sha file
  for mirror in $mirrors; do
    while read -r sha file; do
      fetch "$parts/$file" "$sha" "${mirror%/}/$file" || continue 2
    done <"$here/mnist.sha256"
    return
  done
  return 1
}

mkdir -p "$parts"
if from_mirrors; then
  name=MNIST
  from=$parts
else
  say "MNIST cannot be had from any mirror: taking Fashion-MNIST instead"
  [ -e "$fashion/t10k-labels-idx1-ubyte.gz" ] ||
    (need_packages "Fashion-MNIST" dataset-fashion-mnist) ||
    die "no images can be had. Run this again with a network, or put\
 $(awk '{ print $2 }' "$here/mnist.sha256" | paste -sd' ') into\
 $(rel "$parts") and run this again"
  name=Fashion-MNIST
  from=$fashion
fi

say "unpacking $name"
rm -rf "$data.new"
mkdir "$data.new"
while read -r _ file; do
  out=$data.new/${file%.gz}
  gzip -dc -- "$from/$file" >"$out" || die "cannot unpack $from/$file to\
 $(rel "$out"): the file is broken or the disk full"
  case $file in
    *images*) check_idx "$out" 2051 16 ;;
    *) check_idx "$out" 2049 8 ;;
  esac
done <"$here/mnist.sha256"
{ echo "$name" >"$data.new/dataset.txt"; } 2>/dev/null ||
  die "cannot write $(rel "$data.new/dataset.txt"): is the disk full?"
mv -T -- "$data.new" "$data"
rm -rf "$parts"
say "$name is ready in $(rel "$data")"
[ "$name" = MNIST ] ||
  say "for the true MNIST, remove that folder and run this with a network"
