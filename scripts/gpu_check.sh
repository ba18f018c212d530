#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can show, in one run:  bash scripts/gpu_check.sh
#
# Installs (with TensorRT), then runs each check and goes on after a failure. Ends with one line a check, and
# exit code 1 if any failed. Output of each check: gpu-check/<check>.log. Needs about 25 minutes after installing.
# shellcheck disable=SC2329  # functions are called by their names, through check
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if ! nvidia-smi -L; then
  echo "error: no NVIDIA GPU here (nvidia-smi finds none); there is nothing to check" >&2
  exit 2
fi
make install || exit 1
export PATH="$PWD/.venv/bin:$PATH"
out=gpu-check
mkdir -p "$out"
num_gpus=$(nvidia-smi -L | wc -l)
summary=()
failed=0

# check NAME COMMAND...: run it, keep its output, remember how it ended.
check() {
  local name=$1 started=$SECONDS
  shift
  echo "--- $name: $*"
  if "$@" >"$out/$name.log" 2>&1; then
    summary+=("ok      $name ($((SECONDS - started)) s)")
  else
    summary+=("FAILED  $name (exit code $?, see $out/$name.log)")
    failed=1
  fi
  tail -n 5 "$out/$name.log"
}

# The tests that skip elsewhere; a skip here is a failure.
gpu_tests() {
  pytest -m gpu -rs | tee "$out/gpu-tests.txt"
  [ "${PIPESTATUS[0]}" -eq 0 ] && ! grep -qE '[0-9]+ skipped' "$out/gpu-tests.txt"
}

# A short run in each precision; the loss must be a number, and it must fall.
precision() {
  torchrun --standalone --nproc_per_node=1 -m train.main --out "$out/runs" \
    --set epochs=4 --set "precision=$1" --set device=cuda | tee "$out/precision-$1.json"
  python -c 'import json, sys; sys.exit(json.load(open(sys.argv[1]))["best"]["top1"] < 0.9)' "$out/precision-$1.json"
}

# The same stream and the same losses on one GPU and on two.
two_gpus() {
  for n in 1 2; do
    rm -rf "$out/ranks-$n"
    torchrun --standalone --nproc_per_node="$n" -m train.main --out "$out/ranks-$n" --set device=cuda \
      --set epochs=1 --set precision=fp32 --set model.dropout=0.0 --set log_every=1 \
      --set schedule.learning_rate=0.0005 --set schedule.kind=constant --set schedule.warmup_epochs=0 || return 1
  done
  python - "$out" <<'PYTHON'
import json, pathlib, sys

def losses(n):
    (file,) = pathlib.Path(sys.argv[1], f"ranks-{n}").glob("*/metrics.jsonl")
    rows = map(json.loads, file.read_text().splitlines())
    return [row["loss"] for row in rows if row["split"] == "train"]

one, two = losses(1), losses(2)
worst = max(abs(b / a - 1) for a, b in zip(one, two, strict=True))
print(f"{len(one)} steps, largest relative difference {worst:.1e}")
sys.exit(worst > 1e-3)
PYTHON
}

# The same images through the engine, through ONNX Runtime on the GPU, and on the CPU.
predictions() {
  alexnet predict images/ --backend trt --format jsonl --output "$out/trt.jsonl" &&
    alexnet predict images/ --backend onnx --device cuda --format jsonl --output "$out/cuda.jsonl" &&
    alexnet predict images/ --backend onnx --device cpu --format jsonl --output "$out/cpu.jsonl" || return 1
  python - "$out" <<'PYTHON'
import json, pathlib, sys

def rows(name):
    return [json.loads(line)["predictions"] for line in pathlib.Path(sys.argv[1], f"{name}.jsonl").open()]

worst = 0.0
for name in ("trt", "cuda"):
    for found, expected in zip(rows(name), rows("cpu"), strict=True):
        assert found[0]["class_id"] == expected[0]["class_id"], (name, found, expected)
        worst = max(worst, abs(found[0]["probability"] - expected[0]["probability"]))
print(f"largest difference of the best class's probability: {worst:.1e}")
sys.exit(worst > 1e-3)
PYTHON
}

check doctor alexnet doctor
check gpu-tests gpu_tests
check all-tests pytest
check demo make demo
for name in fp32 bf16 fp16; do check "precision-$name" precision "$name"; done
check predictions predictions
check bench-data alexnet bench data --json  # dali_gpu: images/s with decoding on the GPU
check bench-train alexnet bench train --json --rounds 3
if [ "$num_gpus" -ge 2 ]; then
  check two-gpus two_gpus
else
  summary+=("skipped two-gpus (this machine has one GPU)")
fi

printf '\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
