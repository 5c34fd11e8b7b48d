# What the scripts of this folder read. Change the values here, or in the environment for one command:
#   RUN=second ACCELERATOR=v6e-16 launch/tpu_vm.sh --dry-run

# Name of the machine, the job and the logs: lower-case letters, digits and dashes, at most 28.
: "${RUN:=d1jax}"
# Checkpoints, metrics and reports: gs://BUCKET/FOLDER or s3://BUCKET/FOLDER, elsewhere a folder that every host sees.
: "${WORKDIR:=runs/$RUN}"
# Flags of d1jax.main; those given to a script take their place. The work directory is added.
FLAGS=(--config=configs/grpo.py)
# yes: before anything is created, look whether flags, model and data are there (this machine needs `make setup`). no:
# what is named will be there on the hosts alone, by PREPARE for example.
: "${CHECK:=yes}"
# A command that each host runs before the first start.
: "${PREPARE:=}"
# Hosts get the files that git tracks, and these, separated by blanks, such as a task of your own.
: "${PACK:=}"
# A file of lines NAME=VALUE, such as HF_TOKEN=...: variables of the training. It is never packed or printed.
: "${ENV_FILE:=}"
# Further flags for the command that creates hosts or submits the job, separated by blanks: --network=mine.
: "${EXTRA:=}"
# How often a run that was preempted (exit code 75) is started again, and the seconds in between.
: "${RETRIES:=20}"
: "${RETRY_WAIT:=30}"
# The longest time of a run in hours: then it saves itself and ends with exit code 124, and is not started again.
: "${HOURS:=24}"
# no: the TPU is deleted when the run has ended, however it ended. yes: it stays, and is paid for.
: "${KEEP:=no}"

# Google Cloud: tpu_vm.sh, queued.sh, gke.sh
: "${PROJECT:=}"
: "${ZONE:=}"
# The last number is that of chips (of v5p: cores, two a chip).
: "${ACCELERATOR:=v6e-1}"
# Of that accelerator: v2-alpha-tpuv6e, v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv5 (v5p).
: "${RUNTIME:=v2-alpha-tpuv6e}"
# yes: cheap, and taken away at any time.
: "${SPOT:=yes}"
# The name of a reservation to use; with SPOT=no.
: "${RESERVATION:=}"
# no: hosts get no public address, and are reached from a machine of the same network alone.
: "${PUBLIC:=yes}"
# Who the hosts are to other services: NAME@PROJECT.iam.gserviceaccount.com; in GKE a name of the cluster.
: "${SERVICE_ACCOUNT:=}"
# Slices of that accelerator: queued.sh, gke.sh
: "${SLICES:=1}"
# gke.sh: an existing cluster, an image that the Dockerfile made, and kubectl or gcluster, which submits the job.
: "${CLUSTER:=}"
: "${IMAGE:=}"
: "${SUBMIT:=kubectl}"
# gke.sh: where ACCELERATOR is not v5e or v6e: the node's labels gke-tpu-accelerator and gke-tpu-topology, and how many
# hosts a slice has, with how many chips each.
: "${TPU:=}"
: "${TOPOLOGY:=}"
: "${SLICE_HOSTS:=}"
: "${HOST_CHIPS:=}"

# Hosts with GPUs: slurm.sh, skypilot.sh
: "${NODES:=1}"
: "${GPU:=L4}"
: "${GPUS_PER_NODE:=1}"
# The CUDA of their driver, as JAX's extra: cuda12 or cuda13.
: "${CUDA:=cuda12}"
# slurm.sh
: "${PARTITION:=}"
: "${ACCOUNT:=}"
: "${TIME:=$HOURS:00:00}"
: "${CPUS_PER_TASK:=8}"
# skypilot.sh: where to look, such as gcp, aws/us-east-1 or k8s; empty: wherever it is cheapest.
: "${INFRA:=}"

# One machine: local.sh. Several processes share its CPU; one takes whatever JAX finds.
: "${PROCESSES:=2}"
# Seconds that the others have to end by themselves, once one process has ended.
: "${GRACE:=60}"
