#!/usr/bin/env bash
# install.sh VENV LOCK: a virtual environment with the locked packages, Unsloth and this checkout, by uv where it is installed, else by pip.
set -euo pipefail

venv=${1:?the folder of the virtual environment}
lock=${2:?the lock file}
cd "$(dirname "$0")/.."
torch=$(sed -n 's/^torch==//p' "$lock")
torch_cpu_index=https://download.pytorch.org/whl/cpu # PyTorch's own index of CPU builds

if command -v uv >/dev/null; then
  [ -x "$venv/bin/python" ] || uv venv --quiet --seed "$venv"
  install=(uv pip install --quiet --python "$venv/bin/python")
else
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
  install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
fi

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

echo "installing into $venv (a few minutes the first time)"
if has_gpu; then
  "${install[@]}" "torch==$torch"
else
  # a CPU machine needs no gigabytes of CUDA: the CPU build from wherever the configured index has it
  "${install[@]}" "torch==$torch+cpu" 2>/dev/null || "${install[@]}" --index-url "$torch_cpu_index" "torch==$torch+cpu"
fi
"${install[@]}" --requirement "$lock"
"${install[@]}" --no-deps --requirement scripts/unsloth.lock
"${install[@]}" --no-deps --editable .
