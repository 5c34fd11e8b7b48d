#!/usr/bin/env bash
# Trains on a Cloud TPU, one slice of any number of hosts. The TPU is created if there is none, and created again
# after a preemption, and deleted at the end; `stop` lets the run save itself and deletes the TPU.

. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/tpu.sh"

KIND=tpu-vm STATE=state READY=READY HOSTS=(--worker=all)

create() {
  options
  gc create "$RUN" "--accelerator-type=$ACCELERATOR" "--version=$RUNTIME" "${OPTIONS[@]}"
}

main "$@"
