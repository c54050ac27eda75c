#!/usr/bin/env bash
# Puts the LargeMarginInnerProduct and BN layers into a Caffe source tree, and
# takes them out again.
#
# Usage: apply.sh [--check] [--bn-field N] [--large-margin-field N] CAFFE_ROOT
#        apply.sh --revert [--check] CAFFE_ROOT
#
# Patches the Caffe source tree CAFFE_ROOT (BVLC Caffe rc3 to 1.0 and master, or
# a fork of them) so that its CMake and Make builds have the layers
# LargeMarginInnerProduct and BN. Run it again after this project or the tree
# has changed: what is there already stays, what is old is renewed. Either
# everything applies or nothing changes.
#
#   --revert                take everything back
#   --check                 say what would change, and change nothing
#   --bn-field N            number of bn_param in LayerParameter
#   --large-margin-field N  number of largemargin_inner_product_param
#                           By default 201 and 202 or, where the tree uses
#                           these itself, the next free ones from 301 on. The
#                           tree keeps the numbers it was patched with.
#   -h, --help              this text
# shellcheck source=SCRIPTDIR/../cmake/shell.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../cmake/shell.sh"
export LC_ALL=C  # names are sorted
# The tree may lie in a repository, and its user may have ways of his own.
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null

manifest=.lsoftmax-manifest
journal=.lsoftmax-commit
proto=src/caffe/proto/caffe.proto
# The paths that patch files change.
targets() { sed -n 's|^+++ b/||p' "$@" | sort -u; }
mapfile -t hooked < <(targets "$project"/caffe_patch/*.patch)

# ---- Arguments ----

mode=apply
check=
bn_field=
large_margin_field=
root_arg=
while (( $# )); do
  case $1 in
    --revert) mode=revert ;;
    --check) check=1 ;;
    --bn-field|--large-margin-field)
      (( $# > 1 )) || die "$1 needs a field number"
      if ! [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || (( $2 > 536870911 )); then
        die "$1 $2: not a protobuf field number (1 to 536870911)"
      fi
      (( $2 < 19000 || $2 > 19999 )) ||
        die "$1 $2: protobuf keeps 19000 to 19999 for itself"
      if [[ $1 == --bn-field ]]; then bn_field=$2
      else large_margin_field=$2; fi
      shift ;;
    -*) bad_usage "unknown option $1" ;;
    *)
      [[ -z $root_arg ]] || die "more than one tree: $root_arg and $1"
      root_arg=$1 ;;
  esac
  shift
done
[[ -n $root_arg ]] || bad_usage "CAFFE_ROOT is missing"
[[ $mode == apply || -z $bn_field$large_margin_field ]] ||
  die "--revert takes no field numbers"
[[ ! $project =~ [\"\$\\\;#\`] ]] ||
  die "CMake and Make cannot take this project's path, $project" \
      "Move the project to a path without any of \" \$ \\ ; # \`"
for tool in git diff sha256sum awk sed flock; do
  command -v "$tool" > /dev/null ||
    die "the program '$tool' is missing" \
        "Debian, Ubuntu: apt-get install git diffutils gawk sed util-linux"
done

# ---- The tree ----

[[ -d $root_arg ]] || die "$root_arg: no such directory"
root=$(cd -- "$root_arg" && pwd -P)
cd -- "$root"
for file in include/caffe/layers src/caffe/solvers; do
  [[ ! -e $proto || -d $file ]] ||
    die "$root: a Caffe older than rc3: it has no $file" \
        "The oldest version that can be patched is rc3 (January 2016)."
done
for file in "${hooked[@]}" src/caffe/layers src/caffe/test; do
  [[ -e $file ]] ||
    die "$root is not a Caffe source tree: it has no $file"
done
if grep -q 'class LayerBase' include/caffe/layer.hpp 2> /dev/null; then
  die "$root: a fork whose layers derive from LayerBase (NVIDIA Caffe 0.16+)" \
      "Only forks that keep BVLC Caffe's Layer can be patched."
fi
exec 8< .
flock -n 8 || die "another apply.sh is at work in $root; wait for it"

# ---- Commit: move files into the tree, all or none ----
#
# The stage holds  put/PATH  files to move in,  old/PATH  the ones that change
# or go, and  plan : lines "put PATH" and "drop PATH". Renaming the stage to
# $journal is the point of no return: from there a run that is killed is
# finished by the next one, and a move that fails is undone here.

finish_commit() {
  local verb path failed=
  while read -r verb path; do
    if [[ $verb == drop ]]; then
      rm -f -- "$path" || failed=1
    elif [[ -e $journal/put/$path ]]; then
      mv -f -- "$journal/put/$path" "$path" || failed=1
    fi
    if [[ $failed ]]; then break; fi
  done < "$journal/plan"
  if [[ $failed ]]; then
    while read -r verb path; do
      if [[ -e $journal/old/$path ]]; then
        mv -f -- "$journal/old/$path" "$path"
      elif [[ $verb == put ]]; then
        rm -f -- "$path"
      fi
    done < "$journal/plan"
  fi
  rm -rf -- "$journal"
  [[ -z $failed ]] || die "could not move the patched files into $root"
}

stage=
odd=
cleanup() {
  local status=$?
  trap - EXIT
  if [[ $stage ]]; then rm -rf -- "$stage"; fi
  # Whatever else can fail writes a file; the program's own words are above.
  if [[ ! $died ]] && (( status && status < 128 )); then
    say "error: cannot write to $root: is its disk full?" >&2
  fi
  if (( status )); then say "nothing was changed" >&2; fi
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if [[ -d $journal ]]; then
  if [[ $check ]]; then
    echo "An interrupted run would be finished first: $root/$journal"
    exit 0
  fi
  finish_commit
  echo "Finished an interrupted run in $root"
fi

# ---- The stage: the files that patches touch, in native/ and new/ ----

# The stage must be on the tree's file system: rename() is what commits it.
if [[ $check ]]; then
  stage=$(mktemp -d)
else
  rm -rf -- .lsoftmax-stage.*
  stage=$(mktemp -d "$root/.lsoftmax-stage.XXXXXX") ||
    die "cannot write to $root"
fi
export GIT_CEILING_DIRECTORIES=$stage
mkdir -- "$stage/native"

# The manifest is a unified diff with one line a file before it:
#   # field NAME NUMBER   a field number that was put in
#   # added SHA256 PATH   a file that was put there
declare -A added=() recorded=()
if [[ -e $manifest ]]; then
  cp -- "$manifest" "$stage/manifest"
  while read -r _ key a b; do
    case $key in
      field) recorded[$a]=$b ;;
      added) added[$b]=$a ;;
    esac
  done < <(sed -n '/^# /p; /^--- /q' "$stage/manifest")
else
  : > "$stage/manifest"
fi

# Lines of ours that no manifest accounts for.
hook_lines='lsoftmax\.(cmake|mk)|LSOFTMAX_ROOT|ResumeLargeMargin|SaveLargeMargin'
hook_lines+='|resume_large_margin|RestoreLargeMargin|largemargin_inner_product_param'
half_patched() {
  die "half patched: $1" "Take it back to Caffe's own version (git checkout" \
      "-- FILE) and run this again."
}

# fits FOLDER PATCH [OPTION...]: git apply in a folder of the stage.
fits() {
  local folder=$1 patch=$2
  shift 2
  git -C "$stage/$folder" apply --unidiff-zero --whitespace=nowarn "$@" \
    -- "$patch" 2> "$stage/words"
}

sha() { sha256sum < "$1" | cut -d ' ' -f 1; }

for path in $(targets "$project"/caffe_patch/{,compat/}*.patch \
                "$stage/manifest"); do
  if [[ -e $path ]]; then cp -p --parents -- "$path" "$stage/native"; fi
done
# Brings native/ to the state before any apply.sh.
for path in $(targets "$stage/manifest"); do
  # A file that the user took back to Caffe's own (git checkout) is done.
  [[ ! -e $path ]] ||
    fits native "$stage/manifest" --include="$path" -R ||
    fits native "$stage/manifest" --include="$path" --check ||
    half_patched "the lines of this project in $path were changed."
done
for path in "${!added[@]}"; do
  [[ ! -e $path || $(sha "$path") == "${added[$path]}" ]] ||
    die "$root/$path was changed after it was put there" \
        "Carry your change over to the file's original in $project," \
        "delete this copy and run this again."
done
for path in "${hooked[@]}"; do
  if grep -qE "$hook_lines" "$stage/native/$path"; then odd+=" $path"; fi
done

# ---- What the tree has of its own ----

# Files outside of the manifest that register the layer type $1.
registers() {
  local file
  while IFS= read -r file; do
    if [[ -z ${added[$file]+x} ]]; then printf '%s\n' "$file"; fi
  done < <(grep -rlE "^[[:space:]]*REGISTER_LAYER_(CLASS|CREATOR)\($1[,)]" \
             src/caffe)
}

# "NUMBER NAME" of the fields of LayerParameter in the file $1: without its
# comments, options and inner blocks, up to its own end.
layer_parameter() {
  sed 's|//.*||' "$1" | tr '\n\t' '  ' | sed -E '
    s:/\*([^*]|\*+[^*/])*\*+/::g; s/\[[^]]*\]//g
    s/^.*message +LayerParameter *\{//
    :inner; s/\{[^{}]*\}/;/g; t inner
    s/\}.*//; s/;/\n/g' |
    sed -nE 's/.*[^A-Za-z_0-9]([A-Za-z_0-9]+) *= *([0-9]+) *$/\2 \1/p'
}

# choose_field NAME OPTION ASKED USUAL: sets $chosen.
declare -A owner=()
choose_field() {
  local wanted=${3:-${recorded[$1]:-$4}} taken
  local others=" ${recorded[*]} $bn_field $large_margin_field "
  chosen=$wanted
  taken=${owner[$wanted]-}
  if [[ $taken ]]; then
    chosen=301
    while [[ ${owner[$chosen]-} || $others == *" $chosen "* ]]; do
      chosen=$(( chosen + 1 ))
    done
    [[ -z $3 ]] ||
      die "$proto: LayerParameter already uses field $3 for $taken" \
          "Choose another number for $1 ($2 $chosen, say), or none: a free one" \
          "is found then."
    echo "Field $wanted of LayerParameter is $taken here: $1 gets $chosen"
  fi
  owner[$chosen]=$1
}

# ---- Patching new/ ----

must_apply() {  # NAME
  local text
  text=$(< "$project/caffe_patch/$1.patch")
  text=${text//@LSOFTMAX_ROOT@/"$project"}
  text=${text//@LSOFTMAX_MAKE_ROOT@/"${project// /\\ }"}
  text=${text//@BN_FIELD@/"$bn_field"}
  text=${text//@LARGE_MARGIN_FIELD@/"$large_margin_field"}
  printf '%s\n' "$text" > "$stage/patch"
  fits new "$stage/patch" ||
    die "$root is no Caffe that $1.patch knows how to patch:" \
        "$(sed 's/^error: //; q' "$stage/words")" \
        "It fits BVLC Caffe rc3, rc4, rc5, 1.0 and master."
}

own_bn=
apply_all() {
  local path found number chosen patch file source
  found=$(registers LargeMarginInnerProduct | sed -n 1p)
  if [[ $found && ! $odd =~ \ (CMakeLists.txt|Makefile) ]]; then
    die "$found registers LargeMarginInnerProduct itself" \
        "This tree has a layer of that name already; two cannot live together."
  fi
  [[ -z $odd ]] ||
    half_patched "in $root, lines of this project that no $manifest \
accounts for:$odd."

  while read -r number path; do
    owner[$number]=$path
  done < <(layer_parameter "$stage/native/$proto")
  (( ${#owner[@]} )) || die "$root/$proto has no message LayerParameter"
  own_bn=$(registers BN | sed -n 1p)
  if [[ $own_bn ]]; then
    echo "$own_bn registers BN: the tree keeps its own, ours is left out"
    bn_field=
  else
    if [[ " ${owner[*]} " == *" bn_param "* ]] || grep -qE \
        '^[[:space:]]*message[[:space:]]+BNParameter' "$stage/native/$proto"
    then
      die "$proto has BNParameter or bn_param, but no layer registers BN" \
          "Take them out of $proto, or bring their layer back."
    fi
    [[ -z $bn_field || $bn_field != "$large_margin_field" ]] ||
      die "bn_param and largemargin_inner_product_param both get field $bn_field"
    choose_field bn_param --bn-field "$bn_field" 201
    bn_field=$chosen
  fi
  choose_field largemargin_inner_product_param --large-margin-field \
    "$large_margin_field" 202
  large_margin_field=$chosen

  must_apply build_hook
  must_apply restore_hook
  if [[ ! $own_bn ]]; then must_apply caffe_proto_bn; fi
  must_apply caffe_proto_large_margin
  # Each part of a compat patch changes what still has its old form; anything
  # else needs none.
  cat -- "$project"/caffe_patch/compat/*.patch | awk -v to="$stage/part." '
    /^--- / { file = sprintf("%s%03d", to, ++count) }
    file { print > file }'
  for patch in "$stage"/part.*; do
    fits new "$patch" || true
  done

  # Whatever lies at a path of Caffe's, and the layers' tests.
  local -A own=()
  while read -r file; do
    path=${file/#tests\/caffe/src\/caffe\/test}
    if [[ $own_bn && $path == */*bn_layer.?pp ]]; then continue; fi
    if [[ -e $path && -z ${added[$path]+x} ]]; then
      die "half patched: $path is there, but $manifest does not know it" \
          "Delete $path and run this again."
    fi
    source=${file/#include/src}
    source=${source/%.hpp/.cpp}
    [[ -e $project/$source ]] ||
      die "$project/$source is missing; this copy of the project is incomplete"
    own[$path]=$project/$file
  done < <(cd -- "$project" &&
           find include/caffe src/caffe tests/caffe -name '*.?pp')

  (
    echo "# What caffe_patch/apply.sh of the large-margin softmax project put"
    echo "# into this tree. apply.sh --revert takes it back by this file."
    if [[ $bn_field ]]; then echo "# field bn_param $bn_field"; fi
    echo "# field largemargin_inner_product_param $large_margin_field"
    while read -r path; do
      mkdir -p -- "$stage/own/${path%/*}"
      cp -- "${own[$path]}" "$stage/own/$path"
      echo "# added $(sha "${own[$path]}") $path"
    done < <(printf '%s\n' "${!own[@]}" | sort)
    cd -- "$stage"
    { diff -r -U 1 native new || (( $? == 1 )); } | sed -E '/^diff -r /d
      s,^(---|\+\+\+) (native|new)/([^\t]*)\t.*,\1 \2/\3,
      s,^--- native/,--- a/,; s,^\+\+\+ new/,+++ b/,'
  ) > "$stage/manifest"
  cp -R -- "$stage/own/." "$stage/new"
  mv -- "$stage/manifest" "$stage/new/$manifest"
}

if [[ $mode == apply ]]; then
  cp -Rp -- "$stage/native" "$stage/new"
  apply_all
else
  [[ -z $odd ]] || half_patched "in $root, lines of this project but no \
$manifest that says how it was before:$odd."
  if [[ ! -e $manifest ]]; then
    echo "Nothing to do: $root is not patched"
    exit 0
  fi
  mv -- "$stage/native" "$stage/new"
  added[$manifest]=
fi

# ---- The plan ----

plan=()
sources_changed=
while IFS= read -r path; do
  if cmp -s "$stage/new/$path" "$path"; then continue; fi
  plan+=("put $path")
  [[ $path != *pp || -e $path ]] || sources_changed=1
done < <(cd -- "$stage/new" && find . -type f | sed 's|^\./||' | sort)
for path in "${!added[@]}"; do
  if [[ -e $path && ! -e $stage/new/$path ]]; then
    plan+=("drop $path")
    [[ $path != *pp ]] || sources_changed=1
  fi
done
if (( ! ${#plan[@]} )); then
  echo "Nothing to do: $root is patched and up to date"
  exit 0
fi
# The list of sources is globbed when CMake runs: with new or lost sources, a
# touched CMakeLists.txt makes it run again.
if [[ $sources_changed && " ${plan[*]} " != *" put CMakeLists.txt "* ]]; then
  plan+=("put CMakeLists.txt")
fi

mkdir -- "$stage/put" "$stage/old"
for line in "${plan[@]}"; do
  path=${line#* }
  like=$path
  verb="would change"
  if [[ ! -e $like ]]; then
    verb="would add   "
    like=$(dirname -- "$path")
  fi
  [[ $line == put* ]] || verb="would delete"
  if [[ $check ]]; then
    echo "$verb $path"
    continue
  fi
  if [[ -e $path ]]; then cp -p --parents -- "$path" "$stage/old"; fi
  if [[ $line == put* ]]; then
    mkdir -p -- "$stage/put/$(dirname -- "$path")"
    cp -- "$stage/new/$path" "$stage/put/$path"
    if [[ -e $path ]]; then
      chmod --reference="$like" -- "$stage/put/$path"
    fi
    # As root in a user's tree, the files stay the user's.
    if (( EUID == 0 )); then
      chown --reference="$like" -- "$stage/put/$path"
    fi
  fi
  path=$(dirname -- "$path")
  [[ -d $path && -w $path ]] || die "cannot write to $root/$path"
done
if [[ $check ]]; then exit 0; fi
printf '%s\n' "${plan[@]}" > "$stage/plan"
rm -rf -- "$stage"/{native,new,own,part.*}
trap '' INT TERM HUP
mv -T -- "$stage" "$journal"
stage=
odd=
finish_commit

printf '  %s\n' "${plan[@]}" |
  sed "/$manifest/d; s/  put /  wrote   /; s/  drop /  deleted /"
if [[ $mode == apply ]]; then
  echo "Patched $root: build it as always, with CMake or Make"
else
  echo "Took everything back in $root"
fi
