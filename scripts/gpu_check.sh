#!/usr/bin/env bash
# Checks what only a machine with an NVIDIA GPU can show. Each check has a limit in seconds, the most valuable come first:
#   bash scripts/gpu_check.sh --quick        under 5 minutes in all, after installing
#   bash scripts/gpu_check.sh                these, and the rest: 84 minutes at most
#   bash scripts/gpu_check.sh --only NAME    one of them; --list names all, with limits, and needs no GPU
#   bash scripts/gpu_check.sh --limit N …    no check may take more than N seconds
#   bash scripts/gpu_check.sh --installed …  with the python3 of PATH and what it has, where nothing can be installed
# A line for each check goes to gpu-check/summary.txt as it ends, its output to gpu-check/<check>.log. Exit code 1 if one
# failed or was cut off.
# shellcheck disable=SC2317,SC2329  # functions are called by name
set -uo pipefail
self=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$self")/.." || exit 1
out=gpu-check

# Part, limit in seconds, name. No engine of `tensorrt` has ever run: wherever it imports, one is built, gated, run and
# benched first. The limits of what has never run to its end, from gpu-tests to steps, are estimates.
CHECKS="
quick 25 train
quick 45 engine
quick 10 doctor
quick 130 gpu-tests
quick 50 fast
quick 40 step
rest 60 predictions
rest 300 demo
rest 60 precision-fp32
rest 60 precision-fp16
rest 120 export-fp32
rest 120 export-fp16
rest 120 export-int8
rest 240 engine-timing
rest 120 ray
rest 300 feed
rest 400 steps
rest 900 bench-train
rest 300 bench-infer
rest 300 bench-batch
rest 120 two-gpus
rest 300 bench-scaling
rest 900 all-tests
"

alexnet() { python -m alexnet "$@"; }
run_ranks() { python -m torch.distributed.run --standalone "--nproc_per_node=$1" "${@:2}"; }

# trained NAME OPTION…: a run on the GPU that must reach 90% top-1.
trained() {
  run_ranks 1 -m train.main --set device=cuda "${@:2}" | tee "$out/$1.json"
  python -c 'import json, sys; sys.exit(json.load(open(sys.argv[1]))["best"]["top1"] < 0.9)' "$out/$1.json"
}

# Four epochs in one precision: too few for a fast step, which is not tried.
train_in() { trained "precision-$1" --out "$out/runs" --set epochs=4 --set "precision=$1"; }
train() { train_in bf16; }
precision-fp32() { train_in fp32; }
precision-fp16() { train_in fp16; }
doctor() { alexnet doctor; }

# So many epochs that fast steps are proved; three that are no better end the run. Fails if one is wrong or cannot be captured,
# and not if the plain one is faster. Without Inductor, which takes half of the time.
fast() {
  rm -rf "$out/fast"
  trained fast --out "$out/fast" --set epochs=3000 --set stop_patience=3 --set precision=bf16 --set lrn=eager
  local code=$?
  cat "$out"/fast/*/step.json &&
    python -c 'import json, sys; found = json.load(open(sys.argv[1]))["verdicts"]
sys.exit(not found or any(verdict["against"] for verdict in found))' "$out"/fast/*/step.json && return "$code"
}

newest_run() {
  find "$out/runs" -mindepth 1 -maxdepth 1 2>/dev/null | sort | tail -n 1 | grep . ||
    echo "no run in $out/runs: --only train makes one"
}

# One precision: the engine runs here and passes the gate, and the doctor loads and runs everything.
exported() {
  local target="$out/export-$1"
  rm -rf "$target"
  alexnet export "$(newest_run)" --format onnx,trt --precision "$1" --out "$target" --json >"$target.json" &&
    alexnet doctor "$target/trt-$1" --json >"$target-doctor.json" || return 1
  python - "$target" <<'PYTHON'
import json, sys
made, doctor = (json.load(open(sys.argv[1] + end)) for end in (".json", "-doctor.json"))
print("gate:", json.dumps(made["trt"]["report"]))
print("here:", json.dumps(doctor["here"]), "predict would use", doctor["predict_would_use"])
assert made["trt"]["report"]["engine"], made["trt"]["report"]["engine_not_run"]
assert all(words.startswith("ok") for words in doctor["here"].values()), doctor["here"]
PYTHON
}

# The engine beside ONNX Runtime's CUDA provider.
bench_engine() {
  python - "$out/export-$1" "$1" <<'PYTHON'
import sys
from contextlib import ExitStack
from pathlib import Path
from infer.bench.cases import BundleCase

for format in ("trt", "onnx"):
    with ExitStack() as stack:
        folder = Path(sys.argv[1], f"{format}-{sys.argv[2]}")
        case = BundleCase(stack, folder, Path("data/demo-digits/val"), "cuda", 32)
        print(*(case.facts()[name] for name in ("provider", "device", "precision")))
        images_per_s = case.measure(20 * 32)
        for phase in ("model", "decode", "end_to_end"):
            print(f"{format} {phase}: {images_per_s[phase]:.0f} images/s")
PYTHON
}

# The engine that is built again from the ONNX file agrees with it.
export_and_rebuild() {
  exported "$1" && alexnet export "$out/export-$1/trt-$1" --format trt --data data/demo-digits --json >"$out/rebuilt.json" &&
    python -c 'import json, sys; r = json.load(open(sys.argv[1]))["rebuild"]; print(r); assert r["agreement"], r["unknown"]' \
      "$out/rebuilt.json"
}

engine() { exported fp16 && bench_engine fp16; }
export-fp32() { export_and_rebuild fp32; }
export-fp16() { export_and_rebuild fp16 && bench_engine fp16; }
export-int8() { export_and_rebuild int8 && bench_engine int8; }

# The tests that are skipped elsewhere, first those of the fast step and its kernels. A skip counts as a failure, unless the
# machine lacks what the reason names.
gpu-tests() {
  local first=(tests/train/graphs tests/train/compile tests/train/kernels tests/train/test_deterministic.py) code=0
  local pytest=(python -m pytest -m gpu --numprocesses 6 -v -rs --durations=5)
  "${pytest[@]}" "${first[@]}" | tee "$out/gpu-tests.txt" || code=1
  "${pytest[@]}" tests "${first[@]/#/--ignore=}" | tee -a "$out/gpu-tests.txt" || code=1
  [ "$code" -eq 0 ] && ! grep '^SKIPPED' "$out/gpu-tests.txt" | grep -vE 'tensorrt|engine|two GPUs|pip install'
}

# One image of each class, predicted by all that there is: the CPU and the GPU, and the engine and Ray where they are.
predict_by() {
  alexnet predict "$out/images" --model "$1" --format jsonl --output "$out/$2.jsonl" --overwrite "${@:3}"
}

# compare FILE FILE: rows of predictions or of training; the best classes must agree, and numbers to a thousandth.
compare() {
  python - "$@" <<'PYTHON'
import json, sys
def read(name):
    rows = [json.loads(line) for line in open(name)]
    best = [row["predictions"][0] for row in rows if "predictions" in row]
    losses = [row["loss"] for row in rows if row.get("split") == "train"]
    return [row["class_id"] for row in best], [row["probability"] for row in best] or losses

(classes, one), (others, two) = map(read, sys.argv[1:])
worst = max(abs(b / a - 1) for a, b in zip(one, two, strict=True))
print(f"{len(one)} rows, largest relative difference {worst:.1e}")
sys.exit("the best classes differ" if classes != others else worst > 1e-3)
PYTHON
}

prepare_predictions() {
  bundle="$out/predictions/onnx-fp32"
  [ -e "$bundle" ] || alexnet export "$(newest_run)" --format onnx --precision fp32 --out "$bundle" || return 1
  rm -rf "$out/images" && mkdir "$out/images"
  for class in data/demo-digits/val/*/; do
    cp "$(find "$class" -name '*.jpg' | sort | head -n 1)" "$out/images/$(basename "$class").jpg"
  done
  predict_by "$bundle" cpu --device cpu
}

predictions() { prepare_predictions && predict_by "$bundle" cuda --device cuda && compare "$out"/{cpu,cuda}.jsonl; }

ray() {
  prepare_predictions && rm -rf "$out/ray" &&
    alexnet predict "$out/images" --model "$bundle" --engine ray --device cuda --format jsonl --output "$out/ray" &&
    cat "$out"/ray/part-*.jsonl >"$out/ray.jsonl" && compare "$out"/{cpu,ray}.jsonl
}

# The ratios of docs/training-speed.md, each group as it ends; bench-train has all of torchvision's ways at both batches.
step() { bench_step 128 owt torchvision_bf16 torchvision_graphs; }
steps() {
  bench_step 128 bn bn_no_norm && bench_step 128 paper paper_no_lrn && bench_step 128 owt owt_plain owt_deterministic &&
    bench_step 1024 owt torchvision_bf16 torchvision_compiled
}
# bench_step BATCH SUBJECT…: figures, which step ran and why, and the ratios.
bench_step() {
  local subjects=("${@:2}")
  alexnet bench train --device cuda --rounds 2 --batch "$1" "${subjects[@]/#/--only=}" | grep -v "not measured"
}

# TensorRT's timing cache shortens the second build; Triton's repository has the engine.
engine-timing() {
  rm -rf "$out/timed" "$out/triton" "$out/timings"
  for _ in 1 2; do
    alexnet export "$(newest_run)" --format trt --builder-level 5 --timing-cache "$out/timings" --out "$out/timed" ||
      return 1
  done
  alexnet export "$out/timed" --triton "$out/triton" && cat "$out"/triton/*/config.pbtxt
}

# Images/s with decoding on the GPU, beside DALI's own reader. Good files leave no line of a library's.
feed() {
  local only=(dali_gpu dali_gpu_64 dali_gpu_shards dali_gpu_reader dali_gpu_deterministic cached_gpu)
  alexnet bench data --json --rounds 3 "${only[@]/#/--only=}" 2>"$out/feed.err"
  local code=$?
  cat "$out/feed.err"
  [ "$code" -eq 0 ] && ! grep -iE 'nvjpeg|nvimagecodec|\[(warning|error)\]|^traceback|its process ended' "$out/feed.err"
}

demo() { make demo; }
all-tests() { python -m pytest; }
bench-train() { alexnet bench train --json --rounds 3 --images 512; }
bench-infer() { alexnet bench infer --json --device cuda --precision fp32 --precision fp16 --batch 1 --batch 32 --rounds 3; }
bench-batch() { alexnet bench batch --to 4096 --plot "$out/bench-batch.png"; }
bench-scaling() { alexnet bench scaling --json --ranks 1 --ranks 2 --batch 128 --steps 20; }

# One GPU and two must see the same stream and have the same losses.
two-gpus() {
  for n in 1 2; do
    rm -rf "$out/ranks-$n"
    run_ranks "$n" -m train.main --out "$out/ranks-$n" --set device=cuda \
      --set epochs=1 --set precision=fp32 --set model.dropout=0.0 --set log_every=1 \
      --set schedule.learning_rate=0.0005 --set schedule.kind=constant --set schedule.warmup_epochs=0 || return 1
  done
  compare "$out"/ranks-{1,2}/*/metrics.jsonl
}

# why_not NAME: what this machine lacks for a check; nothing if it lacks nothing.
why_not() {
  case $1 in
    engine | engine-timing | export-*) python -c 'import tensorrt' 2>/dev/null || echo "tensorrt is not installed" ;;
    ray) python -c 'import ray' 2>/dev/null || echo "Ray is not installed" ;;
    two-gpus | bench-scaling) [ "$(nvidia-smi -L | wc -l)" -ge 2 ] || echo "this machine has one GPU" ;;
    demo) [ -z "${INSTALLED:-}" ] || echo "it installs" ;;
  esac
}

# check LIMIT NAME: runs a check in a process of its own, which ends at the limit, and notes how it ended.
check() {
  local limit=$(($1 < most ? $1 : most)) name=$2 started=$SECONDS code reason line
  reason=$(why_not "$name")
  if [ -n "$reason" ]; then
    echo "skipped $name ($reason)" | tee -a "$out/summary.txt"
    return
  fi
  timeout --kill-after=5 "$limit" bash "$self" --run "$name" >"$out/$name.log" 2>&1
  code=$?
  case $code in
    0) line="ok      $name ($((SECONDS - started)) s)" ;;
    124 | 137) line="CUT OFF $name (after $limit s, see $out/$name.log)" ;;
    *) line="FAILED  $name (exit code $code after $((SECONDS - started)) s, see $out/$name.log)" ;;
  esac
  tail -n 12 "$out/$name.log"
  echo "$line" | tee -a "$out/summary.txt"
  [ "$code" -eq 0 ] || failed=1
}

parts="quick rest" wanted="" action=run most=3600
while [ $# -gt 0 ]; do
  case $1 in
    --quick) parts=quick ;;
    --list) action=list ;;
    --installed) export INSTALLED=1 ;;
    --limit)
      most=${2:-0}
      shift
      ;;
    --only | --run)
      [ "$1" = --only ] || action=function
      wanted=${2:-}
      shift
      if ! grep -q " $wanted\$" <<<"$CHECKS"; then
        echo "error: no check $wanted; --list names them" >&2
        exit 2
      fi
      ;;
    *)
      sed -n '2,9s/^# \?//p' "$self" >&2
      exit 2
      ;;
  esac
  shift
done

[ -z "${INSTALLED:-}" ] || python() { python3 "$@"; }
if [ "$action" = function ]; then
  "$wanted"
  exit
fi

selected=$(while read -r part limit name; do
  [[ -n $name && " $parts " == *" $part "* && (-z $wanted || $wanted == "$name") ]] && echo "$part $limit $name"
done <<<"$CHECKS")
[ "$action" = list ] && echo "$selected" && exit

if ! nvidia-smi -L; then
  echo "error: no NVIDIA GPU here (nvidia-smi finds none); there is nothing to check" >&2
  exit 2
fi
if [ -z "${INSTALLED:-}" ]; then
  make install || exit 1
  export PATH="$PWD/.venv/bin:$PATH"
fi
mkdir -p "$out"
failed=0
while read -r _ limit name; do check "$limit" "$name" </dev/null; done <<<"$selected"
exit "$failed"
