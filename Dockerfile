# Counterpoint with all its extras. For NVIDIA GPUs: docker build --build-arg VARIANT=cuda .
#
#     docker run --rm -v "$PWD:/work" counterpoint train simclr --data imagefolder:photos
ARG VARIANT=cpu

FROM python:3.11-slim AS cpu
# PyTorch's CPU wheels come from an index of PyTorch's own; where it is not reachable, the build takes the standard wheel.
ARG TORCH_INDEX=
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX" torch torchvision; fi

FROM python:3.11-slim AS cuda
# The standard wheels of PyTorch for Linux hold CUDA's libraries; the host needs the driver and the container toolkit.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video

FROM ${VARIANT}
RUN apt-get update && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY src /src/src
RUN pip install --no-cache-dir --constraint /src/constraints.txt '/src[all]' \
    && pip install --no-cache-dir --constraint /src/constraints.txt --no-deps arcade qtawesome tinysoundfont pretty_midi
RUN useradd --uid 1000 --create-home counterpoint && mkdir /work && chown counterpoint /work
USER counterpoint
WORKDIR /work
ENTRYPOINT ["counterpoint"]
CMD ["--help"]
