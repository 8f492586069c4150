#!/usr/bin/env bash
# Runs every fuzzer of a build folder for some seconds each; stops at the first finding.
#   fuzz/run_all.sh build/fuzz 60
set -euo pipefail
build=$1
seconds=${2:-60}
corpus=$build/corpus
for fuzzer in "$build"/fuzz/fuzz_*; do
  [ -x "$fuzzer" ] && [ -f "$fuzzer" ] || continue
  name=$(basename "$fuzzer")
  mkdir -p "$corpus/$name"
  seeds=()
  [ -d "$(dirname "$0")/seeds/$name" ] && seeds=("$(dirname "$0")/seeds/$name")
  echo "== $name, $seconds s"
  "$fuzzer" -max_total_time="$seconds" -print_final_stats=1 -artifact_prefix="$build/" "$corpus/$name" "${seeds[@]}" >"$build/$name.log" 2>&1 || {
    tail -40 "$build/$name.log"
    echo "$name found something; the input is in $build/"
    exit 1
  }
  grep -E 'number_of_executed_units|Done' "$build/$name.log" | tr '\n' ' '
  echo
done
