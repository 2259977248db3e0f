# syntax=docker/dockerfile:1
# Stage 3: compiled layers under torch 2.11.0, CUDA 13.0, cuDNN 9.19.0.56, NCCL 2.28.9; sdpa, as no flash-attn 2 wheel is made for it.
# docker/build.sh stage3 builds it. The base has no cuDNN of its own: torch's wheel brings the only one.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu22.04@sha256:1c517d4fb96528c8999e14e6e6b16d7e2ff9ae8d194fd788d60fdc88e693e982

FROM ${BASE} AS build
ARG PYTHON=3.11.18
ARG LOCK=docker/stage3.lock
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
LABEL org.opencontainers.image.title="surefoot stage 3" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}"
