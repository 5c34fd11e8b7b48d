#!/usr/bin/env bash
# Trains on nodes with GPUs of a Slurm cluster, a process for each GPU; run it where sbatch is, in a checkout that all
# nodes see. Two minutes before the time limit, and when it is preempted, the run saves itself and is queued again.

. "$(dirname "$0")/common.sh"

LOG=runs/$RUN.log

start() {
  local optional watcher code=0
  read -ra optional <<<"$EXTRA"
  [[ -z $PARTITION ]] || optional+=("--partition=$PARTITION")
  [[ -z $ACCOUNT ]] || optional+=("--account=$ACCOUNT")
  need_env
  check
  [[ -z $ENV_FILE ]] || COMMAND=(bash launch/with_env.sh "$ENV_FILE" "${COMMAND[@]}")
  run mkdir -p runs
  run touch "$LOG"
  if ! dry; then
    tail -n 0 -F "$LOG" 2>/dev/null &
    watcher=$!
    trap 'kill "$watcher" 2>/dev/null' EXIT
    trap 'say "the job goes on without you; see it: $SCRIPT logs; end it: $SCRIPT stop" && exit 130' INT
  fi
  run sbatch --wait "--job-name=$RUN" "--nodes=$NODES" "--ntasks-per-node=$GPUS_PER_NODE" \
    "--gpus-per-node=$GPUS_PER_NODE" "--cpus-per-task=$CPUS_PER_TASK" "--time=$TIME" "${optional[@]}" --requeue \
    --signal=TERM@120 --open-mode=append "--output=$LOG" launch/slurm_job.sh "${COMMAND[@]}" || code=$?
  finish "$code"
}

logs() {
  run tail -n 1000 -F "$LOG"
}

stop() {
  run scancel "--name=$RUN" --user="$(id -un)"
}

main "$@"
