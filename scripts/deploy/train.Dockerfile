# For training:  docker build -f scripts/deploy/train.Dockerfile -t alexnet-train:0.1.0 .
#   docker run --rm --gpus all --shm-size=8g -v /data/imagenet:/data:ro -v "$PWD/runs:/runs" alexnet-train:0.1.0 \
#     alexnet train --recipe imagenet-owt --data /data --out /runs
# torch and DALI bring their own CUDA libraries; the driver, 580 or newer, is the machine's.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# TensorRT for `alexnet export --format trt` comes from NVIDIA's own index: --build-arg EXTRAS=train,trt
ARG EXTRAS=train

# A compiler for what Inductor generates (fused LRN); tini passes signals on, so that a run stops and is saved.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE alexnet.py ./
COPY data_pipeline data_pipeline
COPY train train
COPY infer infer
RUN pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

# Ubuntu's image has a user of this number already. What is mounted at /runs must be writable for it.
RUN mkdir /runs && chown 1000:1000 /runs
USER 1000:1000
ENV HOME=/tmp
WORKDIR /runs
ENTRYPOINT ["tini", "--"]
CMD ["alexnet", "--help"]
