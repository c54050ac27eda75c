#!/usr/bin/env bash
# Builds BVLC Caffe with the LargeMarginInnerProduct and BN layers.
set -euo pipefail
unset CDPATH
export LC_ALL=C  # the messages of the programs are read

usage() {
  cat <<'END'
Usage: cmake/build_caffe.sh [--cpu|--cuda] [--tests] [--jobs N]
       cmake/build_caffe.sh --source
       cmake/build_caffe.sh --packages

Gets Caffe and what it needs, patches it and builds it with pycaffe. What is
done already is not done again.

The Caffe tree is $CAFFE_ROOT if that is set, and is patched and built in
place. Otherwise it is build/caffe of this project, which comes from a git
clone of BVLC/caffe or, without network to it, from Debian's source package.

  --cpu     build without CUDA
  --cuda    build with CUDA
            Without either: as it was built before; the first time with CUDA
            if nvcc and an NVIDIA GPU are found.
  --tests   also build the layers' tests, build/test/test.testbin
  --jobs N  compile N files at once (all cores)
  --source  stop after patching, for a build of your own with CMake or Make
  --packages
            list the Debian packages that are missing, one a line, and stop

With CUDA, the environment variable CUDA_ARCHS names the GPUs to build for
("75 80 90"); by default they are this machine's or, where there is none, the
common ones. Later builds keep them.
END
}

project=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# pycaffe is for the system's Python; another one may come first on the PATH.
python=/usr/bin/python3

say() { printf 'build_caffe: %s\n' "$*"; }
die() {
  printf 'build_caffe: error: %s\n' "$1" >&2
  shift
  if (( $# )); then printf '  %s\n' "$@" >&2; fi
  exit 1
}

# A full disk is behind errors that look like others.
disk_full='No space left on device|Disk quota exceeded'
die_of_full_disk() {  # WHERE
  die "the disk of $1 is full, or the one for temporary files, ${TMPDIR:-/tmp}" \
      "Make room and run this again; it goes on where it stopped."
}

# Makes a folder if it is not there, and says why it takes no file.
must_be_writable() {
  local said
  said=$({ mkdir -p -- "$1" &&
           printf '%4096s' '' > "$1/.probe"; } 2>&1) || {
    rm -f -- "$1/.probe" 2> /dev/null || true
    [[ ! $said =~ $disk_full ]] || die_of_full_disk "$1"
    die "cannot write to $1: ${said##*: }"
  }
  rm -f -- "$1/.probe"
}

device=
tests=
source_only=
packages_only=
jobs=$(nproc)
while (( $# )); do
  case $1 in
    --cpu|--cuda)
      [[ -z $device || $device == "${1#--}" ]] ||
        die "--cpu and --cuda exclude each other"
      device=${1#--} ;;
    --tests) tests=1 ;;
    --source) source_only=1 ;;
    --packages) packages_only=1 ;;
    --jobs)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "--jobs needs a number of jobs"
      jobs=$2
      shift ;;
    -h|--help) usage; exit 0 ;;
    *) usage >&2; die "unknown argument $1" ;;
  esac
  shift
done

root=${CAFFE_ROOT:-$project/build/caffe}
if [[ $root != "$project/build/caffe" ]]; then
  [[ -e $root/src/caffe/proto/caffe.proto ]] ||
    die "CAFFE_ROOT=$root is not a Caffe source tree" \
        "Unset CAFFE_ROOT to let this script get Caffe."
  root=$(cd -- "$root" && pwd -P)
fi
# In a folder that it came to by a link, CMake takes the link's path for its
# own, and refuses the build of another path.
cd -P -- "$project"

# ---- One run at a time in a tree ----

locks=${XDG_RUNTIME_DIR:-}
# A user that su made may have root's in its environment.
[[ -d $locks && -w $locks ]] || locks=/tmp
lock=$locks/lsoftmax-$(id -u)-$(cksum <<< "$root" | cut -d ' ' -f 1).lock
{ exec 9>> "$lock"; } 2> /dev/null || die "cannot write $lock"
if [[ ! $packages_only ]] && ! flock -n 9; then
  say "another build is at work in $root; waiting for it to end"
  flock 9
fi

# ---- Packages ----

is_debian() {
  command -v dpkg-query > /dev/null && command -v apt-get > /dev/null
}

packages=(
  cmake make g++ patch libboost-dev libboost-system-dev libboost-thread-dev
  libboost-filesystem-dev libboost-python-dev libprotobuf-dev
  protobuf-compiler libgoogle-glog-dev libgflags-dev libhdf5-dev liblmdb-dev
  libleveldb-dev libsnappy-dev libopenblas-dev libopencv-dev python3-dev
  python3-numpy python3-protobuf python3-skimage python3-matplotlib
  python3-pydot python3-six ca-certificates)
# A tree that is there needs no clone.
[[ -e $root ]] || packages+=(git)

not_installed() {
  local package
  for package in "$@"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null) \
       == installed ]] || echo "$package"
  done
}

as_root=()
if (( EUID )); then as_root=(sudo); fi
can_install() {
  (( ! EUID )) || { command -v sudo > /dev/null &&
                    { sudo -n true 2> /dev/null || [[ -t 0 ]]; }; }
}

updated=
update_lists() {
  # A third-party source that does not answer must not stop the others.
  if [[ ! $updated ]]; then
    "${as_root[@]}" apt-get -qq -o DPkg::Lock::Timeout=600 update ||
      say "apt-get update had errors; going on with the lists that are there"
  fi
  updated=1
}

install() {
  can_install ||
    die "packages are missing, and only root can install them. Ask for" \
        "  apt-get install --no-install-recommends $*"
  say "installing $*"
  update_lists
  # A run that was killed in here has left dpkg at half its work.
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive dpkg --configure -a \
    > "$project/build/apt.log" 2>&1 || true
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
      -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 \
      install --fix-broken --no-install-recommends "$@" \
      >> "$project/build/apt.log" 2>&1 || {
    tail -n 20 "$project/build/apt.log" >&2
    die "apt-get could not install $*" "Its log: $project/build/apt.log"
  }
}

# Elsewhere than on Debian: what a compiler and a PATH do not find.
missing_elsewhere() {
  local program pair headers
  headers=$("$python" -c 'import sysconfig
print(sysconfig.get_paths()["include"])' 2> /dev/null) || headers=
  for program in cmake make g++ protoc patch "$python"; do
    command -v "$program" > /dev/null || echo "the program $program"
  done
  for pair in boost/thread.hpp=Boost boost/python.hpp=Boost.Python \
      google/protobuf/message.h=protobuf glog/logging.h=glog \
      gflags/gflags.h=gflags lmdb.h=LMDB leveldb/db.h=LevelDB \
      snappy.h=snappy cblas.h=OpenBLAS Python.h="Python 3's headers"; do
    echo "#include <${pair%%=*}>" |
      g++ -x c++ -E -I /usr/include/openblas ${headers:+-I "$headers"} - \
        > /dev/null 2>&1 ||
      echo "${pair#*=} with its header ${pair%%=*}"
  done
  for program in numpy google.protobuf skimage six; do
    "$python" -c "import $program" 2> /dev/null ||
      echo "the Python module $program for $python"
  done
  command -v opencv_version > /dev/null || pkg-config --exists opencv4 ||
    pkg-config --exists opencv || echo "OpenCV"
}

# ---- Rust ----

minimum_rust=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$project/Cargo.toml")

at_least() {  # VERSION MINIMUM
  [[ $(printf '%s\n' "$1" "$2" | sort -V | head -n 1) == "$2" ]]
}

# The folder of the first cargo that is new enough, where lsoftmax.cmake looks.
cargo_dir() {
  local dir version
  while IFS= read -r dir; do
    [[ -x $dir/cargo ]] || continue
    version=$(cd -- "$project" && "$dir/cargo" --version 2> /dev/null |
              sed -n 's/^cargo \([0-9.]*\).*/\1/p') || continue
    if [[ -n $version ]] && at_least "$version" "$minimum_rust"; then
      echo "$dir"
      return
    fi
  done < <(tr ':' '\n' <<< "$PATH"; echo "${CARGO_HOME:-$HOME/.cargo}/bin"
           echo "$HOME/.cargo/bin"; printf '%s\n' /usr/lib/rust-*/bin)
  return 1
}

# The packages of a Rust that is new enough, if the distribution has one.
# (Until Debian 12, the package cargo had a number of its own, 0.66 for Rust
# 1.65; those are too old in any case.)
rust_packages() {
  local cargo candidate
  for cargo in cargo cargo-web $(apt-cache pkgnames cargo-1. | sort -rV); do
    candidate=$(apt-cache policy "$cargo" 2> /dev/null |
                sed -n 's/^ *Candidate: *\([0-9.]*\).*/\1/p')
    if [[ -n $candidate ]] && at_least "$candidate" "$minimum_rust"; then
      echo "$cargo"
      echo "${cargo/cargo/rustc}"
      return
    fi
  done
}

# ---- Get what is missing ----

[[ $packages_only ]] || must_be_writable "$project/build"
if is_debian; then
  mapfile -t missing < <(not_installed "${packages[@]}")
  rust=()
  if ! cargo_dir > /dev/null; then
    if can_install; then update_lists; fi
    mapfile -t rust < <(rust_packages)
  fi
  if [[ $packages_only ]]; then
    printf '%s\n' "${missing[@]}" "${rust[@]}" | sed '/^$/d'
    exit
  fi
  if (( ${#missing[@]} + ${#rust[@]} )); then
    install "${missing[@]}" "${rust[@]}"
    hash -r
  fi
elif [[ $packages_only ]]; then
  exit
else
  mapfile -t missing < <(missing_elsewhere)
  (( ! ${#missing[@]} )) ||
    die "Caffe needs these; install them and run this again:" "${missing[@]}"
fi
cargo_dir > /dev/null ||
  die "Rust $minimum_rust or newer is needed, and no package has it" \
      "Get it with rustup (see rust-lang.org), then run this again."

# ---- Caffe's source ----

debian_version=1.0.0+git20180821.99bd997
debian_sha256=e0eb3f06794f7402c77b7dec8e8480273ee1a1bb192e9122b621a69d4147ad0c

# In the foreground, so that Ctrl-C and what ends this script end it too.
in_time=(timeout --foreground 300)

clone() {
  command -v git > /dev/null || return 1
  say "cloning BVLC/caffe"
  GIT_TERMINAL_PROMPT=0 "${in_time[@]}" git -c http.lowSpeedLimit=1000 \
    -c http.lowSpeedTime=20 clone --quiet --depth 1 \
    https://github.com/BVLC/caffe.git "$part/caffe"
}

# From a private list of sources on the machine's own mirror: bullseye is the
# last Debian that has Caffe.
debian_source() {
  local apt=$part/apt site suite component tarball options signed=
  is_debian || return 1
  say "getting the source package caffe $debian_version"
  # shellcheck disable=SC2016  # apt's own placeholders
  read -r site suite component < <(apt-get indextargets \
      --format '$(SITE) $(ORIGIN) $(LABEL)' 'Created-By: Packages' |
    awk '$2 == "Debian" && $3 == "Debian" { print $1, "bullseye main"; exit }
         $2 == "Ubuntu" { print $1, "focal universe"; exit }') || return 1
  mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
  for tarball in debian ubuntu; do
    if [[ $suite == bullseye && $tarball == debian ||
          $suite == focal && $tarball == ubuntu ]] &&
        [[ -e /usr/share/keyrings/$tarball-archive-keyring.gpg ]]; then
      signed="[signed-by=/usr/share/keyrings/$tarball-archive-keyring.gpg]"
    fi
  done
  echo "deb-src $signed $site $suite $component" > "$apt/sources.list"
  options=(-qq -o "Dir::Etc::SourceList=$apt/sources.list"
           -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$apt/lists"
           -o "Dir::Cache=$apt/cache" -o Acquire::http::Timeout=30
           -o "APT::Sandbox::User=$(id -un)")
  "${in_time[@]}" apt-get "${options[@]}" update || return 1
  (cd -- "$apt" && "${in_time[@]}" apt-get "${options[@]}" source \
     --download-only caffe) || return 1
  tarball=$apt/caffe_$debian_version.orig.tar.gz
  [[ -e $tarball ]] || return 1
  echo "$debian_sha256  $tarball" | sha256sum --check --quiet || return 1
  mkdir "$part/caffe"
  tar -xzf "$tarball" -C "$part/caffe"
}

# Runs a command and keeps its errors in $words.
words=
hear() {
  local status=0
  { words=$("$@" 2>&1 >&3) || status=$?; } 3>&1
  [[ -z $words ]] || printf '%s\n' "$words" >&2
  return "$status"
}

if [[ ! -e $root/src/caffe/proto/caffe.proto ]]; then
  [[ ! -e $root ]] ||
    die "$root is there, but is not a Caffe source tree; move it away"
  rm -rf -- "$root".part.*
  part=$(mktemp -d "$root.part.XXXXXX")
  trap 'rm -rf -- "$part"' EXIT
  hear clone || {
    [[ ! $words =~ $disk_full ]] || die_of_full_disk "$part"
    rm -rf -- "$part/caffe"
    hear debian_source
  } || {
    [[ ! $words =~ $disk_full ]] || die_of_full_disk "$part"
    die "Caffe's source could not be had: neither github.com/BVLC/caffe nor" \
        "the source package caffe of this system's package mirror answered." \
        "Bring a Caffe tree (1.0 or master) and set CAFFE_ROOT to its path."
  }
  mv -T -- "$part/caffe" "$root"
  rm -rf -- "$part"
  trap - EXIT
fi

# ---- Patch ----

"$project/caffe_patch/apply.sh" "$root"

if [[ $source_only ]]; then
  say "done: Caffe's source with the layers in it is $root"
  exit
fi

# ---- Configure ----

build=$root/build
log=$build/build_caffe.log
must_be_writable "$build"
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
      if PATH=$PATH:/usr/local/cuda/bin command -v nvcc > /dev/null &&
          nvidia-smi -L > /dev/null 2>&1; then
        device=cuda
      fi ;;
  esac
fi

options=(-DCMAKE_BUILD_TYPE=Release -DBLAS=Open -DBUILD_docs=OFF
         -Dpython_version=3 "-DPYTHON_EXECUTABLE=$python")
if [[ $device == cpu ]]; then
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
fi
if [[ $tests ]]; then
  only=large_margin_inner_product_layer
  [[ ! -e $root/src/caffe/test/test_bn_layer.cpp ]] || only+=,bn_layer
  options+=("-DBUILD_only_tests=$only")
fi
# Caffe asks for a CMake that CMake 4 no longer can be.
if at_least "$(cmake --version | sed -n 's/^cmake version //p')" 4; then
  options+=(-DCMAKE_POLICY_VERSION_MINIMUM=3.5)
fi

failed() {
  tail -n 30 "$log" >&2
  must_be_writable "$build"
  ! grep -qE "$disk_full" "$log" || die_of_full_disk "$build"
  die "$1" "The whole log: $log"
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
    [[ -n $(find "$build" -name "${file##*/}.o" -newer "$file") ]] ||
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

# CMake's percentages: one line that moves on a terminal, one in ten else.
tty=
if [[ -t 1 ]]; then tty=1; fi
progress() {
  local line percent last=-10 compiling=
  local step='^\[ *([0-9]+)%\] (Building CXX|Building NVCC|Linking)'
  while IFS= read -r line; do
    if [[ ! $compiling && $line =~ ^\ *Compiling\  ]]; then
      compiling=1
      say "building the Rust library"
    elif [[ $line =~ $step ]]; then
      percent=${BASH_REMATCH[1]}
      if (( percent <= last )); then continue; fi
      if [[ $tty ]]; then
        printf '\rbuild_caffe: building Caffe (%s) %3d%%' "$device" "$percent"
      elif (( percent >= last + 10 )); then
        say "building Caffe ($device) $percent%"
      else
        continue
      fi
      last=$percent
    fi
  done
  if [[ $tty ]] && (( last >= 0 )); then echo; fi
}

make_target() {
  cmake --build "$build" --parallel "$jobs" --target "$@" 2>&1 |
    tee -a "$log" | progress ||
    failed "Caffe did not build in $build"
}

targets=(all)
made="$build/tools/caffe and pycaffe in $root/python"
if [[ $tests ]]; then
  targets+=(test.testbin)
  made+=", the tests $build/test/test.testbin"
fi
make_target "${targets[@]}"

PYTHONPATH=$root/python GLOG_minloglevel=2 "$python" -c '
import caffe
missing = {"LargeMarginInnerProduct", "BN"} - set(caffe.layer_type_list())
if missing:
    raise SystemExit("pycaffe does not have the layers: " + ", ".join(missing))
' >> "$log" 2>&1 || failed "pycaffe in $root/python does not work with $python"
rm -f -- "$unfinished"

say "done ($device): $made"
