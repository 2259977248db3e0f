#!/bin/sh
# flash_attn.sh source|none: flash-attn from its hashed source, with the base's nvcc and the torch just installed (an hour on 16 cores).
# Its own wheels are not taken: setup.py fetches them without a hash, and some were built for another ABI (Dao-AILab/flash-attention#1783).
set -eu
case ${1:-} in
  source) ;;
  none) exit 0 ;;
  *) echo "flash_attn.sh: '${1:-}' is neither source nor none" >&2 && exit 2 ;;
esac
cd /surefoot
export FLASH_ATTENTION_FORCE_BUILD=TRUE
/uv/bin/uv pip install --python .venv/bin/python --no-build-isolation --no-deps --require-hashes --requirement docker/flash_attn.lock
.venv/bin/python -c 'import torch, flash_attn_2_cuda' # a wrong ABI shows here and not in a queue
