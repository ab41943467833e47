# SGM with its demo, in a container (docs/docker.md):
#   docker build -t sgm .                              torch for processors
#   docker build -t sgm --build-arg TORCH=cu130 .      torch for NVIDIA GPUs; its wheel holds CUDA
# BASE is any Debian or Ubuntu with Python 3.11 to 3.13, or for which apt has one. A torch that it holds stays if its version fits.
ARG BASE=python:3.12-slim
FROM ${BASE}

# PyTorch's name for the kind of build: cpu, cu126, cu130
ARG TORCH=cpu
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/${TORCH}

# Nothing here is compiled. On a GPU, Triton compiles a small launcher at the first step.
# hadolint ignore=DL3008,SC2046
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends make \
    $(python3 -c "import ensurepip" 2>/dev/null || echo python3-venv python3-dev) \
    $(test "${TORCH}" = cpu || echo gcc libc6-dev) \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /sgm
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --system-site-packages .venv \
 && make .venv/installed

# Any user may write here: `docker run --user "$(id -u):$(id -g)"` leaves files that belong to the caller.
RUN mkdir -p output /cache && chmod 1777 output /cache
ENV PATH=/sgm/.venv/bin:${PATH} HOME=/cache USER=sgm NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
CMD ["make", "demo"]
