#!/usr/bin/env bash
# How many blocks of each kernel an SM of a GPU holds at once. Needs no GPU.
#
# Usage: tests/cuda/occupancy.sh [--check | --float]
#
# Compiles the kernels as build.rs does, for sm_75, 80, 90 and 120 as far as the
# nvcc of cmake/cuda_toolkit.sh knows them, and prints a Markdown table of what
# ptxas says of each kernel: bytes of shared memory a block, and for each GPU the
# registers a thread, the bytes that it spills, and the blocks that its registers,
# threads and shared memory leave room for. Fails if a kernel spills.
#
#   --check  print no table
#   --float  the kernels of float alone, which is the table of README.md
# shellcheck source=SCRIPTDIR/../../cmake/shell.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../../cmake/shell.sh"

which=all
case ${1:-} in
  '') ;;
  --check) which=none ;;
  --float) which=float ;;
  *) bad_usage "unknown argument $1" ;;
esac
(( $# <= 1 )) || bad_usage "unknown argument $2"
cd -- "$project"

nvcc=$(cmake/cuda_toolkit.sh --compiler)/bin/nvcc
known=$("$nvcc" --list-gpu-arch)
archs=()
gencode=()
for arch in 75 80 90 120; do
  if grep -qx "compute_$arch" <<< "$known"; then
    archs+=("$arch")
    gencode+=(-gencode "arch=compute_$arch,code=sm_$arch")
  fi
done
(( ${#archs[@]} )) || die "$nvcc compiles for none of sm_75, 80, 90 and 120"

out=$(mktemp -d)
trap 'rm -rf -- "$out"' EXIT

# macros LAYER: the numbers of layout.rs that are no expressions.
macros() {
  awk -v layer="$1" '
    /^pub mod / { here = $3 == layer }
    here && $1 == "pub" && $2 == "const" && $NF ~ /^[0-9]+;$/ {
      sub(/:$/, "", $3); sub(/;$/, "", $NF); print "-D" $3 "=" $NF
    }' src/cuda/layout.rs
}

# The layers side by side: a frontend and a ptxas for each GPU take a while.
layers=(large_margin batch_norm)
jobs=()
for layer in "${layers[@]}"; do
  mapfile -t definitions < <(macros "$layer")
  "$nvcc" -fatbin -O3 -Xptxas -v "${gencode[@]}" "${definitions[@]}" \
      ${NVCC_CCBIN:+-ccbin "$NVCC_CCBIN"} -o "$out/$layer.fatbin" \
      "src/$layer/kernels.cu" > "$out/$layer.log" 2>&1 &
  jobs+=($!)
  printf '%s\n' "${definitions[@]}" > "$out/$layer.macros"
done
for i in "${!layers[@]}"; do
  wait "${jobs[i]}" || {
    cat -- "$out/${layers[i]}.log" >&2
    die "$nvcc failed on src/${layers[i]}/kernels.cu"
  }
done

# A line a kernel and GPU: name, GPU, threads, registers, spilled, shared.
for layer in "${layers[@]}"; do
  threads=$(sed -n 's/^-DTHREADS=//p' "$out/$layer.macros")
  awk -v threads="$threads" '
    /Compiling entry function/ {
      split($0, quoted, "\047"); kernel = quoted[2]; arch = quoted[4]
      sub(/^sm_/, "", arch); spilled = 0
    }
    /bytes spill stores/ { spilled += $5 + $9 }
    /Used [0-9]+ registers/ {
      registers = shared = 0
      for (i = 2; i <= NF; ++i) {
        if ($i ~ /^registers/) registers = $(i - 1)
        if ($i ~ /^smem/) shared = $(i - 2)
      }
      print kernel, arch, threads, registers, spilled, shared
    }' "$out/$layer.log"
done > "$out/usage"
[[ -s $out/usage ]] || die "$nvcc -Xptxas -v says nothing of the kernels' registers"

if [[ $which != none ]]; then
  awk -v archs="${archs[*]}" -v which="$which" '
    function down(a, b) { return int(a / b) }
    function up(a, b) { return int((a + b - 1) / b) * b }
    function least(a, b) { return a < b ? a : b }
    BEGIN {
      count = split(archs, arch, " ")
      # Of an SM, from the compute capabilities table of the CUDA Programming
      # Guide: threads, blocks, bytes of shared memory, and of these what each
      # block takes for itself. All have 65536 registers in four parts.
      limits["75"] = "1024 16 65536 0"
      limits["80"] = "2048 32 167936 1024"
      limits["90"] = "2048 32 233472 1024"
      limits["120"] = "1536 24 102400 1024"
      printf "| kernel | threads | shared |"
      for (i = 1; i <= count; ++i) printf " sm_%s |", arch[i]
      printf "\n|---|---|---|"
      for (i = 1; i <= count; ++i) printf "---|"
      print ""
    }
    which == "float" && $1 !~ /_f32$/ { next }
    {
      if (!($1 in shared)) { order[++kernels] = $1 }
      threads[$1] = $3
      shared[$1] = $6
      split(limits[$2], limit, " ")
      warps = up($3, 32) / 32
      # A part gives a warp whole units of 256 registers.
      blocks = down(4 * down(16384, up($4 * 32, 256)), warps)
      blocks = least(blocks, least(down(limit[1], $3), limit[2]))
      blocks = least(blocks, down(limit[3], up($6 + limit[4], 128)))
      cell[$1, $2] = $4 ", " $5 ", " blocks
    }
    END {
      for (k = 1; k <= kernels; ++k) {
        name = order[k]
        printf "| %s | %d | %d |", name, threads[name], shared[name]
        for (i = 1; i <= count; ++i) printf " %s |", cell[name, arch[i]]
        print ""
      }
    }' "$out/usage"
fi

spilling=$(awk '$5 { printf "%s on sm_%s (%d bytes) ", $1, $2, $5 }' "$out/usage")
[[ -z $spilling ]] || die "registers spill: ${spilling% }"
if [[ $which == none ]]; then
  say "$(wc -l < "$out/usage") compiled kernels, none spills"
fi
