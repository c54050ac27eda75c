#!/usr/bin/env bash
# Runs the README's two commands in a Debian with nothing installed.
#
# Usage: tests/robustness/bare_machine.sh [--user] [--package DEB] [SUITE...]
#
# Makes a minimal Debian of each SUITE (bookworm and trixie) with debootstrap,
# puts a clone of this project's HEAD into it and runs
# myexamples/mnist/train_quick.sh, tests/run.sh and cmake/build_caffe.sh --deb
# there, as root. The package that the last one makes is then installed with
# apt in another system that has nothing else, in the place of a caffe-cpu; a
# net with both layers is trained there by /usr/bin/caffe and run by pycaffe;
# and it is removed, which must leave nothing. Ends with a table; the exit
# status is 0 if all passed in every suite and no stage of tests/run.sh was left
# out.
#
#   --user  as a user without root and without sudo instead: where a command
#           ends with the packages to ask for, root installs these and nothing
#           else, and the command runs again. The first must have asked before it
#           made anything.
#   --package DEB
#           try that package alone, which cmake/build_caffe.sh --deb has made on
#           a Debian of the SUITE
#
# It needs root, a Debian whose package lists are there, as it takes the mirror
# from them, some GB of disk and, on two cores, some 20 minutes a suite. The systems
# are in build/bare/SUITE, in which nothing stays mounted; that of a suite that
# passed is removed. The logs stay in build/bare, the packages' files in
# build/bare/archives.
#
# What a network asks of its machines is carried over: resolv.conf, hosts, apt's
# options for downloads, pip.conf, the certificates in
# /usr/local/share/ca-certificates and the environment's proxies.
# shellcheck source=SCRIPTDIR/../../myexamples/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../../myexamples/common.sh"

as_user=
package=
suites=()
while [ $# -gt 0 ]; do
  case $1 in
    --user) as_user=1 ;;
    --package)
      [ -f "${2:-}" ] || bad_usage "--package needs a .deb"
      package=$(realpath -- "$2")
      shift ;;
    *[!a-z]* | '') bad_usage "unknown argument $1" ;;
    *) suites+=("$1") ;;
  esac
  shift
done
[ ${#suites[@]} -gt 0 ] || suites=(bookworm trixie)

[ "$(id -u)" -eq 0 ] ||
  die "only root can make a Debian and go into it: run this as root"
unshare --mount --pid --fork true ||
  die "this machine does not let root make namespaces (a container without\
 the right to?)"

bare=$ROOT/build/bare
archives=$bare/archives
one_at_a_time "$bare/.lock"
mkdir -p -- "$archives"
command -v debootstrap >/dev/null ||
  need_packages "making a bare Debian" debootstrap
trap 'exit 130' INT
trap 'exit 143' TERM

# mirror LABEL: where this machine has its packages of that label from.
mirror() {
  # shellcheck disable=SC2016  # apt's own placeholders
  apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(SITE)' \
    'Created-By: Packages' | awk -F '|' -v label="$1" \
    '$1 == "Debian" && $2 == label && !site { site = $3 } END { print site }'
}
site=$(mirror Debian)
security=$(mirror Debian-Security)
if [ -z "$site" ] || [ -z "$security" ]; then
  die "the package lists of this machine name no mirror of Debian and of its\
 security updates (apt-get update?)"
fi

# The project is built where its path has a space in it.
home=/home/user
clone=$home/"l softmax"
commands=(myexamples/mnist/train_quick.sh tests/run.sh
  "cmake/build_caffe.sh --deb")
[ -z "$package" ] || commands=()

# What a bare system's commands find in their environment: next to nothing of
# this machine's.
environment=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
for name in http_proxy https_proxy no_proxy all_proxy HTTP_PROXY HTTPS_PROXY \
    NO_PROXY ALL_PROXY PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_TRUSTED_HOST \
    PIP_DEFAULT_TIMEOUT MNIST_MIRRORS; do
  [ -z "${!name:-}" ] || environment+=("$name=${!name}")
done

# apart COMMAND...: runs a command with mounts and processes of its own.
# Whatever ends this script takes all of them away: the kernel ends unshare,
# unshare its child, and that, being pid 1 of its namespace, all the others.
# In the background, so that a signal to this script need not wait; there, bash
# would have Ctrl-C ignored, by all that is started.
apart() {
  (exec env --default-signal=INT,QUIT setpriv --pdeathsig KILL \
    unshare --mount --pid --fork --kill-child --mount-proc "$@") &
  wait "$!"
}

# in_system SYSTEM USER COMMAND...: runs a command in a system. The bash stays
# pid 1 and root: who becomes another user loses the signal of his parent's end.
in_system() {
  local system=$1 user=$2 where=/root
  shift 2
  [ "$user" = root ] || where=$home
  # shellcheck disable=SC2016  # the inner shell's
  apart bash -c '
    set -e
    # Itself a mount, it can be the root of namespaces that a test makes.
    mount --bind "$1" "$1"
    mount --rbind /dev "$1/dev"
    mount -t proc proc "$1/proc"
    mount --bind "$2" "$1/var/cache/apt/archives"
    status=0
    chroot --userspec="$3" "$1" /usr/bin/env -i "${@:4}" || status=$?
    exit "$status"
  ' bash "$system" "$archives" "$user:" \
    "${environment[@]}" "HOME=$where" "USER=$user" "$@"
}

# make_system SUITE SYSTEM
make_system() {
  local suite=$1 system=$2 include=()
  # An earlier run's. If anything were mounted in there, it would stay.
  rm -rf --one-file-system -- "$system"
  [[ $site$security != *https:* ]] || include=(--include=ca-certificates)
  apart debootstrap --variant=minbase "${include[@]}" \
    --cache-dir="$archives" "$suite" "$system" "$site" || return

  cat >"$system/etc/apt/sources.list" <<END
deb $site $suite main
deb $site $suite-updates main
deb $security $suite-security main
END
  apt-config dump | grep '^Acquire::' | grep -vi 'Auto-\?Detect' \
    >"$system/etc/apt/apt.conf.d/00network" || true
  cp -L -- /etc/resolv.conf /etc/hosts "$system/etc/"
  [ ! -e /etc/pip.conf ] || cp -L -- /etc/pip.conf "$system/etc/"
  # The package ca-certificates takes them in when it is installed.
  if [ -d /usr/local/share/ca-certificates ]; then
    mkdir -p -- "$system/usr/local/share"
    cp -RL -- /usr/local/share/ca-certificates "$system/usr/local/share/"
  fi

  mkdir -p -- "$system$home"
  git clone --quiet --no-hardlinks -- "$ROOT" "$system$clone" || return
  if [ -n "$as_user" ]; then
    in_system "$system" root useradd --home-dir "$home" --no-create-home \
      --shell /bin/bash user &&
      in_system "$system" root chown -R user: "$home" &&
      in_system "$system" root apt-get -qq update
  fi
}

files_in() { find "$1" ! -type d | sort; }

# The packages that a command asked for at its end.
asked_for() {
  tail -n 5 "$1" |
    sed -n 's/.*apt-get install --no-install-recommends //p' | tail -n 1
}

asked=0
# run COMMAND SYSTEM LOG: runs one of the project's commands in its clone.
run() {
  local command=$1 system=$2 log=$3 user=root before list status last='' words
  read -ra words <<<"$command"
  [ -z "$as_user" ] || user=user
  before=$(files_in "$system$home")
  asked=0
  while :; do
    status=0
    # shellcheck disable=SC2016  # the inner shell's
    in_system "$system" "$user" bash -c 'cd -- "$1" && exec "./$2" "${@:3}"' \
      bash "$clone" "${words[@]}" > >(tee -- "$log") 2>&1 || status=$?
    wait  # for tee
    [ "$status" -ne 0 ] && [ -n "$as_user" ] || return "$status"
    list=$(asked_for "$log")
    [ -n "$list" ] || return "$status"
    if [ "$command" = "${commands[0]}" ] &&
        [ "$(files_in "$system$home")" != "$before" ]; then
      say "$command made files before it asked for packages:"
      files_in "$system$home" | diff - <(echo "$before") || true
      return 1
    fi
    if [ "$list" = "$last" ]; then
      say "$command asks for packages that are there: $list"
      return 1
    fi
    last=$list
    asked=$((asked + 1))
    say "root installs what $command asked for: $list"
    # shellcheck disable=SC2086  # a list of words
    in_system "$system" root env DEBIAN_FRONTEND=noninteractive \
      apt-get -qq -y install --no-install-recommends $list >"$log.apt" 2>&1 || {
      tail -n 5 "$log.apt"
      return 1
    }
  done
}

# try_package SUITE SYSTEM DEB: installs, uses and removes a package in a
# system of its own.
try_package() {
  local suite=$1 system=$2 nets=$2/package
  make_system "$suite" "$system" || return
  mkdir -- "$nets"
  cp -- "$3" "$nets/caffe.deb"
  cp -- tests/gpu/nets/train.prototxt "$nets"
  sed 's/GPU/CPU/; s|nets/|/package/|' tests/gpu/nets/solver.prototxt \
    >"$nets/solver.prototxt"
  cat >"$nets/try.sh" <<'END'
set -euxo pipefail
cd /package
mkdir -p other/DEBIAN
printf '%s\n' 'Package: caffe-cpu' 'Version: 1.0.0' 'Architecture: all' \
  'Maintainer: nobody <root@localhost>' 'Description: gives way' \
  >other/DEBIAN/control
dpkg-deb --build other
dpkg --install other.deb
apt-get -qq update
apt-get -qq -y install --no-install-recommends ./caffe.deb
[[ $(dpkg-query -W -f '${db:Status-Status}' caffe-cpu || true) != installed ]]
if ldd /usr/bin/caffe | grep 'not found'; then exit 1; fi
/usr/bin/caffe train --solver=solver.prototxt 2>&1 | tee train.log
grep -q 'Optimization Done' train.log
python3 - <<'PYTHON'
import caffe
assert caffe.__file__ == "/usr/lib/python3/dist-packages/caffe/__init__.py"
net = caffe.Net("train.prototxt", "_iter_200.caffemodel", caffe.TRAIN)
accuracy = sum(float(net.forward()["accuracy"]) for _ in range(10)) / 10
print("accuracy of the trained net in pycaffe: %.3f" % accuracy)
assert accuracy > 0.9
PYTHON
dpkg -L caffe-lsoftmax >files
apt-get -qq -y purge caffe-lsoftmax
find / -xdev \( -path /package -o -path /home -o -path /var/log -o -path /proc \
  -o -path /var/cache/apt \) -prune -o -iname '*caffe*' -print | tee left
[[ ! -s left ]]
while IFS= read -r path; do
  [[ -d $path || ! -e $path ]]
done <files
END
  in_system "$system" root bash /package/try.sh
}

say "the project's commit $(git log -1 --format='%h (%s)')"
rows=()
failed=0
for suite in "${suites[@]}"; do
  system=$bare/$suite
  prefix=$bare/$suite${as_user:+-user}
  deb=$package
  start=$SECONDS
  say "$suite: making a system in $(rel "$system")"
  if [ -z "$package" ] &&
      ! make_system "$suite" "$system" >"$prefix-system.log" 2>&1; then
    tail -n 5 "$prefix-system.log" >&2
    rows+=("$suite|debootstrap|FAILED|$((SECONDS - start))|$(
      rel "$prefix-system.log")")
    failed=1
    continue
  fi
  whole=1
  for command in "${commands[@]}"; do
    start=$SECONDS
    log=${command%% *}
    log=$prefix-$(basename "$log" .sh).log
    say "$suite: $command"
    result=passed
    run "$command" "$system" "$log" || result=FAILED
    closing=$(grep -E '^test accuracy: |^[0-9]+ passed, |: made ' "$log" |
      tail -n 1) || true
    # Nothing that a stage needs is out of a bare system's reach.
    if grep -q '^==> .*: SKIPPED, ' "$log"; then
      result=FAILED
      closing+=", a stage SKIPPED"
    fi
    [ -z "$as_user" ] || closing+=", asked for packages: $asked"
    if [ "$result" = FAILED ]; then
      whole=
      closing+="; see $(rel "$log")"
    fi
    rows+=("$suite|$command|$result|$((SECONDS - start))|${closing#[,;] }")
  done
  [ -n "$deb" ] ||
    deb=$(find "$system$clone/build" -maxdepth 1 -name 'caffe-lsoftmax_*.deb')
  if [ -n "$deb" ]; then
    start=$SECONDS
    log=$prefix-package.log
    result=passed
    say "$suite: $(basename "$deb")"
    try_package "$suite" "$system-package" "$deb" >"$log" 2>&1 ||
      { result=FAILED; whole=; tail -n 20 "$log"; }
    rows+=("$suite|$(basename "$deb")|$result|$((SECONDS - start))|$(
      grep '^accuracy of ' "$log" || rel "$log")")
    [ "$result" = FAILED ] || rm -rf --one-file-system -- "$system-package"
  fi
  if [ -n "$whole" ]; then
    rm -rf --one-file-system -- "$system"
  else
    failed=1
  fi
done

say "results${as_user:+, as a user without root}; the logs are in $(rel "$bare")"
for row in "${rows[@]}"; do
  IFS='|' read -r suite command result seconds closing <<<"$row"
  printf '%-9s %-32s %-7s %5d s  %s\n' "$suite" "$command" "$result" \
    "$seconds" "$closing"
done
exit "$failed"
