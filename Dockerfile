# Counterpoint with all its extras, for CPUs and NVIDIA GPUs.
#
#     docker build -t counterpoint .
#     docker run --rm -v "$PWD:/work" counterpoint train simclr --data imagefolder:photos
#
# With GPUs: docker run --gpus all ...; the host needs the driver and the container toolkit.
# For CPUs alone, with an image that is gigabytes smaller: docker build --build-arg TORCH_INDEX=URL, the address of PyTorch's
# index of CPU wheels. The build takes the standard wheels otherwise, which hold CUDA's libraries.
FROM python:3.11-slim
ARG TORCH_INDEX=
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
RUN apt-get update && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml constraints.txt README.md LICENSE /src/
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --no-cache-dir --constraint /src/constraints.txt --index-url "$TORCH_INDEX" torch torchvision; fi
COPY src /src/src
RUN pip install --no-cache-dir --constraint /src/constraints.txt '/src[all]' \
    && pip install --no-cache-dir --constraint /src/constraints.txt --no-deps arcade qtawesome tinysoundfont pretty_midi
RUN useradd --uid 1000 --create-home counterpoint && mkdir /work && chown counterpoint /work
USER counterpoint
WORKDIR /work
ENTRYPOINT ["counterpoint"]
CMD ["--help"]
