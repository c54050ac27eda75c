#!/usr/bin/env bash
# Puts the LargeMarginInnerProduct and BN layers into a Caffe source tree, and
# takes them out again.
set -euo pipefail
unset CDPATH
export LC_ALL=C  # the messages of patch are read

usage() {
  cat <<'END'
Usage: apply.sh [--check] [--bn-field N] [--large-margin-field N] CAFFE_ROOT
       apply.sh --revert [--check] CAFFE_ROOT

Patches the Caffe source tree CAFFE_ROOT (BVLC Caffe rc3 to 1.0 and master) so
that its CMake and Make builds have the layers LargeMarginInnerProduct and BN.
Run it again after this project or the tree has changed: what is there already
stays, what is old is renewed. Either everything applies or nothing changes.

  --revert                take everything back
  --check                 say what would change, and change nothing
  --bn-field N            number of bn_param in LayerParameter (201)
  --large-margin-field N  number of largemargin_inner_product_param (202)
                          Only for trees that use these numbers themselves.
                          The tree keeps the numbers it was patched with.
  -h, --help              this text
END
}

died=
die() {
  died=1
  printf 'apply.sh: error: %s\n' "$1" >&2
  shift
  if (( $# )); then printf '  %s\n' "$@" >&2; fi
  exit 1
}

manifest=.lsoftmax-manifest
journal=.lsoftmax-commit
proto=src/caffe/proto/caffe.proto
project=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
stage=
patch_log=

cleanup() {
  local status=$?
  trap - EXIT
  if [[ $stage ]]; then rm -rf -- "$stage"; fi
  # Whatever else can fail writes a file; the program's own words are above.
  if [[ ! $died ]] && (( status && status < 128 )); then
    echo "apply.sh: error: cannot write to $root: is its disk full?" >&2
  fi
  if (( status )); then echo "apply.sh: nothing was changed" >&2; fi
  exit "$status"
}

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
      [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] ||
        die "$1 $2: not a protobuf field number (1 to 536870911)"
      (( $2 <= 536870911 )) ||
        die "$1 $2: protobuf's field numbers end at 536870911"
      (( $2 < 19000 || $2 > 19999 )) ||
        die "$1 $2: protobuf keeps 19000 to 19999 for itself"
      if [[ $1 == --bn-field ]]; then bn_field=$2
      else large_margin_field=$2; fi
      shift ;;
    -h|--help) usage; exit 0 ;;
    -*) usage >&2; die "unknown option $1" ;;
    *)
      [[ -z $root_arg ]] || die "more than one tree: $root_arg and $1"
      root_arg=$1 ;;
  esac
  shift
done
[[ -n $root_arg ]] || { usage >&2; die "CAFFE_ROOT is missing"; }
[[ $mode == apply || -z $bn_field$large_margin_field ]] ||
  die "--revert takes no field numbers"
[[ ! $project =~ [\"\$\\\;#] ]] ||
  die "CMake and Make cannot take this project's path, $project" \
      "Move the project to a path without any of \" \$ \\ ; #"

for tool in patch diff sha256sum awk sed flock; do
  command -v "$tool" > /dev/null ||
    die "the program '$tool' is missing" \
        "Debian, Ubuntu: apt-get install patch diffutils gawk sed util-linux"
done

# ---- The tree ----

[[ -d $root_arg ]] || die "$root_arg: no such directory"
root=$(cd -- "$root_arg" && pwd -P)
for file in "$proto" CMakeLists.txt Makefile src/caffe/solver.cpp \
    src/caffe/solvers/sgd_solver.cpp tools/caffe.cpp src/caffe/layers \
    src/caffe/test; do
  [[ -e $root/$file ]] ||
    die "$root is not a Caffe source tree: it has no $file"
done
[[ -d $root/include/caffe/layers ]] ||
  die "$root: a Caffe older than rc3: it has no include/caffe/layers" \
      "The oldest version that can be patched is rc3 (January 2016)."
if grep -q 'class LayerBase' "$root"/include/caffe/layer.hpp 2> /dev/null; then
  die "$root: a fork whose layers derive from LayerBase (NVIDIA Caffe 0.16+)" \
      "Only forks that keep BVLC Caffe's Layer can be patched."
fi

exec 8< "$root"
flock -n 8 || die "another apply.sh is at work in $root; wait for it"

# ---- Commit: move files into the tree, all or none ----
#
# The stage holds  new/PATH  files to move in,  old/PATH  the ones they
# replace, and  plan : lines "put PATH" and "drop PATH". Renaming the stage to
# $journal is the point of no return: from there a run that is killed is
# finished by the next one, and a move that fails is undone here.

finish_commit() {
  local dir=$root/$journal verb path failed=
  while read -r verb path; do
    case $verb in
      put)
        if [[ -e $dir/new/$path ]]; then
          mv -f -- "$dir/new/$path" "$root/$path" || failed=1
        fi ;;
      drop) rm -f -- "$root/$path" || failed=1 ;;
    esac
    if [[ $failed ]]; then break; fi
  done < "$dir/plan"
  if [[ $failed ]]; then
    while read -r verb path; do
      if [[ -e $dir/old/$path ]]; then
        mv -f -- "$dir/old/$path" "$root/$path"
      elif [[ $verb == put ]]; then
        rm -f -- "$root/$path"
      fi
    done < "$dir/plan"
  fi
  rm -rf -- "$dir"
  [[ -z $failed ]] || die "could not move the patched files into $root"
}

# ---- What the manifest says ----
#
# The manifest is a unified diff with one line a file before it:
#   # field NAME NUMBER       a field number that was put in
#   # patched BEFORE AFTER PATH   SHA-256 sums of a file that was changed
#   # added SHA256 PATH       a file that was put there

sha() { sha256sum < "$1" | cut -d ' ' -f 1; }

declare -A added=() before=() after=() recorded=()
read_manifest() {
  local key a b c
  while read -r _ key a b c; do
    case $key in
      field) recorded[$a]=$b ;;
      patched) before[$c]=$a after[$c]=$b ;;
      added) added[$b]=$a ;;
    esac
  done < <(sed -n '/^# /p; /^--- /q' "$1")
}

# The paths that a patch file changes.
targets() { sed -n 's|^+++ b/||p' "$@" | sort -u; }

in_stage() {
  local path=$1
  if [[ ! -e $tree/$path && -e $root/$path ]]; then
    mkdir -p -- "$tree/$(dirname -- "$path")"
    cp -p -- "$root/$path" "$tree/$path"
  fi
}

# The part of a patch or of the manifest that belongs to one file.
diff_of() {
  awk -v path="$2" '
    /^--- / { on = ($0 == "--- a/" path) }
    on' "$1"
}

# Runs patch on $tree with $stage/one.diff; fails where a hunk does not fit.
run_patch() {
  local status=0
  patch_log=$(patch -d "$tree" -p1 -F0 --batch --no-backup-if-mismatch -r - \
    "$@" 2>&1 < "$stage/one.diff") || status=$?
  (( status < 2 )) || die "patch could not do its work: ${patch_log##*$'\n'}"
  return "$status"
}

# Brings $tree to the state before any apply.sh.
undo() {
  local path sum
  [[ -e $root/$manifest ]] || return 0
  for path in "${!before[@]}"; do
    [[ -e $root/$path ]] || continue
    in_stage "$path"
    sum=$(sha "$root/$path")
    # A file that the user took back to Caffe's own (git checkout) is done.
    if [[ $sum == "${before[$path]}" ]]; then continue; fi
    diff_of "$root/$manifest" "$path" > "$stage/one.diff"
    run_patch -R ||
      die "half patched: the lines of this project in $path were changed" \
          "Take $path back to Caffe's own version (git checkout -- $path)" \
          "and run this again."
    if [[ $sum == "${after[$path]}" ]]; then
      [[ $(sha "$tree/$path") == "${before[$path]}" ]] ||
        die "$manifest does not fit $path; take $path back to Caffe's own" \
            "version (git checkout -- $path) and run this again"
    fi
  done
  for path in "${!added[@]}"; do
    [[ -e $root/$path ]] || continue
    [[ $(sha "$root/$path") == "${added[$path]}" ]] ||
      die "$root/$path was changed after it was put there" \
          "Carry your change over to the file's original in $project," \
          "delete this copy and run this again."
  done
}

# ---- What the tree has of its own ----

# Files outside of the manifest that register the layer type $1.
registers() {
  local file
  while IFS= read -r file; do
    if [[ -z ${added[$file]+x} ]]; then printf '%s\n' "$file"; fi
  done < <(cd -- "$root"
           grep -rlE "^[[:space:]]*REGISTER_LAYER_(CLASS|CREATOR)\($1[,)]" \
             src/caffe)
}

# "NUMBER NAME" of every field of LayerParameter.
layer_parameter_fields() {
  sed 's|//.*||' "$tree/$proto" | awk '
    { text = text " " $0 }
    END {
      gsub(/\/\*([^*]|\*+[^*\/])*\*+\//, " ", text)
      if (!match(text, /message[ \t]+LayerParameter[ \t]*\{/)) exit
      text = substr(text, RSTART + RLENGTH)
      depth = 1
      statement = ""
      for (i = 1; depth > 0 && i <= length(text); ++i) {
        c = substr(text, i, 1)
        if (c == "{") { ++depth; statement = "" }
        else if (c == "}") { --depth; statement = "" }
        else if (c != ";") statement = statement c
        else {
          if (depth == 1 &&
              match(statement, /[A-Za-z_0-9]+[ \t]*=[ \t]*[0-9]+/)) {
            field = substr(statement, RSTART, RLENGTH)
            split(field, part, /[ \t]*=[ \t]*/)
            print part[2], part[1]
          }
          statement = ""
        }
      }
    }'
}

check_field() {
  local option=$1 name=$2 number=$3 owner
  owner=$(awk -v n="$number" '$1 == n { print $2; exit }' "$stage/fields")
  [[ -z $owner ]] ||
    die "$proto: LayerParameter already uses field $number for $owner" \
        "Choose another number for $name, for example" \
        "  apply.sh $option $(free_field) $root_arg" \
        "Nets are read by field name, and weights by layer name: models of" \
        "other builds still load; only binary NetParameters that carry a" \
        "$name are read by its number."
}

free_field() {
  awk -v taken="$bn_field $large_margin_field" '
    BEGIN { split(taken, t, " "); for (i in t) used[t[i]] = 1 }
    { used[$1] = 1 }
    END { for (n = 301; n in used; ++n); print n }' "$stage/fields"
}

# ---- Patching ----

# $1 with its placeholders filled in.
fill_in() {
  local cmake_root make_root
  cmake_root=$(printf '%s' "$project" | sed 's/[\\|&]/\\&/g')
  make_root=$(printf '%s' "$project" | sed 's/ /\\ /g; s/[\\|&]/\\&/g')
  sed -e "s|@LSOFTMAX_ROOT@|$cmake_root|" \
      -e "s|@LSOFTMAX_MAKE_ROOT@|$make_root|" \
      -e "s|@BN_FIELD@|$bn_field|" \
      -e "s|@LARGE_MARGIN_FIELD@|$large_margin_field|" "$1"
}

must_apply() {
  local path
  for path in $(targets "$1"); do in_stage "$path"; done
  fill_in "$1" > "$stage/one.diff"
  run_patch --forward ||
    die "$root is no Caffe that $(basename -- "$1") knows how to patch:" \
        "$(awk '/^patching file / { file = $3 }
                /^Hunk .* FAILED/ { print file ": " $0; exit }' \
             <<< "$patch_log")" \
        "It fits BVLC Caffe rc3, rc4, rc5, 1.0 and master."
}

# A compat patch changes what still has its old form; anything else needs none.
may_apply() {
  local path
  for path in $(targets "$1"); do
    in_stage "$path"
    [[ -e $tree/$path ]] || continue
    diff_of "$1" "$path" > "$stage/one.diff"
    run_patch --forward || true
  done
}

# The files of this project that go into the tree: "SOURCE PATH".
own_files() {
  local file layer dir
  for file in include/caffe/util/resume_large_margin.hpp \
      src/caffe/util/resume_large_margin.cpp; do
    echo "$file $file"
  done
  for layer in large_margin_inner_product_layer bn_layer; do
    if [[ $layer == bn_layer && $own_bn ]]; then continue; fi
    for dir in include/caffe/layers/$layer.hpp src/caffe/layers/$layer.cpp; do
      echo "$dir $dir"
    done
    echo "tests/caffe/test_$layer.cpp src/caffe/test/test_$layer.cpp"
  done
}

put_own_files() {
  local source path
  while read -r source path; do
    [[ -f $project/$source ]] ||
      die "$project/$source is missing; this copy of the project is incomplete"
    if [[ -e $root/$path && -z ${added[$path]+x} ]]; then
      die "half patched: $path is there, but $manifest does not know it" \
          "Delete $path and run this again."
    fi
    mkdir -p -- "$tree/$(dirname -- "$path")"
    cp -- "$project/$source" "$tree/$path"
    new_files+=("$path")
  done < <(own_files)
}

hook_lines='lsoftmax\.(cmake|mk)|resume_large_margin|RestoreLargeMarginIteration'
hook_lines+='|largemargin_inner_product_param'

apply_all() {
  local path found hooked=() name

  # Lines of ours that no manifest accounts for.
  for path in "$proto" CMakeLists.txt Makefile src/caffe/solver.cpp \
      src/caffe/solvers/sgd_solver.cpp tools/caffe.cpp; do
    in_stage "$path"
    if grep -qE "$hook_lines" "$tree/$path"; then hooked+=("$path"); fi
  done
  found=$(registers LargeMarginInnerProduct | sed -n 1p)
  if [[ $found && ! " ${hooked[*]} " =~ \ (CMakeLists.txt|Makefile)\  ]]; then
    die "$found registers LargeMarginInnerProduct itself" \
        "This tree has a layer of that name already; two cannot live together."
  fi
  (( ! ${#hooked[@]} )) ||
    die "half patched: ${hooked[*]} in $root:" \
        "lines of this project, but no $manifest that accounts for them." \
        "Take the files back to Caffe's own version (git checkout -- FILE)" \
        "and run this again."

  layer_parameter_fields > "$stage/fields"
  [[ -s $stage/fields ]] || die "$root/$proto has no message LayerParameter"

  own_bn=$(registers BN | sed -n 1p)
  if [[ $own_bn ]]; then
    echo "$own_bn registers BN: the tree keeps its own, ours is left out"
    bn_field=
  else
    if grep -qE '^[[:space:]]*message[[:space:]]+BNParameter' "$tree/$proto" ||
        grep -qw bn_param "$stage/fields"; then
      die "$proto has BNParameter or bn_param, but no layer registers BN" \
          "Take them out of $proto, or bring their layer back."
    fi
    check_field --bn-field bn_param "$bn_field"
  fi
  check_field --large-margin-field largemargin_inner_product_param \
      "$large_margin_field"
  [[ $bn_field != "$large_margin_field" ]] ||
    die "bn_param and largemargin_inner_product_param both get field $bn_field"

  for name in build_hook restore_hook; do
    must_apply "$project/caffe_patch/$name.patch"
  done
  if [[ ! $own_bn ]]; then
    must_apply "$project/caffe_patch/caffe_proto_bn.patch"
  fi
  must_apply "$project/caffe_patch/caffe_proto_large_margin.patch"
  for path in "$project"/caffe_patch/compat/*.patch; do
    may_apply "$path"
  done
  put_own_files
}

write_manifest() {
  local path sums=()
  (
    cd -- "$stage"
    echo "# What caffe_patch/apply.sh of the large-margin softmax project put"
    echo "# into this tree. apply.sh --revert takes it back by this file."
    if [[ $bn_field ]]; then echo "# field bn_param $bn_field"; fi
    echo "# field largemargin_inner_product_param $large_margin_field"
    for path in "${new_files[@]}"; do
      echo "# added $(sha "tree/$path") $path"
    done
    while IFS= read -r path; do
      path=${path#./}
      if cmp -s "pristine/$path" "tree/$path"; then continue; fi
      echo "# patched $(sha "pristine/$path") $(sha "tree/$path") $path"
      sums+=("$path")
    done < <(cd pristine && find . -type f | sort)
    for path in "${sums[@]}"; do
      diff -U 1 --label "a/$path" --label "b/$path" \
        "pristine/$path" "tree/$path" || (( $? == 1 ))
    done
  ) > "$tree/$manifest"
}

# ---- Main ----

trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if [[ -d $root/$journal ]]; then
  if [[ $check ]]; then
    echo "An interrupted run would be finished first: $root/$journal"
    exit 0
  fi
  finish_commit
  echo "Finished an interrupted run in $root"
fi

# The stage must be on the tree's file system: rename() is what commits it.
if [[ $check ]]; then
  stage=$(mktemp -d)
else
  rm -rf -- "$root"/.lsoftmax-stage.*
  stage=$(mktemp -d "$root/.lsoftmax-stage.XXXXXX") ||
    die "cannot write to $root"
fi
tree=$stage/tree
mkdir -- "$tree"

if [[ -e $root/$manifest ]]; then
  read_manifest "$root/$manifest"
elif [[ $mode == revert ]]; then
  for file in "$proto" CMakeLists.txt Makefile src/caffe/solver.cpp \
      src/caffe/solvers/sgd_solver.cpp tools/caffe.cpp; do
    if grep -qE "$hook_lines" "$root/$file"; then
      die "half patched: $root/$file has lines of this project, but there is" \
          "no $manifest that says how it was before. Take it back to Caffe's" \
          "own version (git checkout -- $file)."
    fi
  done
  rm -rf -- "$stage"
  echo "Nothing to do: $root is not patched"
  exit 0
fi
bn_field=${bn_field:-${recorded[bn_param]:-201}}
large_margin_field=${large_margin_field:-\
${recorded[largemargin_inner_product_param]:-202}}
own_bn=
new_files=()

undo
if [[ $mode == apply ]]; then
  for path in $(targets "$project"/caffe_patch/*.patch \
      "$project"/caffe_patch/compat/*.patch); do
    in_stage "$path"
  done
  cp -Rp -- "$tree" "$stage/pristine"
  apply_all
  write_manifest
fi

plan=()
while IFS= read -r path; do
  path=${path#./}
  if ! cmp -s "$tree/$path" "$root/$path"; then plan+=("put $path"); fi
done < <(cd -- "$tree" && find . -type f | sort)
gone=("${!added[@]}")
if [[ $mode == revert ]]; then gone+=("$manifest"); fi
for path in "${gone[@]}"; do
  if [[ -e $root/$path && ! -e $tree/$path ]]; then plan+=("drop $path"); fi
done

if (( ! ${#plan[@]} )); then
  echo "Nothing to do: $root is patched and up to date"
  exit 0
fi

# The list of sources is globbed when CMake runs: with new or lost sources, a
# touched CMakeLists.txt makes it run again.
sources_changed=
for line in "${plan[@]}"; do
  case $line in
    'put CMakeLists.txt') sources_changed=; break ;;
    drop*pp) sources_changed=1 ;;
    put*pp) [[ -e $root/${line#* } ]] || sources_changed=1 ;;
  esac
done
if [[ $sources_changed ]]; then plan+=("put CMakeLists.txt"); fi

if [[ $check ]]; then
  for line in "${plan[@]}"; do
    path=${line#* }
    case $line in
      drop*) echo "would delete $path" ;;
      *) if [[ -e $root/$path ]]; then echo "would change $path"
         else echo "would add    $path"; fi ;;
    esac
  done
  exit 0
fi

mkdir -- "$stage/new" "$stage/old"
for line in "${plan[@]}"; do
  path=${line#* }
  dir=$(dirname -- "$path")
  if [[ -e $root/$path ]]; then
    mkdir -p -- "$stage/old/$dir"
    cp -p -- "$root/$path" "$stage/old/$path"
  fi
  if [[ $line == put* ]]; then
    mkdir -p -- "$stage/new/$dir"
    cp -- "$tree/$path" "$stage/new/$path"
    like=$root/$dir
    if [[ -e $root/$path ]]; then
      like=$root/$path
      chmod --reference="$like" -- "$stage/new/$path"
    fi
    # As root in a user's tree, the files stay the user's.
    if (( EUID == 0 )); then
      chown --reference="$like" -- "$stage/new/$path"
    fi
    [[ -d $root/$dir && -w $root/$dir ]] || die "cannot write to $root/$dir"
  fi
done
printf '%s\n' "${plan[@]}" > "$stage/plan"
rm -rf -- "$tree" "$stage/pristine"
trap '' INT TERM HUP
mv -T -- "$stage" "$root/$journal"
stage=
finish_commit

for line in "${plan[@]}"; do
  echo "  ${line/put/wrote  }"
done | grep -v "$manifest" | sed 's/  drop/  deleted/' || true
if [[ $mode == apply ]]; then
  echo "Patched $root: build it as always, with CMake or Make"
else
  echo "Took everything back in $root"
fi
