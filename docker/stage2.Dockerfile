# syntax=docker/dockerfile:1
# Stage 2: fused attention under torch 2.8.0, CUDA 12.8, cuDNN 9.10.2.21, NCCL 2.27.3, flash-attn 2.8.3.
# docker/build.sh stage2 builds it. The base has no cuDNN of its own: torch's wheel brings the only one.
ARG BASE=nvidia/cuda:12.8.1-devel-ubuntu22.04@sha256:a99a1860ba8e2916e5c3e73b72ec4c4301653a84586e05bfc9a2aa2d58027e97

FROM ${BASE} AS build
ARG PYTHON=3.11.18
ARG LOCK=docker/stage2.lock
ENV UV_PYTHON_INSTALL_DIR=/surefoot/python UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
COPY docker/system.sh /surefoot/docker/
RUN /surefoot/docker/system.sh build
COPY docker/stack.sh docker/uv.lock /surefoot/docker/
COPY ${LOCK} /surefoot/stack.lock
RUN --mount=type=cache,target=/root/.cache/uv /surefoot/docker/stack.sh
ARG FLASH_ATTN=source
COPY docker/flash_attn.sh docker/flash_attn.lock /surefoot/docker/
RUN --mount=type=cache,target=/root/.cache/uv /surefoot/docker/flash_attn.sh "${FLASH_ATTN}"

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
LABEL org.opencontainers.image.title="surefoot stage 2" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}"
