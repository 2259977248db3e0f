#!/usr/bin/env bash
# slurm_cluster.sh start FOLDER PORT | stop FOLDER: munge, slurmctld and one slurmd on this machine, with two GPUs made of null devices.
set -euo pipefail
folder=$2 host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf
if [ "$1" = stop ]; then
  for name in slurmd slurmctld munged; do
    if [ -f "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")" || true; fi
  done
  exit 0
fi
port=$3
mkdir -p "$folder"/{state,spool,dev}
install -d -m 0700 "$folder/munge" # munged refuses a folder that others can write to
head -c 128 /dev/urandom >"$folder/munge/munge.key"
chmod 400 "$folder/munge/munge.key"
for gpu in 0 1; do mknod "$folder/dev/gpu$gpu" c 1 3; done
echo "NodeName=n1 Name=gpu File=$folder/dev/gpu[0-1]" >"$folder/gres.conf"
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,batch_sched_delay=0,sched_min_interval=0
GresTypes=gpu
JobRequeue=1
ReturnToService=2
MpiDefault=none
KillWait=3
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=64 RealMemory=500000 Gres=gpu:2 State=UNKNOWN
PartitionName=p Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
munged --force --key-file="$folder/munge/munge.key" --socket="$folder/munge.sock" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munge/munged.log" --seed-file="$folder/munge/seed" --num-threads=2
slurmctld -c -f "$SLURM_CONF"
slurmd -N n1 -f "$SLURM_CONF"
for _ in $(seq 150); do
  [ "$(sinfo -h -t idle -o %D 2>/dev/null)" != 1 ] || exit 0
  sleep 0.1
done
sinfo -R
exit 1
