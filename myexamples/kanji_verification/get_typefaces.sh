#!/usr/bin/env bash
# Usage: myexamples/kanji_verification/get_typefaces.sh
#
# Puts the typefaces that typefaces.txt names into
# myexamples/kanji_verification/data. They are in packages of Debian and
# Ubuntu, which apt downloads and checks; nothing is installed. One that cannot
# be had is left out, as long as 20 are left. A folder data that is there
# already is left as it is: font files of your own may be in it.
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

here=$ROOT/myexamples/kanji_verification
data=$here/data
parts=$here/data.download
enough=20

[ $# -eq 0 ] || bad_usage "unknown argument $1"

count() { find "$1" -maxdepth 1 -iname '*.[to]t[fc]' | wc -l; }

ready() {
  [ -e "$data" ] || return 0
  say "$(count "$data") typefaces are ready in $(rel "$data")"
  exit 0
}
ready
is_debian ||
  die "there is no apt to get typefaces with: put $enough font files or more\
 with the kanji of JIS level 1 into $(rel "$data") and run this again"
one_at_a_time "$here/.lock"
ready

# One line a typeface: its package and its file.
mapfile -t wanted < <(grep -v '^#' "$here/typefaces.txt")
mapfile -t packages < <(printf '%s\n' "${wanted[@]%% *}" | sort -u)

# look_up: sets known to the packages that apt has, and size to their MB.
look_up() {
  local package bytes
  known=()
  size=0
  while read -r package bytes; do
    known+=("$package")
    size=$((size + bytes))
  done < <(apt-cache show --no-all-versions "${packages[@]}" 2>/dev/null |
    awk '$1 == "Package:" { name = $2 } $1 == "Size:" { print name, $2 }')
  size=$(((size + 500000) / 1000000))
}

# As apt downloads for root, who needs no sandbox in a folder of ours.
download() {
  (cd -- "$parts" &&
    run_apt -- -q -o APT::Sandbox::User=root download "${known[@]}" 2>"$log")
}

look_up
if [ ${#known[@]} -lt ${#packages[@]} ] && can_install; then
  update_lists
  look_up
fi
[ ${#known[@]} -gt 0 ] ||
  die "apt knows none of the packages with typefaces: have root run apt-get\
 update, and run this again"
make_dir "$parts"
log=$parts/apt.log
say "downloading ${#known[@]} packages of typefaces ($size MB)"
if ! download; then
  # Lists that are old name packages that are gone.
  if ! can_install || ! { update_lists; download; }; then
    grep -m 1 '^E: ' "$log" >&2 || true
    say "apt could not download all of them (its first words stand above)"
  fi
fi

rm -rf "$data.new"
make_dir "$data.new"
left_out=()
for line in "${wanted[@]}"; do
  read -r package file <<<"$line"
  unpacked=$parts/$package
  for deb in "$parts/$package"_*.deb; do
    [ ! -e "$unpacked" ] || break
    # A broken download leaves half a package.
    rm -rf "$unpacked.new"
    ! dpkg-deb -x "$deb" "$unpacked.new" 2>>"$log" ||
      mv -T -- "$unpacked.new" "$unpacked"
  done
  found=
  [ ! -e "$unpacked" ] ||
    found=$(find "$unpacked" -type f -name "$file" -print -quit)
  if [ -n "$found" ]; then
    cp -- "$found" "$data.new" || die "cannot write to $(rel "$data.new")"
  else
    left_out+=("$file")
  fi
done
[ ${#left_out[@]} -eq 0 ] ||
  say "left out, as they cannot be had: ${left_out[*]}"
had=$(count "$data.new")
[ "$had" -ge "$enough" ] ||
  die "$had of ${#wanted[@]} typefaces could be had, and $enough are needed:\
 run this again with a network"
mv -T -- "$data.new" "$data"
rm -rf "$parts"
say "$had typefaces are ready in $(rel "$data")"
