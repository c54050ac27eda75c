# shellcheck shell=bash
# shellcheck disable=SC2154  # what shell.sh sets
# Gets Caffe's source. Sourced by build_caffe.sh, after shell.sh.

# The last one that Debian has, which differs from master in words alone.
caffe_commit=99bd99795dcdf0b1d3086a8d67ab1782a8a08383
debian_version=1.0.0+git20180821.${caffe_commit:0:7}
debian_sha256=e0eb3f06794f7402c77b7dec8e8480273ee1a1bb192e9122b621a69d4147ad0c

# In the foreground, so that Ctrl-C and what ends this script end it too.
in_time=(timeout --foreground 300)

clone() {  # DEST
  local git=(git -C "$1")
  command -v git > /dev/null || return 1
  say "cloning BVLC/caffe at ${caffe_commit:0:7}"
  git init --quiet "$1" && GIT_TERMINAL_PROMPT=0 "${in_time[@]}" "${git[@]}" \
    -c http.lowSpeedLimit=1000 -c http.lowSpeedTime=20 fetch --quiet --depth 1 \
    https://github.com/BVLC/caffe.git "$caffe_commit" &&
    "${git[@]}" -c advice.detachedHead=false checkout --quiet FETCH_HEAD
}

# From a private list of sources on the machine's own mirror: bullseye is the
# last Debian that has Caffe.
debian_source() {  # DEST
  local apt=$1.apt site suite component tarball options signed=
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
  run_apt "${in_time[@]}" -- "${options[@]}" update || return 1
  (cd -- "$apt" && run_apt "${in_time[@]}" -- "${options[@]}" source \
     --download-only caffe) || return 1
  tarball=$apt/caffe_$debian_version.orig.tar.gz
  [[ -e $tarball ]] || return 1
  echo "$debian_sha256  $tarball" | sha256sum --check --quiet || return 1
  mkdir "$1"
  tar -xzf "$tarball" -C "$1"
}

# Runs a command and keeps its errors in $words.
words=
hear() {
  local status=0
  { words=$("$@" 2>&1 >&3) || status=$?; } 3>&1
  [[ -z $words ]] || printf '%s\n' "$words" >&2
  return "$status"
}

get_caffe() {  # ROOT
  local root=$1
  [[ ! -e $root ]] ||
    die "$root is there, but is not a Caffe source tree; move it away"
  rm -rf -- "$root".part.*
  part=$(mktemp -d "$root.part.XXXXXX")
  trap 'rm -rf -- "$part"' EXIT
  hear clone "$part/caffe" || {
    [[ ! $words =~ $disk_full ]] || die_of_full_disk "$part"
    rm -rf -- "$part/caffe"
    hear debian_source "$part/caffe"
  } || {
    [[ ! $words =~ $disk_full ]] || die_of_full_disk "$part"
    die "Caffe's source could not be had: neither github.com/BVLC/caffe nor" \
        "the source package caffe of this system's package mirror answered." \
        "Bring a Caffe tree (1.0 or master) and set CAFFE_ROOT to its path."
  }
  mv -T -- "$part/caffe" "$root"
  rm -rf -- "$part"
  trap - EXIT
}
