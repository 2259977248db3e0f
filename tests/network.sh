#!/usr/bin/env bash
# network.sh up|down TAG: two hosts TAG1 (10.77.0.1) and TAG2 (10.77.0.2), each a network namespace on a bridge in a third one.
set -euo pipefail
tag=$2
if [ "$1" = down ]; then
  for name in "${tag}1" "${tag}2" "${tag}s"; do ip netns del "$name" || true; done
  exit 0
fi
ip netns add "${tag}s"
ip -n "${tag}s" link add br0 type bridge
ip -n "${tag}s" link set br0 up
for i in 1 2; do
  ip netns add "$tag$i"
  ip link add "$tag$i" netns "${tag}s" type veth peer name eth0 netns "$tag$i"
  ip -n "${tag}s" link set "$tag$i" master br0 up
  ip -n "$tag$i" addr add "10.77.0.$i/24" dev eth0
  ip -n "$tag$i" link set eth0 up
  ip -n "$tag$i" link set lo up
done
