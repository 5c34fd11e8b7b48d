#!/usr/bin/env bash
# Trains on Cloud TPUs that are waited for in a queue, one slice or several (SLICES). What is preempted is asked for
# again; at the end the TPUs are deleted. `stop` lets the run save itself, deletes the TPUs and leaves the queue.

. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/tpu.sh"

KIND=queued-resources STATE=state.state READY=ACTIVE HOSTS=(--node=all --worker=all --batch-size=all)

create() {
  local nodes=("--node-id=$RUN")
  ((SLICES == 1)) || nodes=("--node-count=$SLICES" "--node-prefix=$RUN")
  options
  gc create "$RUN" "${nodes[@]}" "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" "${OPTIONS[@]}"
}

main "$@"
