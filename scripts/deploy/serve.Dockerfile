# For prediction, without torch and without the trainer:  docker build -f scripts/deploy/serve.Dockerfile -t alexnet-serve:0.1.0 .
#   docker run --rm --read-only -v "$PWD/bundle:/bundle:ro" -v "$PWD/images:/images:ro" alexnet-serve:0.1.0 \
#     /images --format jsonl
# On a GPU, with ONNX Runtime's CUDA libraries inside (--gpus all, driver 580 or newer): --build-arg EXTRAS=cuda
FROM python:3.12-slim

# Extras of pyproject.toml on top of the base dependencies, separated by spaces.
ARG EXTRAS=""

WORKDIR /app
COPY pyproject.toml constraints.txt scripts/deploy/list_dependencies.py ./
RUN python list_dependencies.py ${EXTRAS} > requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt

COPY alexnet.py ./
COPY data_pipeline data_pipeline
COPY infer infer
RUN python -m compileall -q alexnet.py data_pipeline infer

ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 1000:1000
WORKDIR /images
ENTRYPOINT ["python", "-m", "alexnet", "predict", "--model", "/bundle"]
CMD ["/images"]
