#!/usr/bin/env bash
# Trains on hosts with GPUs of any cloud, as a managed job of SkyPilot (pip install "skypilot[gcp]", or another cloud).
# SkyPilot finds the hosts, replaces what is preempted, as often as it takes, and gives them back at the end.

. "$(dirname "$0")/common.sh"

start() {
  local optional=() code=0
  need_shared
  [[ -z $INFRA ]] || optional+=("--infra=$INFRA")
  [[ $SPOT != yes ]] || optional+=(--use-spot)
  run sky jobs launch --yes "--name=$RUN" "--num-nodes=$NODES" "--gpus=$GPU:$GPUS_PER_NODE" "${optional[@]}" \
    "--env=SETUP=$(setup "$CUDA")" "--env=TRAINING=$(quote "${COMMAND[@]}")" launch/skypilot.yaml || code=$?
  finish "$code"
}

logs() {
  run sky jobs logs "--name=$RUN"
}

stop() {
  run sky jobs cancel --yes "--name=$RUN"
}

main "$@"
