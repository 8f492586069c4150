#!/bin/bash
# Everything that docs/performance.md says of a GPU, in one run: operations, both models' shapes, and, with two GPUs, the transfers
# between them and the whole stack. Needs `cmake --preset cuda -DBATON_BENCH=ON` built; takes a quarter of an hour.
#   bench/gpu_report.sh [BUILD_FOLDER]
set -u
cd "$(dirname "$0")/.."
build=${1:-build/cuda}
export BATON=$PWD/$build/baton
gpus=$(nvidia-smi --list-gpus | wc -l)
step() { echo; echo "== $*"; "$@"; }

step "$BATON" bench kernels --device cuda:0
step "$build/bench/cuda_linear_bench"
step "$build/bench/cuda_prefill_bench"
step "$BATON" bench engine --device cuda:0 --model models/shapes/Qwen3-0.6B --prefill 2048 8192 --context 16 2048
step "$BATON" bench engine --device cuda:0 --model models/shapes/Llama-3.1-8B --prefill 2048 8192 --context 16 2048
step "$BATON" bench engine --device cuda:0 --model models/shapes/Llama-3.1-8B --prefill 512 --context 2048 --batch 10 32 128 --decode-tokens 96
if [ "$gpus" -lt 2 ]; then
  echo "one GPU: no transfers between GPUs, no disaggregation"
  exit
fi
step "$build/bench/cuda_transfer_bench"
step "$build/bench/staged_transfer_bench" --from 0 --to 1
step bench/gpu_serving.py
