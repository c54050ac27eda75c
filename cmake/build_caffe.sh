#!/usr/bin/env bash
# Builds BVLC Caffe with the LargeMarginInnerProduct and BN layers.
#
# Usage: cmake/build_caffe.sh [--cpu|--cuda [--nccl]] [--tests] [--jobs N]
#        cmake/build_caffe.sh [OPTION...] --install PREFIX
#        cmake/build_caffe.sh [OPTION...] --deb
#        cmake/build_caffe.sh --source
#        cmake/build_caffe.sh --packages
#
# Gets Caffe and what it needs, patches it and builds it with pycaffe. What is
# done already is not done again.
#
# The Caffe tree is $CAFFE_ROOT if that is set, and is patched and built in
# place; one that Make has built is used as it is, and nothing is written to it.
# Otherwise the tree is build/caffe of this project, which comes from a git
# clone of BVLC/caffe or, without network to it, from Debian's source package.
#
#   --cpu     build without CUDA
#   --cuda    build with CUDA
#             Without either: as it was built before; the first time with CUDA
#             if nvcc and an NVIDIA GPU are found.
#   --nccl    with NCCL, for training on several GPUs: the system's or what
#             cmake/nvidia_library.sh finds or gets. Later builds keep it.
#   --tests   also build the layers' tests, build/test/test.testbin
#   --jobs N  compile N files at once (all cores)
#   --install PREFIX
#             install it, too: PREFIX/bin/caffe, PREFIX/python for PYTHONPATH,
#             the library and its headers. Run again, it renews what is there;
#             PREFIX/share/caffe-lsoftmax/files lists it. A file that is not of
#             such an installation is never overwritten.
#   --deb     make a Debian package of the CPU build, too: caffe-lsoftmax, with
#             pycaffe for the system's python3, in place of caffe-cpu. Its
#             maintainer is $DEBFULLNAME <$DEBEMAIL>.
#   --source  stop after patching, for a build of your own with CMake or Make
#   --packages
#             list the Debian packages that are missing, one a line, and stop
#
# With CUDA, the environment variable CUDA_ARCHS names the GPUs to build for
# ("75 80 90"); by default they are this machine's or, where there is none, the
# common ones. Later builds keep them.
# shellcheck source=SCRIPTDIR/shell.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/shell.sh"
# shellcheck source=SCRIPTDIR/packages.sh
. "$project/cmake/packages.sh"
# shellcheck source=SCRIPTDIR/caffe_source.sh
. "$project/cmake/caffe_source.sh"
# shellcheck source=SCRIPTDIR/install.sh
. "$project/cmake/install.sh"
export LC_ALL=C  # the messages of the programs are read

device=
nccl=
tests=
source_only=
packages_only=
prefix=
deb=
jobs=$(nproc)
while (( $# )); do
  case $1 in
    --cpu|--cuda)
      [[ -z $device || $device == "${1#--}" ]] ||
        die "--cpu and --cuda exclude each other"
      device=${1#--} ;;
    --nccl) nccl=1 ;;
    --tests) tests=1 ;;
    --source) source_only=1 ;;
    --packages) packages_only=1 ;;
    --deb) deb=1 ;;
    --install)
      [[ ${2:-} && $2 != -* ]] || die "--install needs a PREFIX"
      prefix=$(readlink -m -- "$2")
      shift ;;
    --jobs)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "--jobs needs a number of jobs"
      jobs=$2
      shift ;;
    *) bad_usage "unknown argument $1" ;;
  esac
  shift
done
[[ ! $deb || ! $prefix ]] || die "--deb and --install exclude each other"
[[ ! $deb || $device != cuda ]] || die "--deb is made of a build with --cpu"
[[ ! $deb ]] || is_debian || die "--deb is for Debian and Ubuntu"
[[ ! $prefix ]] || check_prefix "$prefix"

root=${CAFFE_ROOT:-$project/build/caffe}
if [[ $root != "$project/build/caffe" ]]; then
  [[ -e $root/src/caffe/proto/caffe.proto ]] ||
    die "CAFFE_ROOT=$root is not a Caffe source tree" \
        "Unset CAFFE_ROOT to let this script get Caffe."
  root=$(cd -- "$root" && pwd -P)
fi
build=$root/build
# In a folder that it came to by a link, CMake takes the link's path for its
# own, and refuses the build of another path.
cd -P -- "$project"

# Whether pycaffe is there, works and has the layers.
pycaffe_works() {  # FOLDER
  PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$1 GLOG_minloglevel=2 \
    "$python" -c '
import caffe
missing = {"LargeMarginInnerProduct", "BN"} - set(caffe.layer_type_list())
if missing:
    raise SystemExit("pycaffe does not have the layers: " + ", ".join(sorted(missing)))
'
}

# ---- A tree that Make has built ----

# Make's build is a link to the folder that it builds in, which says so.
if [[ -e $build/.linked && ! $source_only ]]; then
  [[ ! $packages_only ]] || exit 0
  [[ ! $deb$prefix ]] ||
    die "Make has built $root: --install and --deb need a build by CMake" \
        "Unset CAFFE_ROOT, or take \`make distribute\` there."
  for needed in build/tools/caffe=all python/caffe/_caffe.so=pycaffe \
      ${tests:+build/test/test_all.testbin=test}; do
    [[ -e $root/${needed%=*} ]] ||
      die "Make has built $root, but not ${needed%=*}: run" \
          "make -C $(printf %q "$root") ${needed#*=}"
  done
  words=$(pycaffe_works "$root/python" 2>&1) ||
    die "the Caffe that Make has built in $root cannot be used:" \
        "${words##*$'\n'}" "Run caffe_patch/apply.sh $(printf %q "$root") and" \
        "make -C $(printf %q "$root") all pycaffe"
  say "done: Make has built $root, which is used as it is"
  exit
fi

# ---- One run at a time in a tree ----

locks=${XDG_RUNTIME_DIR:-}
# A user that su made may have root's in its environment.
[[ -d $locks && -w $locks ]] || locks=/tmp
[[ $packages_only ]] || one_at_a_time \
  "$locks/lsoftmax-$(id -u)-$(cksum <<< "$root" | cut -d ' ' -f 1).lock" "$root"

# ---- Get what is missing ----

[[ $packages_only ]] || make_dir "$project/build"
if is_debian; then
  # For dpkg-shlibdeps.
  packages=(${deb:+dpkg-dev file})
  if [[ $packages_only ]]; then
    missing_packages "$root" "${packages[@]}"
    exit
  fi
  mapfile -t missing < <(missing_packages "$root" "${packages[@]}")
  if (( ${#missing[@]} )); then
    need_packages "the build" "${missing[@]}"
    hash -r
  fi
elif [[ $packages_only ]]; then
  exit
else
  mapfile -t missing < <(missing_elsewhere)
  (( ! ${#missing[@]} )) ||
    die "Caffe needs these; install them and run this again:" "${missing[@]}"
fi
cmake/find_cargo.sh > /dev/null
[[ -e $root/src/caffe/proto/caffe.proto ]] || get_caffe "$root"
caffe_patch/apply.sh "$root"
if [[ $source_only ]]; then
  say "done: Caffe's source with the layers in it is $root"
  exit
fi

# ---- Configure ----

log=$build/build_caffe.log
make_dir "$build"
: > "$log"

cached() { sed -n "s/^$1:[A-Z]*=//p" "$build/CMakeCache.txt" 2> /dev/null; }

# The architectures that $CUDA_ARCHS names, else those of this machine's GPUs;
# without one, those that the CUDA compiler knows and that are common.
cuda_archs() {
  local known wanted archs
  known=$("$1" --list-gpu-arch | sed -n 's/^compute_\([0-9]*\)$/\1/p')
  wanted=$(tr -s ' ' '\n' <<< "${CUDA_ARCHS:-}" | sed '/^$/d')
  if [[ $wanted ]]; then
    archs=$wanted
    wanted=$(grep -Fxv "$known" <<< "$wanted") || wanted=
    [[ -z $wanted ]] ||
      die "CUDA_ARCHS: $1 does not know" "${wanted//$'\n'/ }" \
          "It knows ${known//$'\n'/ }"
  else
    archs=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader \
              2> /dev/null | tr -d . | grep '^[0-9][0-9]*$') ||
      archs=$(printf '%s\n' 60 70 75 80 86 89 90 100 120)
  fi
  archs=$(grep -Fx "$known" <<< "$archs" | sort -nu | tr '\n' ' ')
  [[ -n $archs ]] ||
    die "$1 knows none of this machine's GPUs; it knows" "${known//$'\n'/ }" \
        "Set CUDA_HOME to another CUDA toolkit."
  echo "${archs% }"
}

# Whether the nvcc $1 takes $2 as its host compiler.
nvcc_takes() { "$1" -x cu -E -ccbin "$2" -o /dev/null /dev/null; }

# The host compiler for the nvcc $1, where the one that CMake would take or has
# taken is too new for it: the newest that it takes.
other_host_compiler() {
  local usual version compiler
  usual=$(cached CUDA_HOST_COMPILER)
  usual=${usual:-${CC:-cc}}
  if nvcc_takes "$1" "$usual" > /dev/null 2>&1; then return; fi
  for version in {20..5}; do
    if compiler=$(command -v "g++-$version") &&
        nvcc_takes "$1" "$compiler" > /dev/null 2>&1; then
      echo "$compiler"
      return
    fi
  done
  nvcc_takes "$1" "$usual" 2>&1 > /dev/null | head -n 5 >&2 || true
  die "$1 does not take $usual as its host compiler (its words are above)" \
      "Install an older one beside it (apt-get install g++-11, say), or set" \
      "CUDA_HOME to a newer CUDA toolkit."
}

if [[ -z $device ]]; then
  case $(cached CPU_ONLY) in
    ON) device=cpu ;;
    OFF) device=cuda ;;
    *)
      device=cpu
      if [[ ! $deb ]] && PATH=$PATH:/usr/local/cuda/bin command -v nvcc > /dev/null &&
          nvidia-smi -L > /dev/null 2>&1; then
        device=cuda
      fi ;;
  esac
fi
[[ ! $deb || $device == cpu ]] ||
  die "--deb is made of a build without CUDA, and $root is built with it" \
      "Add --cpu to build it anew without, or set CAFFE_ROOT to another tree."

options=(-DCMAKE_BUILD_TYPE=Release -DBLAS=Open -DBUILD_docs=OFF
         -Dpython_version=3 "-DPYTHON_EXECUTABLE=$python")
if [[ $device == cpu ]]; then
  [[ ! $nccl ]] || die "--nccl is for a build with CUDA: add --cuda"
  options+=(-DCPU_ONLY=ON)
else
  cuda=$("$project/cmake/cuda_toolkit.sh")
  options+=(-DCPU_ONLY=OFF "-DCUDA_TOOLKIT_ROOT_DIR=$cuda"
            -DCUDA_ARCH_NAME=Manual)
  # Kept once it is set, by this script or by hand.
  if [[ -n ${CUDA_ARCHS:-} || -z $(cached CUDA_ARCH_BIN) ]]; then
    archs=$(cuda_archs "$cuda/bin/nvcc")
    options+=("-DCUDA_ARCH_BIN=$archs" "-DCUDA_ARCH_PTX=${archs##* }")
  fi
  compiler=$(other_host_compiler "$cuda/bin/nvcc")
  if [[ $compiler ]]; then
    say "the CUDA compiler takes $compiler as its host compiler"
    options+=("-DCUDA_HOST_COMPILER=$compiler")
  fi
  if [[ $nccl ]]; then
    grep -q USE_NCCL "$root/CMakeLists.txt" ||
      die "the Caffe in $root knows no NCCL: BVLC Caffe has it from rc4 on"
    options+=(-DUSE_NCCL=ON)
    # Caffe finds the system's by itself.
    if [[ ${NCCL_DIR:-} || ! -e /usr/include/nccl.h &&
          ! -e /usr/local/include/nccl.h ]]; then
      library=$("$project/cmake/nvidia_library.sh" nccl)
      options+=("-DNCCL_INCLUDE_DIR=${library%/*/*}/include"
                "-DNCCL_LIBRARIES=$library")
    fi
  fi
fi
if [[ $tests ]]; then
  only=
  for file in tests/caffe/test_*.cpp; do
    file=${file##*/}
    [[ ! -e $root/src/caffe/test/$file ]] || only+=,${file:5:-4}
  done
  options+=("-DBUILD_only_tests=${only#,}")
fi
if [[ $deb ]]; then
  options+=(-DCMAKE_INSTALL_PREFIX=/usr -DCMAKE_SKIP_INSTALL_RPATH=ON
            "-DCMAKE_INSTALL_LIBDIR=lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH)")
elif [[ $prefix ]]; then
  options+=("-DCMAKE_INSTALL_PREFIX=$prefix" -DCMAKE_SKIP_INSTALL_RPATH=OFF
            -DCMAKE_INSTALL_LIBDIR=lib)
fi
# Caffe asks for a CMake that CMake 4 no longer can be.
if at_least "$(cmake --version | sed -n 's/^cmake version //p')" 4; then
  options+=(-DCMAKE_POLICY_VERSION_MINIMUM=3.5)
fi

failed() {  # WORDS
  local found
  mapfile -t found < <("$python" cmake/first_error.py "$log")
  (( ${#found[@]} )) || tail -n 30 -- "$log" >&2
  make_dir "$build"
  if grep -E "$disk_full" "$log" >&2; then die_of_full_disk "$build"; fi
  die "$1${found[0]:+; its first error:}" ${found[0]:+"${found[0]}"} \
      ${found[1]:+"On Debian and Ubuntu: apt-get install ${found[1]}"} \
      "The whole log: $log"
}

# What is killed while it writes a file, by kill -9 or a crash, leaves it cut
# short but new: Make takes it for done. So a build that does not come to its
# end leaves $unfinished, and the next one looks at what is newer.
unfinished=$build/build_caffe.unfinished

discard_half_written() {
  local file
  # What the first configuration found out, up to where it was killed.
  [[ -e $build/CMakeCache.txt ]] || rm -rf -- "$build/CMakeFiles"
  # The assembler writes an object's last bytes last, and binutils miss them.
  while IFS= read -r -d '' file; do
    size -- "$file" > /dev/null 2>&1 || rm -f -- "$file"
  done < <(find "$build" -path '*/CMakeFiles/*' -name '*.o' \
             -newer "$unfinished" -print0)
  # The compiler writes an object's dependencies before the object.
  while IFS= read -r -d '' file; do
    [[ ${file%.d} -nt $unfinished ]] || rm -f -- "$file" "${file%.d}"
  done < <(find "$build" -path '*/CMakeFiles/*' -name '*.o.d' \
             -newer "$unfinished" -print0)
  # protoc's files are whole if they were compiled.
  for file in "$build"/include/caffe/proto/*.pb.cc; do
    [[ ! -e $file ||
       -n $(find "$build" -name "${file##*/}.o" -newer "$file") ]] ||
      rm -f -- "$file" "${file%.cc}.h" "${file%.pb.cc}_pb2.py"
  done
  # Links are quick: CMake writes these files anew, and Make links again.
  find "$build" -name link.txt -delete
}

if [[ -e $unfinished ]]; then
  say "the last build here did not come to its end; going on with it"
  discard_half_written
fi
: > "$unfinished"

cmake -S "$root" -B "$build" -Wno-dev "${options[@]}" >> "$log" 2>&1 ||
  failed "CMake could not configure Caffe in $build"

# ---- Build ----

# CMake's percentages.
build_progress() {
  local line compiling=
  local step='^\[ *([0-9]+)%\] (Building CXX|Building NVCC|Linking)'
  while IFS= read -r line; do
    if [[ ! $compiling && $line =~ ^\ *Compiling\  ]]; then
      compiling=1
      say "building the Rust library"
    elif [[ $line =~ $step ]]; then
      progress "building Caffe ($device) ${BASH_REMATCH[1]}%"
    fi
  done
  progress_end
}

make_target() {
  cmake --build "$build" --parallel "$jobs" --target "$@" 2>&1 |
    tee -a "$log" | build_progress ||
    failed "Caffe did not build in $build"
}

targets=(all)
made="$build/tools/caffe and pycaffe in $root/python"
if [[ $tests ]]; then
  targets+=(test.testbin)
  made+=", the tests $build/test/test.testbin"
fi
make_target "${targets[@]}"

pycaffe_works "$root/python" >> "$log" 2>&1 ||
  failed "pycaffe in $root/python does not work with $python"
rm -f -- "$unfinished"

say "done ($device): $made"
if [[ $deb ]]; then
  make_deb
elif [[ $prefix ]]; then
  install_caffe "$prefix"
fi
