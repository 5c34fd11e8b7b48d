#!/usr/bin/env bash
# launch/slurm_job.sh COMMAND...
#
# What slurm.sh submits: the command in a process for each GPU, and the job queued again when it was preempted. Slurm
# runs a copy of this file, in the checkout.

. launch/common.sh

code=0
# JAX picks a process's GPU by its number on the node, so that each sees all of them. Processes save together: one that
# is done waits for the others.
srun --label --kill-on-bad-exit=0 --wait=600 "$@" || code=$?
if ((code == 75 && ${SLURM_RESTART_COUNT:-0} < RETRIES)); then
  say "preempted; queued again, for the time $((${SLURM_RESTART_COUNT:-0} + 1)) of $RETRIES"
  scontrol requeue "$SLURM_JOB_ID"
fi
finish "$code"
