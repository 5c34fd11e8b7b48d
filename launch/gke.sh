#!/usr/bin/env bash
# Trains on TPUs of an existing GKE cluster, as a JobSet made by xpk (pip install xpk). The JobSet starts all hosts
# again when they end with 75, or by a signal, as they do when a neighbour is preempted; `stop` deletes it.

. "$(dirname "$0")/common.sh"

# Machine types are not named as elsewhere; `xpk workload create --help` knows v5litepod-16, v5p-128, v6e-16.
PLACE=("--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE")
# Process 0 of each slice.
FIRST=jobset.sigs.k8s.io/jobset-name=$RUN,batch.kubernetes.io/job-completion-index=0

# follow: shows the logs of one start after the other; returns 0 when the JobSet is complete, 1 when it failed.
follow() {
  local end
  while true; do
    run kubectl logs --follow --prefix --tail=1000 --max-log-requests="$((SLICES + 1))" --selector="$FIRST" || true
    if dry; then
      run kubectl get jobset "$RUN" '--output=jsonpath={.status.terminalState}'
      return
    fi
    end=$(kubectl get jobset "$RUN" '--output=jsonpath={.status.terminalState}') || return 1
    case $end in
      Complete*) return 0 ;;
      Failed) return 1 ;;
    esac
    sleep "$RETRY_WAIT"
  done
}

start() {
  local folder=/tmp/d1jax code=0
  need PROJECT ZONE CLUSTER ACCELERATOR
  need_shared
  # The image is a Python with the working tree; xpk builds and pushes it.
  dry || folder=$(mktemp -d)/d1jax
  pack "$folder.tgz"
  run mkdir -p "$folder"
  run tar -xzf "$folder.tgz" -C "$folder"
  # The container's shell passes SIGTERM on to one process; `exec` makes that the training.
  run xpk workload create "--workload=$RUN" "${PLACE[@]}" "--tpu-type=$ACCELERATOR" "--num-slices=$SLICES" \
    --base-docker-image=python:3.12 "--script-dir=$folder" "--max-restarts=$RETRIES" --restart-on-exit-codes=75 \
    --termination-grace-period-seconds=120 "--command=$(setup tpu) && exec $(quote "${COMMAND[@]}")" || finish $?
  dry || rm -rf "$(dirname "$folder")"
  BILLED="the cluster $CLUSTER is paid for, whatever it runs, until:"
  BILLED+=" xpk cluster delete $(quote "${PLACE[@]}") --tpu-type=$ACCELERATOR"
  trap 'say "the run goes on without you; see it: $SCRIPT logs; end it: $SCRIPT stop" && exit 130' INT
  follow || code=$?
  finish "$code"
}

logs() {
  follow
}

stop() {
  need PROJECT ZONE CLUSTER
  run xpk workload delete "--workload=$RUN" "${PLACE[@]}" --force
}

main "$@"
