#!/usr/bin/env bash
# docker.sh [--no_check] FLAGS OF finetune.py: one node in a container of the stage's image, with this folder as its working folder.
#   STAGE (1) or IMAGE (surefoot:stageN), GPUS (1; 0: none; under a cpu profile: processes), PROFILE, MOUNTS: more folders, one a line, at their own paths,
#   CACHE (~/.cache): model, verdict and row caches, SHM (16g), MEMLOCK (-1; empty: the engine's), NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
# NCCL_*, HF_* and WANDB_* variables go in by name. Signals and the exit code pass through.
set -euo pipefail

fail() {
  echo "docker.sh: $1" >&2
  exit 2
}

stage=${STAGE:-1} gpus=${GPUS:-1} cache=${CACHE:-$HOME/.cache}
[[ $stage =~ ^[123]$ ]] || fail "STAGE=$stage is no stage. Use 1, 2 or 3"
[[ $gpus =~ ^[0-9]+$ ]] || fail "GPUS=$gpus must be a number"
image=${IMAGE:-surefoot:stage$stage}
command -v docker >/dev/null || fail "docker is not installed"
docker image inspect "$image" >/dev/null 2>&1 || fail "the image $image is not here. Use docker/build.sh stage$stage, or docker pull $image"

run=(docker run --rm --network host --ipc private --shm-size "${SHM:-16g}" --ulimit stack=67108864 --user "$(id -u):$(id -g)")
[ -z "${MEMLOCK--1}" ] || run+=(--ulimit "memlock=${MEMLOCK--1}")
if [[ $gpus -gt 0 && ${PROFILE:-} != cpu* ]]; then
  have=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  ((gpus <= have)) || fail "GPUS=$gpus but this machine has $have"
  devices=$(seq -s, 0 $((gpus - 1)))
  run+=(--gpus "\"device=${CUDA_VISIBLE_DEVICES:-$devices}\"")
fi
mkdir -p "$cache"
while IFS= read -r folder; do
  [ -n "$folder" ] || continue
  [[ $folder == /* && $folder != *:* ]] || fail "MOUNTS: $folder must be an absolute path without a colon"
  [ -e "$folder" ] || fail "MOUNTS: $folder does not exist"
  run+=(--volume "$folder:$folder")
done <<<"$PWD"$'\n'"$cache"$'\n'"${MOUNTS:-}"
run+=(--workdir "$PWD" --env "XDG_CACHE_HOME=$cache" --env "HF_HOME=${HF_HOME:-$cache/huggingface}" --env "GPUS=$((gpus > 0 ? gpus : 1))")
for name in $(compgen -e | grep -E '^(NCCL_|HF_|WANDB_|SUREFOOT_STOP_FILE$|(NODES|NODE_RANK|MASTER_ADDR|MASTER_PORT|PROFILE)$)'); do
  [ "$name" = HF_HOME ] || run+=(--env "$name") # the name alone: the value stays out of the process list
done
exec "${run[@]}" "$image" "$@"
