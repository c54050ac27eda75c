#!/usr/bin/env bash
# Looks for memory errors, data races and undefined behaviour.
#
# Usage: tests/robustness/sanitize.sh [STAGE...]
#
# Runs the layers' tests under tools that see what a test cannot: reads and
# writes outside of their memory, uninitialised values, leaks, data races,
# undefined behaviour. It is for changes of code with `unsafe`, threads or the
# C++ border, takes 10 minutes or more on two cores and is no part of
# tests/run.sh.
#
# Stages, by default all of them:
#   unsafe    every unsafe block says why it is safe (clippy, with the GPU path;
#             its kernels are not compiled for it)
#   asan      the crate's tests under AddressSanitizer
#   tsan      the crate's tests under ThreadSanitizer, for BN's threads; the
#             standard library is built with it (needs the component rust-src:
#             in a library that is not, ThreadSanitizer does not see the locks)
#   miri      tests of the crate that are small enough for Miri (needs it:
#             rustup toolchain install nightly --component miri,rust-src)
#   valgrind  the gtests of both layers in memcheck, with a library that has
#             Rust's debug assertions; their death tests are left out, since a
#             process that ends in LOG(FATAL) frees nothing
#
# The sanitizers are options of rustc that only nightly compilers offer;
# RUSTC_BOOTSTRAP=1 has a stable one take them. A stage whose tool cannot be had
# is SKIPPED with the reason. What is built, and the logs, are in
# build/robustness. The exit status is 0 if no stage failed.
# shellcheck source=SCRIPTDIR/../../myexamples/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../../myexamples/common.sh"
# shellcheck source=SCRIPTDIR/../stages.sh
. "$ROOT/tests/stages.sh"

chosen=("$@")
[ $# -gt 0 ] || chosen=(unsafe asan tsan miri valgrind)
for name in "${chosen[@]}"; do
  [[ $name =~ ^(unsafe|asan|tsan|miri|valgrind)$ ]] ||
    bad_usage "unknown stage $name"
done

work=$ROOT/build/robustness
stages_in "$work"
total=${#chosen[@]}

# The cargo that builds the library: the first one on the PATH may be too old.
PATH=$(cmake/find_cargo.sh):$PATH
host=$(rustc -vV | sed -n 's/^host: //p')

# sanitized NAME FLAGS [CARGO OPTION...]: the crate's tests with a sanitizer.
sanitized() {
  local name=$1 flags=$2
  shift 2
  # Optimised a little: the tests of BN's threads take large blobs.
  CARGO_TARGET_DIR=$work/$name RUSTC_BOOTSTRAP=1 RUSTFLAGS=$flags \
    CARGO_PROFILE_TEST_OPT_LEVEL=1 \
    cargo test --locked --tests --target "$host" "$@"
}

run_unsafe() {
  local compiler=$work/no-compiler
  cargo clippy --version || { cannot_run "cargo clippy is missing"; return; }
  # The crate embeds the kernels; for its Rust they may be empty.
  cat >"$compiler" <<'END'
#!/bin/sh
while [ "$1" != -o ]; do shift; done
: >"$2"
END
  chmod +x -- "$compiler"
  CARGO_TARGET_DIR=$work/unsafe LSOFTMAX_NVCC=$compiler cargo clippy --locked \
    --all-targets --features cuda -- \
    -D clippy::undocumented_unsafe_blocks -D clippy::missing_safety_doc \
    -D unsafe_op_in_unsafe_fn || return
  printf '%d unsafe blocks and impls in src, each with its SAFETY fact\n' \
    "$(grep -rEho '\bunsafe (\{|impl\b)' src | wc -l)"
}

run_asan() {
  sanitized asan -Zsanitizer=address
}

run_tsan() {
  if [ ! -e "$(rustc --print sysroot)/lib/rustlib/src/rust/library" ]; then
    cannot_run "no source of the standard library (rustup component add" \
      "rust-src)"
    return
  fi
  sanitized tsan -Zsanitizer=thread -Zbuild-std
}

run_miri() {
  local miri=(cargo miri) lib=(--lib)
  # Too many operations for an interpreter, or random cases by the thousand.
  local margin=(--test large_margin -- --skip equals_the_oracle
    --skip gradients_are --skip psi --skip the_ --skip f32_keeps --skip any_
    --skip a_class_alone --skip huge)
  local bn=(--test batch_norm -- --skip oracle --skip bit_by_bit
    --skip numerical --skip threads --skip dwarfs --skip huge
    --skip batches_may --skip what_is_not)
  cargo miri --version || miri=(cargo +nightly miri)
  if ! "${miri[@]}" --version; then
    cannot_run "Miri is missing; it would run: cargo miri test ${lib[*]};" \
      "${margin[*]}; ${bn[*]}"
    return
  fi
  # Miri makes powf wrong in its last bits at random unless told not to;
  # proptest asks for the working directory; rayon's epochs need tree borrows;
  # with AVX2 on, the calls that need it are made.
  export CARGO_TARGET_DIR=$work/miri RUSTFLAGS=-Ctarget-feature=+avx2
  export MIRIFLAGS="-Zmiri-deterministic-floats -Zmiri-disable-isolation \
-Zmiri-tree-borrows"
  "${miri[@]}" test --locked "${lib[@]}" &&
    "${miri[@]}" test --locked "${margin[@]}" &&
    "${miri[@]}" test --locked "${bn[@]}"
}

run_valgrind() {
  local link archive library=$work/valgrind/lib/libcaffe.so.1.0.0
  command -v valgrind >/dev/null || need_packages "this stage" valgrind ||
    return
  build_caffe --tests || return
  # Not the library that Caffe has: assertions find more, and memcheck (3.19)
  # does not know every instruction of optimised AVX2 code.
  CARGO_TARGET_DIR=$work/valgrind CARGO_PROFILE_DEV_OPT_LEVEL=1 \
    cargo build --locked || return
  mkdir -p -- "${library%/*}"
  cd -- "$CAFFE_ROOT/build/src/caffe" || return
  link=$(cat CMakeFiles/caffe.dir/link.txt)
  for archive in ../../lsoftmax/release/liblsoftmax.a \
      ../../lib/libcaffe.so.1.0.0; do
    case $link in
      *"$archive"*) ;;
      *) echo "Caffe's link command does not name $archive"; return 1 ;;
    esac
  done
  link=${link/"../../lsoftmax/release/liblsoftmax.a"/"$(
    printf %q "$work/valgrind/debug/liblsoftmax.a")"}
  link=${link/"../../lib/libcaffe.so.1.0.0"/"$(printf %q "$library")"}
  bash -c "$link" || return
  cd -- "$CAFFE_ROOT" || return
  # One thread of the BLAS: memcheck runs one at a time anyway. Nothing is
  # suppressed; leaks are those that no pointer leads to, since glog, protobuf
  # and Python keep theirs until the end.
  OPENBLAS_NUM_THREADS=1 LD_LIBRARY_PATH=${library%/*} valgrind \
    --error-exitcode=9 --track-origins=yes --num-callers=30 \
    --leak-check=full --show-leak-kinds=definite \
    --errors-for-leak-kinds=definite \
    build/test/test.testbin --gtest_color=no \
    --gtest_filter='LargeMarginInnerProductLayer*:BNLayer*-*Death*:*GPU*'
}

closing_of_valgrind="$closing_of_gtest|ERROR SUMMARY|definitely lost:"
for name in "${chosen[@]}"; do
  case $name in
    unsafe) stage unsafe '' run_unsafe ;;
    valgrind) stage valgrind "$closing_of_valgrind" run_valgrind ;;
    *) stage "$name" "$closing_of_cargo|SUMMARY: " "run_$name" ;;
  esac
done
results
