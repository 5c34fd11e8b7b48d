# syntax=docker/dockerfile:1
# docker build --build-arg JAX=tpu --tag IMAGE .      JAX is tpu, cuda12, cuda13 or cpu
#
# With CUDA the host brings the driver alone: JAX's packages have the rest. It runs as root, who may open a TPU's
# devices in GKE. What the image gets is listed in .dockerignore.
FROM python:3.12-slim-bookworm

ARG JAX=cpu
ENV PYTHONUNBUFFERED=1
WORKDIR /d1jax
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# First what changes seldom: the packages.
COPY requirements.txt ./
COPY launch/install.sh launch/uv.txt ./launch/
RUN bash launch/install.sh "$JAX" s3fs && rm -rf /root/.cache

COPY . .
ENV PATH="/d1jax/.venv/bin:$PATH"
CMD ["python", "-m", "d1jax", "--help"]
