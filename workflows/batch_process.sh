#!/usr/bin/env bash
# batch_process.sh [FILE]: processes and trains each data set under each run file of FILE (workflows/batch.yaml), goes on after a failure,
# and ends with one table of all runs. Exit code 0 when every run did what it should, else 1.
set -euo pipefail
cd "$(dirname "$0")/.."

file=${1:-workflows/batch.yaml}
case $file in -h | --help)
  sed -n '2,3s/^# //p' "$0"
  exit 0
  ;;
esac
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || { echo "batch_process.sh: $python is missing. Use make install, or PYTHON=..." >&2 && exit 2; }

# output_dir, style and flags, then a line for each pair: data set, its files, run file
read_list() {
  "$python" - "$file" <<'PYTHON'
import sys
from pathlib import Path

import yaml

path = sys.argv[1]
try:
    asked = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
except (OSError, yaml.YAMLError) as error:
    sys.exit(f"batch_process.sh: {path} cannot be read: {' '.join(str(error).split())}")
known = {"datasets", "configs", "style", "flags", "output_dir"}
if not isinstance(asked, dict) or set(asked) - known or not asked.get("datasets") or not asked.get("configs"):
    sys.exit(f"batch_process.sh: {path} must have datasets (name: file) and configs (a list), and may have style, flags and output_dir")
if len({Path(config).stem for config in asked["configs"]}) < len(asked["configs"]):
    sys.exit(f"batch_process.sh: {path}: two configs have one file name, which names their runs. Rename one")
print(asked.get("output_dir") or "outputs/batch", asked.get("style") or "", asked.get("flags") or "", sep="\n")
for name, files in asked["datasets"].items():
    for config in asked["configs"]:
        print(name, files, config, sep="\t")
PYTHON
}

list=$(read_list)
{ read -r output && read -r style && read -r flags; } <<<"$list"
read -r -a more <<<"$flags"
mkdir -p "$output"
results=() failed=0

# train_one FILES CONFIG DATA RUN: the exit code of the first step that fails
train_one() {
  local stage=$3/processed
  "$python" scripts/process_data.py --raw_path="$1" --out="$stage" --config="$2" || return
  if [ -n "$style" ]; then
    "$python" scripts/style_prompt.py --style="$style" --in="$stage" --out="$3/processed_with_style" || return
    stage=$3/processed_with_style
  fi
  "$python" finetune.py --config="$2" --data_path="$stage/train.jsonl" --val_data_path="$stage/val.jsonl" --output_dir="$4" --overwrite \
    "${more[@]}"
}

while IFS=$'\t' read -r name files config; do
  run=$output/$name-$(basename "$config" .yaml) began=$SECONDS
  log=$run.log code=0
  printf '\n== %s under %s (%s)\n' "$name" "$config" "$log"
  train_one "$files" "$config" "$output/$name" "$run" </dev/null >"$log" 2>&1 || code=$?
  tail -n 1 "$log"
  results+=("$name"$'\t'"$config"$'\t'"$code"$'\t'"$((SECONDS - began)) s"$'\t'"$run")
  [ "$code" -eq 0 ] || failed=$((failed + 1))
done < <(tail -n +4 <<<"$list")

row() { printf '%-20s %-32s %4s  %7s  %s\n' "$@"; }
printf '\n'
row 'data set' config exit time folder
for result in "${results[@]}"; do
  IFS=$'\t' read -r -a cells <<<"$result"
  row "${cells[@]}"
done
folders=()
for result in "${results[@]}"; do
  [ -f "${result##*$'\t'}/run.json" ] && folders+=("${result##*$'\t'}")
done
[ ${#folders[@]} -eq 0 ] || "$python" scripts/compare_runs.py "${folders[@]}" --out="$output/comparison.html"
printf '%s of %s runs failed\n' "$failed" "${#results[@]}"
[ "$failed" -eq 0 ]
