# shellcheck shell=bash
# shellcheck disable=SC2154  # what shell.sh sets
# What Caffe needs of a system. Sourced by build_caffe.sh, after shell.sh.

not_installed() {
  local package
  for package in "$@"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null) \
       == installed ]] || echo "$package"
  done
}

# caffe_packages TREE: Debian's names of what Caffe needs.
caffe_packages() {
  echo cmake make g++ git libboost-{,system-,thread-,filesystem-,python-}dev \
    libprotobuf-dev protobuf-compiler libgoogle-glog-dev libgflags-dev \
    libhdf5-dev liblmdb-dev libleveldb-dev libsnappy-dev libopenblas-dev \
    libopencv-dev python3-{dev,numpy,protobuf,skimage,matplotlib,pydot,six} \
    ca-certificates
  # SSD asks for it.
  if grep -qsE 'Boost.*regex|boost_regex' "$1/cmake/Dependencies.cmake"; then
    echo libboost-regex-dev
  fi
}

# The packages of a Rust that is new enough, if the distribution has one.
# (Until Debian 12, the package cargo had a number of its own, 0.66 for Rust
# 1.65; those are too old in any case.)
rust_packages() {  # MINIMUM
  local cargo candidate
  for cargo in cargo cargo-web $(apt-cache pkgnames cargo-1. | sort -rV); do
    candidate=$(apt-cache policy "$cargo" 2> /dev/null |
                sed -n 's/^ *Candidate: *\([0-9.]*\).*/\1/p')
    if [[ -n $candidate ]] && at_least "$candidate" "$1"; then
      echo "$cargo ${cargo/cargo/rustc}"
      return
    fi
  done
}

# missing_packages TREE [PACKAGE...]: the Debian packages that are missing for
# Caffe, and of these, one a line.
missing_packages() {
  local minimum
  # shellcheck disable=SC2046  # words
  not_installed $(caffe_packages "$1") "${@:2}"
  if ! "$project/cmake/find_cargo.sh" > /dev/null 2>&1; then
    minimum=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$project/Cargo.toml")
    if can_install; then update_lists >&2; fi
    rust_packages "$minimum" | tr ' ' '\n'
  fi
}

# Elsewhere than on Debian: what a compiler and a PATH do not find.
missing_elsewhere() {
  local program pair headers
  headers=$("$python" -c 'import sysconfig
print(sysconfig.get_paths()["include"])' 2> /dev/null) || headers=
  for program in cmake make g++ protoc git "$python"; do
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
