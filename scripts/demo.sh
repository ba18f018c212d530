#!/usr/bin/env bash
# The demo: trains on two processes, exports ONNX and TensorRT, predicts held-out images, and writes a report.
# `make demo` installs first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

started=$SECONDS
export OMP_NUM_THREADS=1 # torchrun would choose this for several processes, with a warning
step() {
  printf '\n[%3d s] $ %s\n' $((SECONDS - started)) "$*" >&2
  "$@"
}

num_gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
ranks=2
if [ "$num_gpus" -eq 0 ]; then
  echo "No NVIDIA GPU here: two processes on the CPU (gloo, DALI's CPU operators)," \
    "and TensorRT-RTX builds the engine ahead of time." >&2
elif [ "$num_gpus" -eq 1 ]; then
  ranks=1
  echo "One NVIDIA GPU here: one process, since each process needs a GPU of its own." >&2
fi

result=$(step torchrun --nproc_per_node="$ranks" -m train.main)
echo "$result"
step alexnet export --format onnx
step alexnet export --format trt

# Held-out images under images/, one of each class.
if [ ! -e images ]; then
  mkdir images
  number=0
  for class in data/demo-digits/val/*/; do
    number=$((number + 1))
    file=$(find "$class" -name '*.jpg' | sort | head -n 1)
    cp "$file" "$(printf 'images/held-out-%02d-is-a-%s.jpg' "$number" "$(basename "$class")")"
  done
fi
step alexnet predict images/
report=$(step alexnet report)
echo "The report of the run: $report"

printf '\nDone in %d s.\n' $((SECONDS - started)) >&2
RESULT=$result python - <<'PYTHON'
import json, os, sys

top1 = json.loads(os.environ["RESULT"])["best"]["top1"]
print(f"held-out top-1: {top1:.4f}", file=sys.stderr)
sys.exit(0 if top1 >= 0.97 else f"error: held-out top-1 {top1:.4f} is below 0.97")
PYTHON
