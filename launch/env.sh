# What the scripts of this folder read. Change the values here, or in the environment for one command:
#   RUN=second ACCELERATOR=v6e-16 launch/tpu_vm.sh --dry-run

# Name of the machine, the job and the logs: lower-case letters, digits and dashes.
: "${RUN:=d1jax}"
# Checkpoints, metrics and reports: gs://BUCKET/FOLDER in a cloud, elsewhere a folder that every host sees.
: "${WORKDIR:=runs/$RUN}"
# Flags of d1jax.main; those given to a script take their place. The work directory is added.
FLAGS=(--config=configs/grpo.py)
# A command that each host runs before the first start, such as fetching the weights of --config.model.pretrained.
: "${PREPARE:=}"
# How often a run that was preempted (exit code 75) is started again, and the seconds in between.
: "${RETRIES:=20}"
: "${RETRY_WAIT:=30}"

# Google Cloud: tpu_vm.sh, queued.sh, gke.sh
: "${PROJECT:=}"
: "${ZONE:=}"
: "${ACCELERATOR:=v6e-8}"
# Of that accelerator: v2-alpha-tpuv6e, v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv5 (v5p).
: "${RUNTIME:=v2-alpha-tpuv6e}"
# yes: cheap, and taken away at any time.
: "${SPOT:=yes}"
# Slices of that accelerator: queued.sh, gke.sh
: "${SLICES:=1}"
# An existing GKE cluster: gke.sh
: "${CLUSTER:=}"

# Hosts with GPUs: slurm.sh, skypilot.sh
: "${NODES:=1}"
: "${GPU:=H100}"
: "${GPUS_PER_NODE:=8}"
# The CUDA of their driver, as JAX's extra: cuda12 or cuda13.
: "${CUDA:=cuda12}"
# slurm.sh
: "${PARTITION:=}"
: "${ACCOUNT:=}"
: "${TIME:=24:00:00}"
# skypilot.sh: where to look, such as gcp, aws/us-east-1 or k8s; empty: wherever it is cheapest.
: "${INFRA:=}"

# One machine: local.sh. Several processes share its CPU; one takes whatever JAX finds.
: "${PROCESSES:=2}"
# Seconds that the others have to end by themselves, once one process has ended.
: "${GRACE:=60}"
