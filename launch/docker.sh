#!/usr/bin/env bash
# docker.sh [--no_check] FLAGS OF finetune.py: one node in a container of the stage's image, with this folder as its working folder.
#   STAGE (1) or IMAGE (surefoot:stageN), GPUS (1; 0: none; under a cpu profile: processes), PROFILE, MOUNTS: more folders, parted by
#   colons, at their own paths, CACHE (~/.cache): model, verdict and row caches, SHM (16g), MEMLOCK (-1; empty: the engine's), NODES,
#   NODE_RANK, MASTER_ADDR, MASTER_PORT, GRACE_S (180): what `docker stop` leaves between its TERM and the kill.
# Variables named as in `passed` go in by name. Signals and the exit code pass through.
set -euo pipefail

fail() {
  echo "docker.sh: $1" >&2
  exit 2
}

stage=${STAGE:-1} gpus=${GPUS:-1} cache=${CACHE:-$HOME/.cache} grace_s=${GRACE_S:-180}
passed='^((NCCL|TORCH_NCCL|GLOO|PYTORCH|HF|WANDB|UNSLOTH)_.*|OMP_NUM_THREADS|SUREFOOT_STOP_FILE|NODES|NODE_RANK|MASTER_ADDR|MASTER_PORT'
passed+='|PROFILE|(https?|no)_proxy|(HTTPS?|NO)_PROXY)$'
[[ $stage =~ ^[123]$ ]] || fail "STAGE=$stage is no stage. Use 1, 2 or 3"
[[ $gpus =~ ^[0-9]+$ ]] || fail "GPUS=$gpus must be a number"
[[ $grace_s =~ ^[0-9]+$ ]] || fail "GRACE_S=$grace_s must be a number of seconds"
image=${IMAGE:-surefoot:stage$stage}
command -v docker >/dev/null || fail "docker is not installed"
answer=$(docker image inspect "$image" 2>&1 >/dev/null) || case $answer in
  *"o such "* | *"not known"*) fail "the image $image is not here. Use docker/build.sh stage$stage, or docker pull $image" ;;
  *) fail "docker does not answer: ${answer%%$'\n'*}" ;;
esac

run=(docker run --rm --init --stop-timeout "$grace_s" --network host --ipc private --shm-size "${SHM:-16g}")
run+=(--ulimit stack=67108864 --security-opt no-new-privileges --user "$(id -u):$(id -g)")
for group in $(id -G); do run+=(--group-add "$group"); done # a laboratory's shared folders belong to groups
[ -z "${MEMLOCK--1}" ] || run+=(--ulimit "memlock=${MEMLOCK--1}")
[ ! -d /dev/infiniband ] || run+=(--device /dev/infiniband)
if [[ $gpus -gt 0 && ${PROFILE:-} != cpu* ]]; then
  have=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  ((gpus <= have)) || fail "GPUS=$gpus but this machine has $have. Use GPUS=$have"
  devices=$(seq -s, 0 $((gpus - 1)))
  run+=(--gpus "\"device=${CUDA_VISIBLE_DEVICES:-$devices}\"")
fi
mkdir -p "$cache" "${HF_HOME:-$cache}"
[[ $PWD != *:* ]] || fail "$PWD cannot be mounted: its name has a colon. Start from another folder"
while IFS= read -r folder; do
  [ -n "$folder" ] || continue
  [[ $folder == /* ]] || fail "MOUNTS: $folder must be an absolute path"
  [ -e "$folder" ] || fail "MOUNTS: $folder does not exist"
  run+=(--volume "$folder:$folder")
done < <(printf '%s\n' "$PWD" "$cache" "${HF_HOME:-}" "${MOUNTS:-}" | tr : '\n' | awk '!seen[$0]++') # docker takes none twice
run+=(--workdir "$PWD" --env "XDG_CACHE_HOME=$cache" --env "HF_HOME=${HF_HOME:-$cache/huggingface}" --env "GPUS=$((gpus > 0 ? gpus : 1))")
for name in $(compgen -e | grep -E "$passed"); do
  [ "$name" = HF_HOME ] || run+=(--env "$name") # the name alone: the value stays out of the process list
done
exec "${run[@]}" "$image" "$@"
