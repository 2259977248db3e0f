#!/bin/sh
# system.sh build|run: the packages of the distribution that building, or running, an image needs.
set -eu
export DEBIAN_FRONTEND=noninteractive
case $1 in
  build) set -- ca-certificates python3 python3-venv ;;
  # a C compiler: Triton and torch.compile build their launchers at run time
  run) set -- ca-certificates gcc g++ libc6-dev ;;
esac
apt-get update
apt-get install -y --no-install-recommends "$@"
rm -rf /var/lib/apt/lists/*
