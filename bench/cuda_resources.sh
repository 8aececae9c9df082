#!/usr/bin/env bash
# Prints the registers, stack and spilled bytes of every CUDA kernel, as ptxas gives them. Needs nvcc, no device.
#
#   bench/cuda_resources.sh [ARCHITECTURE ...]      default: 80 86 89 90 100 120
#
# bench/results/cuda_resources.txt is a record of it; the gate fails where a kernel spills that does not there.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

targets=()
for architecture in "${@:-80 86 89 90 100 120}"; do
  for one in $architecture; do targets+=(-gencode "arch=compute_$one,code=sm_$one"); done
done
for source in csrc/cuda/*.cu; do
  nvcc -std=c++17 -O3 -I csrc --threads=0 -Wno-deprecated-gpu-targets "${targets[@]}" -Xptxas -v -c "$source" \
    -o "$work/object" 2>&1
done >"$work/log" || { cat "$work/log" >&2; exit 1; }

awk -F"'" '/Compiling entry function/ { name = $2; arch = $4 }
  /spill stores/ { split($0, word, " "); stack = word[1]; spilled = word[5] }
  /Used [0-9]+ registers/ { split($0, word, " "); print word[5], stack, spilled, arch, name }' "$work/log" |
  c++filt | sed 's/(anonymous namespace):://g; s/([^()]*)$//; s/ void / /' | sort -k5 -k4,4 -u |
  awk 'BEGIN { print "registers  stack  spilled  for     kernel" }
    { name = $0; for (i = 0; i < 4; i++) sub(/^[^ ]+ /, "", name)
      printf "%9s  %5s  %7s  %-6s  %s\n", $1, $2, $3, $4, name }'
