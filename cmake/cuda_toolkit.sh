#!/usr/bin/env bash
# Finds or gets a CUDA toolkit, without root and without a GPU.
#
# Usage: cmake/cuda_toolkit.sh [--compiler] [DEST]
#
# Prints the path of a CUDA toolkit, with bin/nvcc, include and lib64 in it. Uses
# $CUDA_HOME if that is set, else the nvcc in PATH or in /usr/local/cuda. Where
# there is none it unpacks NVIDIA's packages on PyPI into DEST (build/cuda of
# this project); what is there already is not got again.
#
#   --compiler  nvcc and the CUDA runtime alone (0.1 GB to download), which
#               compile kernels. Without it cuBLAS and cuRAND come too (0.6 GB),
#               which Caffe links.
# shellcheck source=SCRIPTDIR/shell.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/shell.sh"
say() { printf '%s: %s\n' "$me" "$*" >&2; }  # the path alone is printed

set=full
dest=
while (( $# )); do
  case $1 in
    --compiler) set=compiler ;;
    -*) bad_usage "unknown option $1" ;;
    *) [[ -z $dest ]] || die "one DEST, not both $dest and $1"; dest=$1 ;;
  esac
  shift
done
dest=${dest:-$project/build/cuda}

# ---- The system's ----

# The toolkit that an nvcc belongs to. Debian's stands in /usr, behind a script
# that readlink does not see through; elsewhere nvcc may be a link.
toolkit_of() {
  local nvcc=$1 resolved
  resolved=$(readlink -f -- "$nvcc")
  if [[ -e ${resolved%/bin/*}/include/cuda_runtime.h ]]; then
    echo "${resolved%/bin/*}"
  else
    echo "${nvcc%/bin/*}"
  fi
}

if [[ -n ${CUDA_HOME:-} ]]; then
  [[ -x $CUDA_HOME/bin/nvcc ]] ||
    die "CUDA_HOME=$CUDA_HOME has no bin/nvcc" \
        "Set it to a CUDA toolkit, or unset it to let this script find one."
  toolkit_of "$CUDA_HOME/bin/nvcc"
  exit
fi
if nvcc=$(PATH=$PATH:/usr/local/cuda/bin command -v nvcc); then
  toolkit_of "$nvcc"
  exit
fi

# ---- NVIDIA's packages on PyPI ----

# 13.0 and not the newest: it runs on every driver of CUDA 13.
packages=(nvidia-cuda-nvcc==13.0.\* nvidia-nvvm==13.0.\*
          nvidia-cuda-crt==13.0.\* nvidia-cuda-runtime==13.0.\*
          nvidia-cuda-cccl==13.0.\*)
if [[ $set == full ]]; then
  packages+=(nvidia-cublas==13.0.\* nvidia-curand==10.4.\*)
fi

[[ $dest == /* ]] || dest=$PWD/$dest
one_at_a_time "$dest.lock" "$dest"

# The file says which set is there, and that it is whole.
have=$(cat -- "$dest/complete" 2> /dev/null || true)
if [[ $have == full || $have == "$set" ]]; then
  echo "$dest"
  exit
fi
[[ -n $have || ! -e $dest ]] ||
  die "$dest is there, but this script did not make it; move it away"

find_pip ||
  die "there is no CUDA toolkit, and no pip to get one from PyPI" \
      "Install CUDA 11 to 13 and set CUDA_HOME to its path, or install pip:" \
      "  apt-get install python3-pip"

part=$dest.part
rm -rf -- "$part"
trap 'rm -rf -- "$part"' EXIT
say "getting CUDA 13.0 from PyPI: ${packages[*]}"
pip_unpack "$part/wheels" "${packages[@]}" ||
  die "pip could not get the CUDA toolkit (its message stands above)" \
      "Install CUDA 11 to 13 yourself and set CUDA_HOME to its path."
mv -- "$part"/wheels/nvidia/cu13/* "$part/"
rm -rf -- "$part/wheels"

# Wheels have no links, and pip sets no executable bits on data.
chmod -- a+x "$part"/bin/* "$part"/nvvm/bin/*
ln -s lib "$part/lib64"
for library in "$part"/lib/lib*.so.*; do
  ln -sf -- "$(basename -- "$library")" "${library%%.so.*}.so"
done

"$part/bin/nvcc" --version > /dev/null ||
  die "the nvcc from PyPI does not run on this machine"
echo "$set" > "$part/complete"
rm -rf -- "$dest"
mv -T -- "$part" "$dest"
say "CUDA 13.0 is in $dest"
echo "$dest"
