#!/usr/bin/env bash
# build.sh stage1|stage2|stage3 [--push] [more options of docker build]: builds ${REPOSITORY:-surefoot}:stageN from this checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stage=${1:-}
case $stage in -h | --help) sed -n '2s/^# //p' docker/build.sh && exit ;; esac
if [ ! -f "docker/$stage.Dockerfile" ]; then
  echo "build.sh: '$stage' is no stage. Use stage1, stage2 or stage3" >&2
  exit 2
fi
shift
push=
if [ "${1:-}" = --push ]; then push=1 && shift; fi
command -v docker >/dev/null || { echo "build.sh: docker is not installed" >&2 && exit 2; }
image=${REPOSITORY:-surefoot}:$stage
commit=$(git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || echo unknown)
DOCKER_BUILDKIT=1 docker build --file "docker/$stage.Dockerfile" --tag "$image" --build-arg "COMMIT=$commit" "$@" .
[ -z "$push" ] || docker push "$image"
