#!/usr/bin/env bash
# node.sh FLAGS OF finetune.py: starts this node's processes. Every launcher ends here and only fills in
#   NODES (1), NODE_RANK (0), GPUS of this node (1), MASTER_ADDR and MASTER_PORT of node 0 (29500), PROFILE (profiles/NAME.yaml),
#   SUREFOOT_STOP_FILE: once it exists the run saves a checkpoint and ends with 75, PYTHON (python).
# A first TERM, INT or USR1 asks for that too, a second one ends the run at once. Ends with the exit code of finetune.py.
set -euo pipefail

fail() {
  echo "node.sh: $1" >&2
  exit 2
}

number() { # NAME VALUE LOWEST
  [[ $2 =~ ^[0-9]+$ && $2 -ge $3 ]] || fail "$1=$2 must be a number from $3 on"
}

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
nodes=${NODES:-1} rank=${NODE_RANK:-0} gpus=${GPUS:-1} port=${MASTER_PORT:-29500} python=${PYTHON:-python}
number NODES "$nodes" 1
number NODE_RANK "$rank" 0
number GPUS "$gpus" 1
number MASTER_PORT "$port" 1
((rank < nodes)) || fail "NODE_RANK=$rank is not below NODES=$nodes"
((nodes == 1)) || [ -n "${MASTER_ADDR:-}" ] || fail "NODES=$nodes needs MASTER_ADDR, the address of node 0"
profile=${PROFILE:-$( ((nodes * gpus == 1)) && echo single || echo ddp)}
[ -f "$home/profiles/$profile.yaml" ] ||
  fail "PROFILE=$profile is none of $(cd "$home/profiles" && printf '%s ' *.yaml | sed 's/\.yaml//g')"
if [[ $profile != cpu* && $gpus -gt 1 ]]; then
  have=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  [ -z "${CUDA_VISIBLE_DEVICES:-}" ] || have=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
  ((gpus <= have)) || fail "GPUS=$gpus but this node has $have. Use GPUS=$((have > 0 ? have : 1)), or a cpu profile"
fi

command=("$python")
if [ "$profile" = single ]; then
  command+=("$home/finetune.py")
else
  command+=(-m surefoot.launcher --config_file "$home/profiles/$profile.yaml" --num_processes $((nodes * gpus)))
  command+=(--num_machines "$nodes" --machine_rank "$rank" --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "$port")
  command+=("$home/finetune.py")
fi
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}

signals=0
# torchrun takes TERM and INT for itself in some versions, USR1 in none
trap 'signals=$((signals + 1)); kill -USR1 "$launcher" 2>/dev/null || true' TERM INT USR1
"${command[@]}" "$@" &
launcher=$!
until
  seen=$signals
  wait "$launcher" && code=0 || code=$?
  ((seen == signals)) # else a signal ended `wait` early
do :; done
((signals == 0 || code <= 128)) || code=75 # it was ended before it could say so: nothing was begun, or a second signal came
exit "$code"
