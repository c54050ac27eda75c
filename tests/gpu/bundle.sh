#!/usr/bin/env bash
# Packs Caffe with CUDA and the tests of its GPU layers into a folder.
#
# Usage: tests/gpu/bundle.sh [--jobs N] [DEST]
#
# Makes DEST (build/gpu/bundle), a folder that runs wherever it is copied: Caffe
# built with CUDA, its tests, and the libraries that a bare host lacks, but
# cuBLAS and cuRAND, which are too large; the folder's run.sh finds the host's.
# Needs no GPU. On a host with one, then:
#
#   DEST/run.sh
#
# Caffe's source comes from cmake/build_caffe.sh --source, the CUDA toolkit from
# cmake/cuda_toolkit.sh. Environment variables:
#
#   CUDA_ARCHS  the GPUs to build for ("75 80 90"; later ones compile the last
#               one's code at their start)
#   CUDNN_ROOT  a folder with cuDNN's include and lib: Caffe is built with it,
#               and the benchmark compares with it; its library, too large as
#               well, is the host's
# shellcheck source=SCRIPTDIR/../../cmake/shell.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../../cmake/shell.sh"

here=$project/tests/gpu
out=$project/build/gpu
most_mib=60

jobs=$(nproc)
dest=
while (( $# )); do
  case $1 in
    --jobs)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "--jobs needs a number of jobs"
      jobs=$2
      shift ;;
    -*) bad_usage "unknown option $1" ;;
    *) [[ -z $dest ]] || die "one DEST, not both $dest and $1"; dest=$1 ;;
  esac
  shift
done
dest=${dest:-$out/bundle}
[[ ! -e $dest || -e $dest/gpu_bundle ]] ||
  die "$dest is there, and is no bundle; name a folder that is not there"

one_at_a_time "$out/lock"

# ---- Build ----

"$project/cmake/build_caffe.sh" --source
root=${CAFFE_ROOT:-$project/build/caffe}
toolkit=$("$project/cmake/cuda_toolkit.sh")
archs=${CUDA_ARCHS:-75 80 90}

# OpenBLAS alone is most of the folder. The CPU only gives the values to
# compare with here, so the reference BLAS does; where it cannot be had,
# OpenBLAS it is.
blas=()
if command -v apt-get > /dev/null && command -v dpkg > /dev/null; then
  if [[ ! -e $out/blas/libblas.so.3 ]]; then
    rm -rf -- "$out/blas"
    mkdir -- "$out/blas"
    (cd -- "$out/blas" && apt-get -qq download libblas3 2> /dev/null &&
       dpkg -x libblas3*.deb . && cp -L usr/lib/*/blas/libblas.so.3 .) || true
  fi
  if [[ -e $out/blas/libblas.so.3 ]]; then
    blas=("-DOpenBLAS_LIB=$out/blas/libblas.so.3")
  fi
fi

cudnn=(-DUSE_CUDNN=OFF)
cudnn_library=
cudnn_check=()
if [[ -n ${CUDNN_ROOT:-} ]]; then
  for candidate in "$CUDNN_ROOT"/lib{64,}/libcudnn.so{,.9,.8}; do
    if [[ -e $candidate ]]; then cudnn_library=$candidate; break; fi
  done
  [[ $cudnn_library && -e $CUDNN_ROOT/include/cudnn.h ]] ||
    die "CUDNN_ROOT=$CUDNN_ROOT has no include/cudnn.h or no lib/libcudnn.so"
  cudnn=(-DUSE_CUDNN=ON "-DCUDNN_INCLUDE=$CUDNN_ROOT/include"
         "-DCUDNN_LIBRARY=$cudnn_library")
  cudnn_check=(-DUSE_CUDNN "-I$CUDNN_ROOT/include" "$cudnn_library")
fi

log=$out/bundle.log
failed() {
  tail -n 30 "$log" >&2
  die "$1" "The whole log: $log"
}

# RPATH and not RUNPATH: it counts for the libraries' libraries as well.
link=("-Wl,--disable-new-dtags,-rpath,\$ORIGIN/../lib"
      "\"-Wl,-rpath-link,$toolkit/lib64\"")

# Nothing that drags in many libraries. LMDB does not, and one of the optional
# parts must stay, or Caffe's CMake files fail on an empty list.
say "configuring Caffe with CUDA for sm_${archs// / sm_}"
cmake -S "$root" -B "$out/caffe" -Wno-dev -DCMAKE_BUILD_TYPE=Release \
    -DCPU_ONLY=OFF "${cudnn[@]}" -DUSE_OPENCV=OFF -DUSE_LEVELDB=OFF \
    -DUSE_LMDB=ON -DBUILD_python=OFF -DBUILD_python_layer=OFF \
    -DBUILD_docs=OFF -DBLAS=Open "${blas[@]}" \
    -DBUILD_only_tests=large_margin_inner_product_layer,bn_layer \
    "-DCUDA_TOOLKIT_ROOT_DIR=$toolkit" -DCUDA_ARCH_NAME=Manual \
    "-DCUDA_ARCH_BIN=$archs" "-DCUDA_ARCH_PTX=${archs##* }" \
    -DCMAKE_SKIP_RPATH=ON "-DCMAKE_EXE_LINKER_FLAGS=${link[*]}" \
    > "$log" 2>&1 ||
  failed "CMake could not configure Caffe in $out/caffe"

say "building Caffe with CUDA; the log is $log"
cmake --build "$out/caffe" --parallel "$jobs" --target caffe.bin test.testbin \
    2>&1 | tee -a "$log" | awk '
      match($0, /^\[ *[0-9]+%\]/) {
        percent = substr($0, 2, 3) + 0
        if (!seen || percent >= last + 10) {
          printf "bundle: building Caffe %3d%%\n", percent
          fflush()
          seen = 1
          last = percent
        }
      }' || failed "Caffe did not build in $out/caffe"

"${CXX:-g++}" -O2 -std=gnu++17 -Wno-deprecated-declarations \
    "-I$root/include" "-I$out/caffe/include" "-I$toolkit/include" \
    -o "$out/caffe/gpu_check" "$here/gpu_check.cpp" "-L$out/caffe/lib" \
    -lcaffe "${cudnn_check[@]}" \
    -lprotobuf -lglog -lgflags -lboost_system -lboost_thread \
    "-L$toolkit/lib64" -lcudart -lpthread "${link[0]}" \
    "-Wl,-rpath-link,$toolkit/lib64" >> "$log" 2>&1 ||
  failed "tests/gpu/gpu_check.cpp did not build"

# ---- Pack ----

part=$dest.part
rm -rf -- "$part"
mkdir -p -- "$part/bin" "$part/lib/c"
trap 'rm -rf -- "$part"' EXIT

cp -- "$out/caffe/tools/caffe" "$out/caffe/test/test.testbin" \
    "$out/caffe/gpu_check" "$part/bin/"
cp -L -- "$out"/caffe/lib/libcaffe.so.* "$part/lib/"

# What the loader finds for the programs: CUDA's large libraries are the host's
# business; those of the C library are for hosts with an older one.
search=$part/lib:$toolkit/lib64:$out/blas
if [[ $cudnn_library ]]; then search+=:${cudnn_library%/*}; fi
libraries=$(LD_LIBRARY_PATH=$search ldd "$part"/bin/*)
! grep 'not found' <<< "$libraries" >&2 ||
  die "these libraries of Caffe's are not found"
: > "$part/cuda_libraries"
while read -r name path; do
  case $name in
    libcaffe.so*) ;;
    libcublas*|libcurand*|libcudnn*) echo "$name" >> "$part/cuda_libraries" ;;
    ld-linux*|libc.so*|libm.so*|libdl.so*|libpthread.so*|librt.so*|\
    libresolv.so*)
      cp -L -- "$path" "$part/lib/c/" ;;
    *) cp -L -- "$path" "$part/lib/" ;;
  esac
done < <(awk '$2 == "=>" { print $1, $3 }
              $1 ~ /ld-linux/ { n = split($1, p, "/"); print p[n], $1 }' \
           <<< "$libraries" | sort -u)
strip --strip-unneeded "$part"/bin/* "$part"/lib/*.so*

cp -r -- "$here/nets" "$here/run.sh" "$project/cmake/shell.sh" "$part/"
git -C "$project" rev-parse HEAD > "$part/gpu_bundle" 2> /dev/null ||
  echo "unknown revision" > "$part/gpu_bundle"

size=$(du -sm --apparent-size -- "$part" | cut -f 1)
(( size <= most_mib )) ||
  die "the folder has $size MiB, more than $most_mib" \
      "Name fewer GPUs in CUDA_ARCHS ($archs)."
rm -rf -- "$dest"
mv -T -- "$part" "$dest"
trap - EXIT
say "done: $dest ($size MiB, for sm_${archs// / sm_} and later)"
say "on a host with a GPU: run.sh in it"
