#!/bin/sh
# system.sh build|run: the packages of the distribution that building, or running, an image needs.
set -eu
export DEBIAN_FRONTEND=noninteractive
case ${1:-} in
  -h | --help) sed -n '2s/^# //p' "$0" && exit ;;
  build) set -- ca-certificates python3 python3-venv ;;
  # a C compiler: Triton and torch.compile build their launchers at run time; libibverbs: without it NCCL goes over Ethernet, and says so
  # only under NCCL_DEBUG=INFO (the bases have none: NVIDIA/nvidia-container-toolkit#1877)
  run) set -- ca-certificates gcc g++ libc6-dev libibverbs1 ibverbs-providers ;;
  *) echo "system.sh: '${1:-}' is neither build nor run" >&2 && exit 2 ;;
esac
apt-get update
apt-get install -y --no-install-recommends "$@"
rm -rf /var/lib/apt/lists/*
