#!/usr/bin/env bash
# One machine: policy and rollouts on GPUS GPUs, the judge on one more. More options go to verl:
#
#   GPUS=4 JUDGE=Qwen/Qwen3-8B bash examples/verl/run.sh algorithm.capo.rule=vppo trainer.total_epochs=1
#
# With JUDGE_URL set, the judge is served elsewhere, and none is started here.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
gpus=${GPUS:-4}
JUDGE=${JUDGE:-Qwen/Qwen3-8B}

if [ -z "${JUDGE_URL:-}" ]; then
  JUDGE_URL=http://127.0.0.1:8001/v1
  # Prompts share their beginning, and the K votes of a response are one request.
  CUDA_VISIBLE_DEVICES=$gpus vllm serve "$JUDGE" --host 127.0.0.1 --port 8001 \
    --enable-prefix-caching --max-model-len 8192 --max-num-seqs 256 &
  judge=$!
  trap 'kill "$judge"' EXIT
  until curl --silent --fail "$JUDGE_URL/models" >/dev/null; do
    kill -0 "$judge" # ends the script if the server did
    sleep 2
  done
fi

CUDA_VISIBLE_DEVICES=$(seq --separator=, 0 $((gpus - 1))) \
  python -m verl.trainer.main_ppo --config-path "$here" --config-name capo trainer.n_gpus_per_node="$gpus" \
  algorithm.capo.judge_options.url="$JUDGE_URL" algorithm.capo.judge_options.model="$JUDGE" "$@"
