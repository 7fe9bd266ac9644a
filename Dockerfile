# An image with Preceptor and the pinned versions of constraints.txt.
#   docker build -t preceptor .                                        # for CPUs
#   docker build -t preceptor:cuda --build-arg TORCH=cu130 .           # for NVIDIA GPUs: docker run --gpus all ...
#   docker run --rm -v "$PWD:/work" preceptor train run.yaml
FROM python:3.12-slim-trixie

# Which build of torch: `cpu`, or the CUDA version of the driver, as uv names them (cu126, cu128, cu130).
ARG TORCH=cpu

# torch.compile and Triton call a C++ compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 preceptor

COPY constraints.txt pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --system --no-cache --torch-backend "$TORCH" -c /source/constraints.txt /source \
    && rm -rf /source

# Models and data sets of the Hub and rendered data go to the home folder: mount one to keep them.
USER 1000
WORKDIR /work
ENTRYPOINT ["preceptor"]
CMD ["--help"]
