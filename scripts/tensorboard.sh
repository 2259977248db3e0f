#!/usr/bin/env bash
# tensorboard.sh start|stop PORT LOGDIR [PYTHON]: a TensorBoard in the background. stop ends the one that start began, and no other.
set -euo pipefail

action=${1:?start or stop} port=${2:?the port} logdir=${3:?the folder of the runs} python=${4:-python}
pid_file=$logdir/.tensorboard-$port.pid log=$logdir/.tensorboard-$port.log

answers() { (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; }
# the process of the pid file, if it still is that TensorBoard: a pid may have gone to another program
ours() {
  pid=$(cat "$pid_file" 2>/dev/null) && ps -ww -o args= -p "$pid" 2>/dev/null | grep -qF -- "tensorboard.main --logdir $logdir --port $port"
}

case $action in
  start)
    mkdir -p "$logdir"
    if ours; then
      echo "TensorBoard is at http://localhost:$port already (process $pid)"
      exit 0
    fi
    if answers; then
      echo "tensorboard.sh: port $port is taken by another program. Use TB_PORT=$((port + 1))" >&2
      exit 2
    fi
    nohup "$python" -m tensorboard.main --logdir "$logdir" --port "$port" >"$log" 2>&1 &
    pid=$!
    echo "$pid" >"$pid_file"
    for _ in $(seq 120); do
      if answers; then
        echo "TensorBoard: http://localhost:$port for $logdir (process $pid; make tb-stop ends it)"
        exit 0
      fi
      if ! kill -0 "$pid" 2>/dev/null; then break; fi
      sleep 0.5
    done
    kill "$pid" 2>/dev/null || true
    rm -f "$pid_file"
    echo "tensorboard.sh: TensorBoard did not start: $(tail -n 1 "$log")" >&2
    exit 5
    ;;
  stop)
    if ours; then
      kill "$pid"
      echo "ended TensorBoard at port $port (process $pid)"
    else
      echo "no TensorBoard of ours runs at port $port for $logdir"
    fi
    rm -f "$pid_file"
    ;;
  *)
    echo "tensorboard.sh: $action is neither start nor stop" >&2
    exit 2
    ;;
esac
