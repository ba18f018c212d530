#!/usr/bin/env bash
# Checks what only a machine with an NVIDIA GPU can show:  bash scripts/gpu_check.sh
#
# Installs (with TensorRT), then runs every check, also after a failure. Ends with one line per check, and exit
# code 1 if one failed. The output of a check is in gpu-check/<check>.log. About 35 minutes after installing.
# shellcheck disable=SC2329  # functions are called by name, through check
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

# check NAME COMMAND...: runs the command, keeps its output, records how it ended.
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

# The tests that are skipped elsewhere; a skip counts as a failure here.
gpu_tests() {
  pytest -m gpu -rs | tee "$out/gpu-tests.txt"
  [ "${PIPESTATUS[0]}" -eq 0 ] && ! grep -qE '[0-9]+ skipped' "$out/gpu-tests.txt"
}

# A short run in each precision must reach 90% top-1.
precision() {
  torchrun --standalone --nproc_per_node=1 -m train.main --out "$out/runs" \
    --set epochs=4 --set "precision=$1" --set device=cuda | tee "$out/precision-$1.json"
  python -c 'import json, sys; sys.exit(json.load(open(sys.argv[1]))["best"]["top1"] < 0.9)' "$out/precision-$1.json"
}

# One GPU and two must see the same stream and have the same losses.
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

# The engine, ONNX Runtime on the GPU, a Ray worker and the CPU must predict the same.
predictions() {
  alexnet predict images/ --backend trt --format jsonl --output "$out/trt.jsonl" --overwrite &&
    alexnet predict images/ --backend onnx --device cuda --format jsonl --output "$out/cuda.jsonl" --overwrite &&
    alexnet predict images/ --backend onnx --device cpu --format jsonl --output "$out/cpu.jsonl" --overwrite || return 1
  alexnet predict images/ --engine ray --device cuda --format jsonl --output "$out/ray" --overwrite &&
    cat "$out"/ray/part-*.jsonl >"$out/ray.jsonl" || return 1
  python - "$out" <<'PYTHON'
import json, pathlib, sys

def rows(name):
    return [json.loads(line)["predictions"] for line in pathlib.Path(sys.argv[1], f"{name}.jsonl").open()]

worst = 0.0
for name in ("trt", "cuda", "ray"):
    for found, expected in zip(rows(name), rows("cpu"), strict=True):
        assert found[0]["class_id"] == expected[0]["class_id"], (name, found, expected)
        worst = max(worst, abs(found[0]["probability"] - expected[0]["probability"]))
print(f"largest difference of the best class's probability: {worst:.1e}")
sys.exit(worst > 1e-3)
PYTHON
}

# One precision: the engine runs here and passes the gate, the doctor loads and runs everything, and the engine
# that is built again from the ONNX file agrees with it.
exported() {
  local target="$out/export-$1"
  rm -rf "$target"
  alexnet export --format onnx,trt --precision "$1" --out "$target" --json >"$target.json" &&
    alexnet doctor "$target/trt-$1" --json >"$target-doctor.json" &&
    alexnet export "$target/trt-$1" --format trt --data data/demo-digits --json >"$target-rebuilt.json" || return 1
  python - "$target" <<'PYTHON'
import json, sys

made, doctor, rebuilt = (json.load(open(sys.argv[1] + end)) for end in (".json", "-doctor.json", "-rebuilt.json"))
print("gate:", json.dumps(made["trt"]["report"]))
print("here:", json.dumps(doctor["here"]), "predict would use", doctor["predict_would_use"])
print("rebuilt:", json.dumps(rebuilt["rebuild"]))
assert made["trt"]["report"]["engine"], made["trt"]["report"]["engine_not_run"]
assert all(words.startswith("ok") for words in doctor["here"].values()), doctor["here"]
assert rebuilt["rebuild"]["agreement"], rebuilt["rebuild"]["unknown"]
PYTHON
}

# TensorRT only: its timing cache shortens the second build; Triton's repository has the engine.
tensorrt_only() {
  rm -rf "$out/timed" "$out/triton" "$out/timings"
  for _ in 1 2; do
    alexnet export --format trt --builder-level 5 --timing-cache "$out/timings" --out "$out/timed" || return 1
  done
  alexnet export "$out/timed" --triton "$out/triton" && cat "$out"/triton/*/config.pbtxt
}

# Images/s with decoding on the GPU, beside DALI's own reader. Good files leave no line of a library's.
feed() {
  local only=(dali_gpu dali_gpu_64 dali_gpu_shards dali_gpu_reader dali_gpu_deterministic cached_gpu)
  alexnet bench data --json --rounds 3 "${only[@]/#/--only=}" 2>"$out/feed.err"
  local code=$?
  cat "$out/feed.err"
  [ "$code" -eq 0 ] && ! grep -iE 'nvjpeg|nvimagecodec|\[(warning|error)\]' "$out/feed.err"
}

check doctor alexnet doctor
check gpu-tests gpu_tests
check all-tests pytest
check demo make demo
for name in fp32 bf16 fp16; do check "precision-$name" precision "$name"; done
check predictions predictions
for name in fp32 fp16 int8; do check "export-$name" exported "$name"; done
if python -c 'import tensorrt' 2>/dev/null; then
  check tensorrt-only tensorrt_only
else
  summary+=("skipped tensorrt-only (timing cache, Triton's engine: tensorrt is not installed)")
fi
check feed feed
check bench-data alexnet bench data --json
check bench-train alexnet bench train --json --rounds 3
check bench-infer alexnet bench infer --json --device cuda --precision fp32 --precision fp16 --rounds 3
check bench-batch alexnet bench batch --to 4096 --plot "$out/bench-batch.png"
if [ "$num_gpus" -ge 2 ]; then
  check two-gpus two_gpus
  check bench-scaling alexnet bench scaling --json --ranks 1 --ranks 2 --batch 128 --steps 20
else
  summary+=("skipped two-gpus (this machine has one GPU)")
fi

printf '\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
