# shellcheck shell=bash
# shellcheck disable=SC2154  # what shell.sh and build_caffe.sh set
# Installs the Caffe that is built in $build, or makes a package of it. Sourced
# by build_caffe.sh, after shell.sh.

# check_prefix PREFIX: early, before a long build.
check_prefix() {
  local there=$1
  while [[ ! -e $there ]]; do there=${there%/*}; there=${there:-/}; done
  [[ -d $there ]] || die "--install $1: $there is a file"
  [[ -w $there ]] ||
    die "--install $1: $there cannot be written to" \
        "Choose a PREFIX of your own (--install ~/caffe), or run this as root."
}

# stage PREFIX [OPTION...]: CMake's install, below $build/package, and the
# licenses of all that is in it.
stage=
stage() {
  local doc features=()
  stage=$build/package
  doc=$stage$1/share/doc/caffe-lsoftmax
  rm -rf -- "$stage" "$stage.deb"
  (umask 022 && DESTDIR=$stage cmake --install "$build" "${@:2}") \
    >> "$log" 2>&1 || failed "CMake could not install Caffe"
  # CMake takes folders in which it installs nothing along.
  find "$stage" -type d -empty -delete
  [[ $device == cpu ]] || features=(--features cuda)
  (umask 022 && mkdir -p -- "$doc" &&
     "$python" cmake/copyright.py "$root" "$build" "${features[@]}" \
       > "$doc/copyright") 2>> "$log" ||
    failed "the licenses could not be put together"
}

# install_caffe PREFIX
install_caffe() {
  local prefix=$1
  stage "$prefix"
  (umask 022 && make_dir "$prefix" &&
     "$python" cmake/install.py "$stage$prefix" "$prefix") || {
    rmdir -- "$prefix" 2> /dev/null || true
    exit 1
  }
  rm -rf -- "$stage"

  pycaffe_works "$prefix/python" >> "$log" 2>&1 ||
    failed "pycaffe in $prefix/python does not work"
  "$prefix/bin/caffe" --version >> "$log" 2>&1 ||
    failed "$prefix/bin/caffe does not run"
  say "installed: $prefix/bin/caffe; for Python, export" \
      "PYTHONPATH=$(printf %q "$prefix/python")"
}

make_deb() {
  local deb modules share usr
  say "packing"
  stage /usr --strip
  usr=$stage/usr
  modules=$usr/lib/python3/dist-packages
  share=$usr/share/caffe-lsoftmax
  (
    umask 022
    mkdir -p -- "$modules" "$share"
    mv -- "$usr/python/caffe" "$modules"
    mv -- "$usr/python" "$share/python"
    chmod 644 -- "$modules"/caffe/proto/*.py
    cd -- "$build"
    LSOFTMAX_STAGE=$stage LSOFTMAX_CARGO_TOML=$project/Cargo.toml \
      LSOFTMAX_PYTHON=$("$python" -c 'import sys
print("%d %d" % sys.version_info[:2])') \
      cpack --config "$project/cmake/deb.cmake" >> "$log" 2>&1
  ) || failed "the package could not be made"
  deb=$(cd -- "$stage.deb" && echo caffe-lsoftmax_*.deb)
  mv -f -- "$stage.deb/$deb" "$project/build/$deb"
  rm -rf -- "$stage" "$stage.deb"
  deb=$(printf %q "$project/build/$deb")
  say "made $deb: install it by sudo apt-get install $deb"
}
