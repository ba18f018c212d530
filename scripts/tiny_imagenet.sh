#!/usr/bin/env bash
# Everything that the project claims about Tiny ImageNet, on one GPU, in under 20 minutes:
#
#   bash scripts/tiny_imagenet.sh [--data DIR] [--out DIR] [--only STEP]... [--list] [-- TRAINING OPTIONS]
#
#   --data DIR    Tiny ImageNet as distributed, or shards of it; downloaded to data/tiny-imagenet where it is missing
#   --out DIR     runs, exports and results.jsonl; default: tiny
#   --only STEP   this step alone; repeatable, in the order of the list
#   --list        print the steps, with the seconds that each may take, and end
#
# A training that was cut off continues when its step is run again, and ends at once where it had ended; the other steps
# measure again. Each step adds a line to results.jsonl: when, on what, at which commit, how long it took, how it ended,
# and the JSON that it printed. Options behind -- go to each training, such as `--set epochs=2` for a try.
# shellcheck disable=SC2329  # functions are called by name, through take
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

steps=(post best ten-crop export int8 gate speed speedrun)
declare -A bounds=([post]=420 [best]=360 [ten-crop]=60 [export]=90 [int8]=60 [gate]=60 [speed]=60 [speedrun]=90)
data=data/tiny-imagenet out=tiny only=() training=()
while [ $# -gt 0 ]; do
  case $1 in
    --data | --out | --only)
      [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      case $1 in
        --data) data=$2 ;;
        --out) out=$2 ;;
        --only)
          [ -n "${bounds[$2]:-}" ] || { echo "error: no step $2; the steps are ${steps[*]}" >&2; exit 2; }
          only+=("$2")
          ;;
      esac
      shift 2
      ;;
    --list)
      for step in "${steps[@]}"; do printf '%-9s %4d s\n' "$step" "${bounds[$step]}"; done
      exit 0
      ;;
    --) shift; training=("$@"); break ;;
    *) echo "error: unknown option $1; the head of ${BASH_SOURCE[0]} names all" >&2; exit 2 ;;
  esac
done
[ -d .venv ] && PATH="$PWD/.venv/bin:$PATH"
[ -d "$data" ] || alexnet data download tiny-imagenet --out "$data" || exit 1
mkdir -p "$out"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$gpu" ] || echo "No NVIDIA GPU here: all of it runs on the CPU, and the bounds are too short for that." >&2

# within COMMAND...: runs it in what is left of its step's time.
within() {
  local left=$((deadline - SECONDS))
  [ "$left" -gt 0 ] || return 124
  timeout --kill-after=40 "$left" "$@"
}
run_recipe() { # NAME FOLDER OPTIONS...
  within torchrun --standalone --nproc_per_node=1 -m train.main --recipe "$1" --data "$data" --out "$out/$2" \
    --resume auto "${@:3}" "${training[@]}"
}
newest() { # FOLDER: its run
  find "$out/$1" -mindepth 1 -maxdepth 1 -type d -name 'tiny-imagenet*' 2>/dev/null | sort | tail -n 1
}
# The last epoch's checkpoint, not the one that is best on these very images.
last() { # FOLDER
  find "$(newest "$1")/checkpoints" -mindepth 1 -maxdepth 1 -type d -name 'step-*' | sort | tail -n 1
}

# The ONNX bundle of an export, which lies in a folder of its own where there is an engine, too.
bundle() { # PRECISION
  find "$out/export-$1" -name bundle.json -printf '%h\n' | sort | head -n 1
}

# The post's recipe: 31.75/58.76 is the result to reach.
step_post() { run_recipe tiny-imagenet post; }

step_best() { run_recipe tiny-imagenet-best best; }

step_ten-crop() {
  for run in post best; do
    within alexnet evaluate "$(last "$run")" --data "$data" --ten-crop --json || return
  done
}

# ONNX in two precisions, each compared with its checkpoint; an engine wherever TensorRT can be imported.
step_export() {
  local formats=onnx
  python -c 'import tensorrt' 2>/dev/null && formats=onnx,trt
  for precision in fp32 fp16; do export_as "$precision" "$formats" || return; done
}
export_as() { # PRECISION FORMATS
  rm -rf "$out/export-$1"
  within alexnet export "$(last best)" --data "$data" --format "$2" --precision "$1" --out "$out/export-$1" --json
}

# int8 by itself: the gate refuses it where the norms behind ReLU leave too different ranges.
step_int8() { export_as int8 onnx; }

# Accuracy of what was exported, over all 10,000 images.
step_gate() {
  for precision in fp32 fp16; do
    within alexnet evaluate "$(bundle "$precision")" --data "$data" --json || return
  done
}

# Images/s of training from the decoded cache, as the runs had it, and seconds to predict the validation images.
step_speed() {
  local rows="$out/rows.jsonl" started
  python - "$(newest post)" "$(newest best)" <<'PYTHON' || return
import json, pathlib, statistics, sys

for run in sys.argv[1:]:
    rows = [json.loads(line) for line in pathlib.Path(run, "metrics.jsonl").open()]
    speeds = [row["images_per_s"] for row in rows if row["split"] == "train"]
    print(json.dumps({"run": pathlib.Path(run).name, "training_images_per_s": round(statistics.median(speeds))}))
PYTHON
  started=$(date +%s.%N)
  within alexnet predict "$data/val" --model "$(bundle fp32)" --output "$rows" --overwrite || return
  python -c 'import json, sys, time
rows = sum(1 for _ in open(sys.argv[1]))
print(json.dumps({"predicted": rows, "seconds": round(time.time() - float(sys.argv[2]), 1)}))' "$rows" "$started"
}

# Seconds from the start of the command to 40 and to 50% of the validation images: docs/speedrun.md.
step_speedrun() {
  local started folder
  folder="speedrun-$(date -u +%Y%m%dT%H%M%SZ)" started=$(date +%s.%N)
  run_recipe tiny-imagenet-best "$folder" --set epochs=16 --set label_smoothing=0 --set augment.erase=0 || return
  python - "$(newest "$folder")" "$started" <<'PYTHON'
import json, pathlib, sys

rows = [json.loads(line) for line in pathlib.Path(sys.argv[1], "metrics.jsonl").open()]
val = [row for row in rows if row["split"] == "val"]
found = {}
for mark in (0.4, 0.5):
    times = [row["time"] - float(sys.argv[2]) for row in val if row["top1"] >= mark]
    found[f"seconds_to_{mark:.0%}"] = round(times[0], 1) if times else None
print(json.dumps({**found, "epochs": len(val), "top1": val[-1]["top1"]}))
PYTHON
}

# take STEP: runs it, and adds its line to results.jsonl.
take() {
  local started=$SECONDS code
  deadline=$((SECONDS + bounds[$1]))
  echo "--- $1, at most ${bounds[$1]} s" >&2
  "step_$1" | tee "$out/$1.out"
  code=${PIPESTATUS[0]}
  python - "$out" "$1" "$code" $((SECONDS - started)) "${gpu:-CPU}" <<'PYTHON'
import datetime, json, pathlib, subprocess, sys

out, step, code, seconds, device = sys.argv[1:]
text, found, decoder = pathlib.Path(out, f"{step}.out").read_text(), [], json.JSONDecoder()
while (start := text.find("{")) >= 0:  # the tables of the classes are in the printed text, not in the row
    try:
        value, end = decoder.raw_decode(text[start:])
    except json.JSONDecodeError:
        break
    found.append({key: item for key, item in value.items() if not isinstance(item, list)})
    text = text[start + end:]
commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
ended = {"0": "ok", "124": "cut off by the step's bound", "137": "killed at the step's bound"}.get(code, f"exit code {code}")
row = {"step": step, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
       "commit": commit or None, "device": device, "seconds": int(seconds), "ended": ended,
       "printed": found}
with pathlib.Path(out, "results.jsonl").open("a") as file:
    file.write(json.dumps(row) + "\n")
print(f"{step}: {ended}, {seconds} s", file=sys.stderr)
PYTHON
  return "$code"
}

failed=0
for step in "${steps[@]}"; do
  if [ ${#only[@]} -eq 0 ] || [[ " ${only[*]} " == *" $step "* ]]; then take "$step" || failed=1; fi
done
exit "$failed"
