#!/usr/bin/env bash
# entrypoint.sh [--no_check] FLAGS OF finetune.py | SCRIPT.py ARGUMENTS: what the images start. First the stack that torch really loads is
# held against the image's lock (exit 5 where they differ), then launch/node.sh starts finetune.py, or python the named script.
set -euo pipefail
unset PYTHON PYTHONPATH # apptainer and pyxis bring the host's
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ "${1:-}" = --no_check ]; then
  shift
else
  trap 'exit 75' TERM INT # nothing was begun; as process 1 it would not hear of them
  PYTHONPATH=$home python -m surefoot.doctor.pinned "$home/stack.lock"
fi
case ${1:-} in
  *.py)
    [ -f "$1" ] || set -- "$home/$1" "${@:2}"
    exec python "$@"
    ;;
  *) exec "$home/launch/node.sh" "$@" ;;
esac
