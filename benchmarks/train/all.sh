#!/usr/bin/env bash
# Every committed result of a training step, one after another; about half an hour on one idle core.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
out=benchmarks/results
rm -f $out/{step,growth,idle,random-ltd,attention}.jsonl

$python benchmarks/train/step.py --out $out/step.jsonl
$python benchmarks/train/step.py --vocabulary 32000 --only HiMix "HiMix labelled" "HMGen middle" --out $out/step.jsonl
for tokens in 256 512 1024 2048 4096 8192; do
  $python benchmarks/train/step.py --layers 2 --tokens $tokens --rounds 3 --only HiMix "HMGen first half" --out $out/growth.jsonl
done
for layers in 4 8 16 32 48; do
  $python benchmarks/train/step.py --layers $layers --tokens 256 --rounds 5 --only HiMix "HMGen first half" --out $out/growth.jsonl
done
$python benchmarks/train/idle.py --out $out/idle.jsonl
$python benchmarks/train/random_ltd.py --out $out/random-ltd.jsonl
$python benchmarks/train/attention.py --out $out/attention.jsonl
