#!/usr/bin/env bash
# lock.sh [FOLDER]: writes *.lock into FOLDER (docker), every package with its hashes, for Linux x86-64 and CPython 3.11. Only
# metadata is downloaded. Needs uv.
set -euo pipefail
case ${1:-} in
  -h | --help) sed -n '2,3s/^# //p' "$0" && exit ;;
  -*) echo "lock.sh: $1 is no option, and none is known. Use lock.sh [FOLDER]" >&2 && exit 2 ;;
esac
[ $# -le 1 ] || { echo "lock.sh: $# words, and it takes one folder" >&2 && exit 2; }
[ -d "${1:-.}" ] || { echo "lock.sh: $1 is no folder" >&2 && exit 2; }
command -v uv >/dev/null || { echo "lock.sh: uv is not installed: pip install -r docker/uv.in" >&2 && exit 2; }
folder=$(realpath "${1:-$(dirname "$0")}")
cd "$(dirname "$0")/.."
as_of=${AS_OF:-2026-11-21T00:00:00Z} # what the index had by then; with the same date the locks come out the same

lock() { # NAME REQUIREMENTS...
  local name=$1
  shift
  uv pip compile --quiet --generate-hashes --no-config --no-annotate --exclude-newer "$as_of" --override docker/override.txt \
    --python-version 3.11 --python-platform x86_64-manylinux_2_35 --custom-compile-command docker/lock.sh \
    --output-file "$folder/$name.lock" "$@"
}

for stage in 1 2 3; do
  lock "stage$stage" setup.cfg --extra gpu --extra unsloth "docker/stage$stage.in"
done
lock uv docker/uv.in
lock flash_attn --no-deps docker/flash_attn.in
