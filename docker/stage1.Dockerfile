# syntax=docker/dockerfile:1
# Stage 1: eager attention under torch 2.6.0, CUDA 12.4, cuDNN 9.1.0.70, NCCL 2.21.5.
# docker/build.sh stage1 builds it. The base has no cuDNN of its own: torch's wheel brings the only one.
ARG BASE=nvidia/cuda:12.4.1-devel-ubuntu22.04@sha256:da6791294b0b04d7e65d87b7451d6f2390b4d36225ab0701ee7dfec5769829f5

FROM ${BASE} AS build
ARG PYTHON=3.11.18
ARG LOCK=docker/stage1.lock
ENV UV_PYTHON_INSTALL_DIR=/surefoot/python UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
COPY docker/system.sh /surefoot/docker/
RUN /surefoot/docker/system.sh build
COPY docker/stack.sh docker/uv.lock /surefoot/docker/
COPY ${LOCK} /surefoot/stack.lock
RUN --mount=type=cache,target=/root/.cache/uv /surefoot/docker/stack.sh

FROM ${BASE}
COPY docker/system.sh /surefoot/docker/
RUN /surefoot/docker/system.sh run && useradd --uid 1000 --home-dir /home/surefoot surefoot && install -d -m 1777 /home/surefoot /home/surefoot/.cache
COPY --from=build /surefoot /surefoot
COPY . /surefoot
RUN /surefoot/.venv/bin/python /surefoot/docker/sbom.py >/surefoot/sbom.cdx.json
# LD_LIBRARY_PATH: the driver's folder on Google's Kubernetes, and nothing that could shadow the wheel's libraries.
# USER: torch asks for a name, and --user gives a bare number.
ENV PATH=/surefoot/.venv/bin:${PATH} LD_LIBRARY_PATH=/usr/local/nvidia/lib64 HOME=/home/surefoot USER=surefoot
USER 1000:1000
WORKDIR /home/surefoot
ENTRYPOINT ["/surefoot/docker/entrypoint.sh"]
# last: each commit has another value, and nothing after it can come from the cache
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="surefoot stage 1" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}"
