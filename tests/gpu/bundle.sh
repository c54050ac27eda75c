#!/usr/bin/env bash
# Packs Caffe with CUDA, the tests of its GPU layers and MNIST into a folder.
#
# Usage: tests/gpu/bundle.sh [--cpu] [--no-cudnn] [--jobs N] [DEST]
#
# Makes DEST (build/gpu/bundle), a folder of at most 60 MiB that runs wherever
# it is copied: Caffe built with CUDA, its tests, the nets of the paper with the
# images of MNIST, and the libraries that a bare host lacks. cuBLAS, cuRAND and
# cuDNN are too large; the folder's run.sh finds the host's, a PyTorch's for
# example. Needs no GPU. On a host with one, and with Python 3:
#
#   DEST/run.sh             all of it, in calls of less than ten minutes
#   DEST/run.sh --help      its parts
#
#   --cpu       pack the Caffe without CUDA that cmake/build_caffe.sh --tests
#               has built, to rehearse on this machine (build/gpu/bundle-cpu)
#   --no-cudnn  build without cuDNN: the nets train some times slower
#   --jobs N    compile N files at once (all cores)
#
# Caffe's source comes from cmake/build_caffe.sh --source, the CUDA toolkit from
# cmake/cuda_toolkit.sh, cuDNN from cmake/nvidia_library.sh, the images from
# myexamples/mnist/get_mnist.sh. The environment variable CUDA_ARCHS names the
# GPUs to build for ("75 80 90"; later ones compile the last one's code at their
# start).
# shellcheck source=SCRIPTDIR/../../cmake/shell.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../../cmake/shell.sh"

out=$project/build/gpu
device=cuda
with_cudnn=1
jobs=$(nproc)
dest=
while (( $# )); do
  case $1 in
    --cpu) device=cpu ;;
    --no-cudnn) with_cudnn= ;;
    --jobs)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "--jobs needs a number of jobs"
      jobs=$2
      shift ;;
    -*) bad_usage "unknown option $1" ;;
    *) [[ -z $dest ]] || die "one DEST, not both $dest and $1"; dest=$1 ;;
  esac
  shift
done
if [[ -z $dest ]]; then
  dest=$out/bundle
  [[ $device == cuda ]] || dest+=-cpu
fi
[[ ! -e $dest || -e $dest/bundle.json ]] ||
  die "$dest is there, and is no bundle; name a folder that is not there"

one_at_a_time "$out/$device.lock"
root=${CAFFE_ROOT:-$project/build/caffe}
root=$(realpath -m -- "$root")
log=$out/bundle-$device.log
: > "$log"
failed() {
  tail -n 30 "$log" >&2
  die "$1" "The whole log: $log"
}

# ---- Build ----

cudnn=(-DUSE_CUDNN=OFF)
check_flags=()
link=()
pack=()
if [[ $device == cpu ]]; then
  build=$root/build
  cpu_only=$(grep -s '^CPU_ONLY:[A-Z]*=ON$' "$build/CMakeCache.txt") || true
  [[ $cpu_only && -x $build/tools/caffe && -x $build/test/test.testbin ]] ||
    die "there is no Caffe without CUDA and with its tests in $build" \
        "Run cmake/build_caffe.sh --cpu --tests first."
  check_flags=(-DCPU_ONLY "-Wl,-rpath,$build/lib")
else
  build=$out/caffe
  "$project/cmake/build_caffe.sh" --source
  toolkit=$("$project/cmake/cuda_toolkit.sh")
  archs=${CUDA_ARCHS:-75 80 90}
  pack=(--archs "$archs" --search "$toolkit/lib64" --search "$out/blas")

  # OpenBLAS alone is most of the folder. The CPU only gives the values to
  # compare with here, so the reference BLAS does; where it cannot be had,
  # OpenBLAS it is.
  blas=()
  if is_debian; then
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

  if [[ $with_cudnn ]]; then
    library=$("$project/cmake/nvidia_library.sh" cudnn)
    include=${library%/*/*}/include
    cudnn=(-DUSE_CUDNN=ON "-DCUDNN_INCLUDE=$include" "-DCUDNN_LIBRARY=$library")
    check_flags=(-DUSE_CUDNN "-I$include" "$library")
    pack+=(--search "${library%/*}")
  fi

  # RPATH and not RUNPATH: it counts for the libraries' libraries as well.
  link=("-Wl,--disable-new-dtags,-rpath,\$ORIGIN/../lib"
        "\"-Wl,-rpath-link,$toolkit/lib64\"")

  # Nothing that drags in many libraries: the lists of the nets without OpenCV.
  # LMDB alone would do, but the converter of MNIST asks for LevelDB, too.
  say "configuring Caffe with CUDA for sm_${archs// / sm_}"
  cmake -S "$root" -B "$build" -Wno-dev -DCMAKE_BUILD_TYPE=Release \
      -DCPU_ONLY=OFF "${cudnn[@]}" -DUSE_OPENCV=OFF -DUSE_LEVELDB=ON \
      -DUSE_LMDB=ON -DBUILD_python=OFF -DBUILD_python_layer=OFF \
      -DBUILD_docs=OFF -DBLAS=Open "${blas[@]}" \
      "-DBUILD_only_tests=large_margin_inner_product_layer,large_margin_data_parallel,bn_layer" \
      "-DCUDA_TOOLKIT_ROOT_DIR=$toolkit" -DCUDA_ARCH_NAME=Manual \
      "-DCUDA_ARCH_BIN=$archs" "-DCUDA_ARCH_PTX=${archs##* }" \
      -DCMAKE_SKIP_RPATH=ON "-DCMAKE_EXE_LINKER_FLAGS=${link[*]}" \
      >> "$log" 2>&1 ||
    failed "CMake could not configure Caffe in $build"

  say "building Caffe with CUDA; the log is $log"
  cmake --build "$build" --parallel "$jobs" --target caffe.bin test.testbin \
      convert_mnist_data convert_cifar_data 2>&1 | tee -a "$log" | awk '
        match($0, /^\[ *[0-9]+%\]/) {
          percent = substr($0, 2, 3) + 0
          if (!seen || percent >= last + 10) {
            printf "bundle.sh: building Caffe %3d%%\n", percent
            fflush()
            seen = 1
            last = percent
          }
        }' || failed "Caffe did not build in $build"
  check_flags+=("-I$toolkit/include" "-L$toolkit/lib64" -lcudart "${link[0]}"
                "-Wl,-rpath-link,$toolkit/lib64")
fi

"${CXX:-g++}" -O2 -std=gnu++17 -Wno-deprecated-declarations \
    "-I$root/include" "-I$build/include" -o "$out/check-$device" \
    "$project/tests/gpu/gpu_check.cpp" "-L$build/lib" -lcaffe \
    "${check_flags[@]}" -lprotobuf -lglog -lgflags -lboost_system \
    -lboost_thread -lpthread >> "$log" 2>&1 ||
  failed "tests/gpu/gpu_check.cpp did not build"

# ---- Pack ----

"$project/myexamples/mnist/get_mnist.sh"
"$python" "$project/tests/gpu/pack.py" --device "$device" --build "$build" \
    --check "$out/check-$device" "${pack[@]}" "$dest"
