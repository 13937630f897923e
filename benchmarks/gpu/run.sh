#!/usr/bin/env bash
# The one prepared GPU run: under 8 minutes on one H100, into $OUT (docs/gpu.md). Each part is bounded in time, and the next
# begins when one fails. --rehearse runs all of it on the CPU with tiny sizes.
#
#   OUT=runs/gpu benchmarks/gpu/run.sh [--rehearse]
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
rows=$out/rows.jsonl
failed=$out/failures.jsonl
rm -f "$rows" "$out"/{parts.jsonl,log.txt,tests.txt}
: >"$failed"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

if [ "${1:-}" = --rehearse ]; then
  export CUDA_VISIBLE_DEVICES= TOKENDROP_TEST_DEVICE=cpu OMP_NUM_THREADS=1
  small=--rehearse patience=4 # what a busy machine may need
  kernels=(--device cpu --batch 2 --tokens 64 --kept 16 --width 64 --repeats 2 --dtypes bfloat16)
  decode=(--device cpu --layers 8 --width 64 --head 16 --vocabulary 64 --tokens 32 --batches 2 --new 3 --rounds 1 --only HiMix FastV\ 50%)
  idle=(--rounds 1 --sizes 2 64 32)
else
  export TOKENDROP_TEST_DEVICE=cuda
  small= patience=1
  kernels=()
  decode=(--layers 8 --width 2048 --head 128 --vocabulary 32000 --dtype bfloat16 --tokens 2048 8192 --batches 1 16 --new 33 --rounds 2
    --only HiMix "HMGen middle" "Drop gone 25%" "FastV 50%")
  idle=(--rounds 3 --dtype bfloat16 --sizes 4 2048 2048)
fi

part() { # name, seconds, command
  local name=$1 limit=$(($2 * patience)) start=$SECONDS code
  shift 2
  echo "==== $name: $*" | tee -a "$out/log.txt"
  timeout --kill-after=5 "$limit" "$@" >>"$out/log.txt" 2>&1
  code=$?
  echo "$name: exit $code after $((SECONDS - start)) of $limit seconds"
  printf '{"part": "%s", "exit": %d, "seconds": %d, "limit": %d}\n' "$name" $code $((SECONDS - start)) "$limit" >>"$out/parts.jsonl"
}

part tests 130 "$python" -m benchmarks.gpu.tests --seconds 120 $small --out "$rows" --log "$out/tests.txt"
part kernels 25 "$python" -m benchmarks.kernels.bandwidth "${kernels[@]}" --out "$rows"
part step 170 "$python" -m benchmarks.gpu.step --seconds 155 $small --out "$rows" --failures "$failed"
part compile 80 "$python" -m benchmarks.gpu.compiled $small --out "$rows"
part decode 45 "$python" benchmarks/decode.py "${decode[@]}" --out "$rows"
part idle 25 "$python" benchmarks/train/idle.py "${idle[@]}" --out "$rows"
! grep -qv '"exit": 0,' "$out/parts.jsonl"
