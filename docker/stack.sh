#!/bin/sh
# stack.sh: CPython $PYTHON and the packages of /surefoot/stack.lock in /surefoot/.venv, each against its hash.
set -eu
cd /surefoot
python3 -m venv /uv
/uv/bin/pip install --no-cache-dir --require-hashes --requirement docker/uv.lock
/uv/bin/uv venv --python "$PYTHON" .venv
/uv/bin/uv pip sync --python .venv/bin/python --require-hashes stack.lock
