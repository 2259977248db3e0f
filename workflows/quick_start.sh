#!/usr/bin/env bash
# quick_start.sh [--yes] [--folder=FOLDER]: from an empty checkout to a trained adapter that answers: install, sample rows, process, style,
# render, train, evaluate, ask. It asks for each choice; --yes takes the values in brackets.
set -euo pipefail
cd "$(dirname "$0")/.."

yes='' folder=.
for word in "$@"; do
  case $word in
    --yes) yes=1 ;;
    --folder=*) folder=${word#*=} ;; # where data and outputs go
    -h | --help)
      sed -n '2,3s/^# //p' "$0"
      exit 0
      ;;
    *)
      echo "quick_start.sh: $word is not a flag. There are --yes and --folder=FOLDER" >&2
      exit 2
      ;;
  esac
done

step() { printf '\n== %s\n' "$*"; }

# ask QUESTION DEFAULT: the answer, or DEFAULT with --yes and at the end of input
ask() {
  local answer=''
  if [ -z "$yes" ]; then read -r -p "$1 [$2] " answer || true; fi
  printf '%s' "${answer:-$2}"
}

for program in make python3; do
  command -v "$program" >/dev/null || { echo "quick_start.sh: $program is not installed" >&2 && exit 2; }
done

data=$folder/data run=$folder/outputs/quick-start
step "install"
make install

step "data: $data/raw"
mkdir -p "$data/raw"
if [ -z "$(find "$data/raw" -maxdepth 1 -type f)" ]; then
  cp examples/data/commonsense_train.jsonl "$data/raw/sample.jsonl"
  echo "no file there: copied the 600 shipped rows to $data/raw/sample.jsonl. Put your own rows beside or in place of it later"
else
  find "$data/raw" -maxdepth 1 -type f
fi

step "model"
echo "examples/small_model has 4M parameters and needs no GPU; a Hub id (Qwen/Qwen2.5-0.5B-Instruct) is downloaded"
model=$(ask "base model" examples/small_model)
style=$(ask "style of the answers" "Answer in one line.")
stage=$(ask "train on processed, processed_with_style or rendered" processed_with_style)
case $stage in processed | processed_with_style | rendered) ;; *)
  echo "quick_start.sh: $stage is none of processed, processed_with_style, rendered" >&2
  exit 2
  ;;
esac

words=(--no-print-directory "CONFIG=configs/quick_start.yaml" "DATA=$data" "MODEL=$model" "TRAIN_ON=$stage" "RUN=$run")
step "process, style, render"
make "${words[@]}" full-pipeline STYLE="$style"
step "train"
make "${words[@]}" train FLAGS="--output_dir=$run --overwrite"
step "evaluate"
make "${words[@]}" eval-quick
step "ask"
rm -f "$folder/outputs/quick-start-answers.jsonl"
make "${words[@]}" infer-batch INPUT="$data/$stage/test.jsonl" OUTPUT="$folder/outputs/quick-start-answers.jsonl"
head -n 3 "$folder/outputs/quick-start-answers.jsonl"

step "done"
cat <<END
adapter: $run (report: $run/report.html)
next:    make infer RUN=$run, make merge RUN=$run, make train-bnb with your own rows in data/raw
END
