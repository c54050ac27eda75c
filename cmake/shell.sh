# shellcheck shell=bash
# shellcheck disable=SC2034  # for those who source it
# What all scripts share. Sourced first, it answers --help with the comment at
# the script's top, or with that of the Python program that helper names, before
# anything is done.
set -euo pipefail
unset CDPATH

project=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# The system's python has the packages that apt installs; another python3 may
# come first on the PATH.
python=/usr/bin/python3
me=${0##*/}

say() { printf '%s: %s\n' "$me" "$*"; }

died=
die() {  # MESSAGE [LINE...]
  # shellcheck disable=SC2034  # for a script's EXIT trap
  died=1
  printf '%s: error: %s\n' "$me" "$1" >&2
  shift
  if (( $# )); then printf '  %s\n' "$@" >&2; fi
  exit 1
}

show_help() {
  awk 'NR > 1 { if (!/^#/ || /^# shellcheck /) exit; sub(/^# ?/, ""); print }' "$script"
}

bad_usage() {  # MESSAGE
  show_help >&2
  (die "$1") || exit 2
}

script=${help_from:-$0}
for argument; do
  [[ $argument == -h || $argument == --help ]] || continue
  if [[ ! ${helper:-} ]]; then show_help; exit; fi
  "$python" "$project/$helper" --help
  exit
done

# ---- Disks and locks ----

# A full disk is behind errors that look like others.
disk_full='No space left on device|Disk quota exceeded'
die_of_full_disk() {  # WHERE
  die "cannot write to $1: its disk is full, or that of ${TMPDIR:-/tmp}" \
      "Make room and run this again; it goes on where it stopped."
}

rel() { printf '%s' "$1"; }  # as a message shows a path

# make_dir DIR: makes DIR if it is not there, and says why it takes no file.
make_dir() {
  local said
  said=$({ mkdir -p -- "$1" && printf '%4096s' '' > "$1/.probe"; } 2>&1) || {
    rm -f -- "$1/.probe" 2> /dev/null || true
    [[ ! $said =~ $disk_full ]] || die_of_full_disk "$(rel "$1")"
    die "cannot write to $(rel "$1"): ${said##*: }"
  }
  rm -f -- "$1/.probe"
}

# holders FILE: who holds that lock of one_at_a_time, as " (NAME PID, ...)": the
# script, and what it has started, which may have outlived it.
holders() {
  local info pid found=''
  for info in /proc/[0-9]*/fdinfo/9; do
    pid=${info#/proc/} pid=${pid%%/*}
    # Those that wait have the file open, too.
    if [[ /proc/$pid/fd/9 -ef $1 ]] && grep -q '^lock:' "$info" 2> /dev/null
    then
      found+=", $(cat "/proc/$pid/comm" 2> /dev/null || true) $pid"
    fi
  done
  if [[ $found ]]; then printf ' (%s)' "${found#, }"; fi
}

# one_at_a_time FILE [WHERE]: from here to its end no other script holds the
# lock FILE, whose folder is made if it is not there.
one_at_a_time() {
  [[ -k ${1%/*} ]] || make_dir "${1%/*}"
  { exec 9>> "$1"; } 2> /dev/null || die "cannot write $1"
  if ! flock -n 9; then
    say "waiting for another script that works in\
 $(rel "${2:-${1%/*}}")$(holders "$1")"
    flock 9
  fi
}

# ---- Progress ----

# progress WORDS: how far long work is. On a terminal a line that moves, else
# one every ten seconds.
moving=
every=10
next_line=$(( SECONDS + every ))
progress() {
  local line
  if [[ -t 1 ]]; then
    line=$(say "$1")
    printf '\r%.*s\e[K' "$(( ${COLUMNS:-80} - 1 ))" "$line"
    moving=1
  elif (( SECONDS >= next_line )); then
    say "$1"
    next_line=$(( SECONDS + every ))
  fi
}
progress_end() {
  if [[ $moving ]]; then echo; fi
  moving=
}

# ---- Packages ----

is_debian() {
  command -v dpkg-query > /dev/null && command -v apt-get > /dev/null
}

as_root=()
if (( EUID )); then as_root=(sudo); fi
can_install() {
  (( ! EUID )) || { command -v sudo > /dev/null &&
                    { sudo -n true 2> /dev/null || [[ -t 0 ]]; }; }
}

# run_apt [PREFIX...] -- ARGUMENT...: apt-get behind a prefix such as sudo, with
# its progress on standard output, and its words on standard error.
run_apt() {
  local before=()
  while [[ $1 != -- ]]; do before+=("$1"); shift; done
  shift
  # What apt tells of its progress goes through a pipe of its own, which apt
  # makes one that does not block: a package's script that found such a pipe
  # full behind its standard output would fail. It is the prefix's standard
  # output, since sudo hands no other file on.
  { { "${before[@]}" /bin/sh -c 'exec 3>&1 >&2; exec apt-get "$@"' apt-get \
        -o APT::Status-Fd=3 "$@" 2>&4 4>&- 5>&- | cat >&5
    } 4>&1 | cat >&5
  } 5>&1 | apt_progress
}

# apt_get ARGUMENT...: likewise, as root and without a question.
apt_get() {
  run_apt "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive -- -y \
    -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 "$@"
}

apt_progress() {
  local line begun='' kind percent what words="waiting for apt" status
  while :; do
    status=0
    IFS= read -r -t "$every" line || status=$?
    line=$begun$line
    begun=
    # Where apt says nothing, what it said last goes on.
    if (( status > 128 )); then
      begun=$line
      progress "$words"
      continue
    elif (( status )) && [[ ! $line ]]; then
      break
    fi
    IFS=: read -r kind _ percent what <<< "$line"
    case $kind in
      dlstatus) words="downloading" ;;
      pmstatus) words="installing" ;;
      Waiting\ for\ *)
        words="waiting for another program that installs packages"
        percent= ;;
      *)
        printf '%s\n' "$line" >&2
        continue ;;
    esac
    # A line that apt could write only in part may be anything.
    if [[ $percent =~ ^[0-9]{1,3}(\.|$) ]]; then
      printf -v words '%s %3d%%: %s' "$words" "$((10#${percent%%.*}))" "$what"
    fi
    progress "$words"
  done
  progress_end
}

updated=
update_lists() {
  # A third-party source that does not answer must not stop the others.
  if [[ ! $updated ]]; then
    say "updating the lists of packages"
    apt_get -qq update ||
      say "apt-get update had errors; going on with the lists that are there"
  fi
  updated=1
}

# need_packages PURPOSE PACKAGE...: installs Debian packages, or says which.
need_packages() {
  local purpose=$1 log
  shift
  command -v apt-get > /dev/null ||
    die "$purpose needs what Debian calls $*: install it and run this again"
  can_install ||
    die "packages are missing for $purpose, and only root can install them." \
        "Ask for" "apt-get install --no-install-recommends $*"
  say "installing for $purpose: $*"
  log=$(mktemp)
  update_lists 2> "$log"
  # A run that was killed in here has left dpkg at half its work.
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive dpkg --configure -a \
    >> "$log" 2>&1 || true
  # With -qq it would not say that it waits for a lock.
  apt_get -q install --fix-broken --no-install-recommends "$@" 2>> "$log" || {
    grep -m 1 -B 2 '^dpkg: error processing' "$log" >&2 || true
    tail -n 20 "$log" >&2
    rm -f -- "$log"
    die "apt-get could not install $* (its last words stand above)"
  }
  rm -f -- "$log"
}

# ---- PyPI ----

# find_pip: sets pip to the command. Fails where there is none.
find_pip() {
  local candidate
  for candidate in "$python" python3; do
    if "$candidate" -m pip --version > /dev/null 2>&1; then
      pip=("$candidate" -m pip)
      return
    fi
  done
  return 1
}

# pip_unpack DEST PACKAGE...: the files of these packages, and of no other.
pip_unpack() {
  PIP_ROOT_USER_ACTION=ignore "${pip[@]}" --disable-pip-version-check install \
      --no-deps --only-binary :all: --no-compile --target "$@" >&2
}

# ---- Versions ----

at_least() {  # VERSION MINIMUM
  [[ $(printf '%s\n' "$1" "$2" | sort -V | head -n 1) == "$2" ]]
}
