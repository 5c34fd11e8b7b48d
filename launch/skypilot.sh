#!/usr/bin/env bash
# Trains on hosts with GPUs of any cloud, as a managed job of SkyPilot (pip install "skypilot[gcp]", or another cloud).
# SkyPilot finds the hosts, replaces what is preempted, as often as it takes, and gives them back at the end.

. "$(dirname "$0")/common.sh"

start() {
  local optional name sky=(sky) folder=/tmp/d1jax code=0
  read -ra optional <<<"$EXTRA"
  need_shared
  need_env
  check
  limit
  [[ -z $INFRA ]] || optional+=("--infra=$INFRA")
  [[ $SPOT != yes ]] || optional+=(--use-spot)
  if [[ $ENV_FILE ]]; then
    # SkyPilot takes the values of secrets from its own environment; their names alone stand on the command line.
    sky=(bash launch/with_env.sh "$ENV_FILE" sky)
    while IFS='=' read -r name _ || [[ $name ]]; do
      [[ ! $name =~ ^[A-Za-z_] ]] || optional+=("--secret=$name")
    done <"$ENV_FILE"
  fi
  # SkyPilot copies a folder: one that holds what is packed, and nothing else of the clone.
  dry || folder=$(mktemp -d)/d1jax
  pack "$folder.tgz"
  run mkdir -p "$folder"
  run tar -xzf "$folder.tgz" -C "$folder"
  run "${sky[@]}" jobs launch --yes "--name=$RUN" "--num-nodes=$NODES" "--gpus=$GPU:$GPUS_PER_NODE" "${optional[@]}" \
    "--workdir=$folder" \
    "--env=SETUP=$(setup "$CUDA")" "--env=TRAINING=$(quote "${COMMAND[@]}")" launch/skypilot.yaml || code=$?
  dry || rm -rf "$(dirname "$folder")"
  finish "$code"
}

logs() {
  run sky jobs logs "--name=$RUN"
}

stop() {
  run sky jobs cancel --yes "--name=$RUN"
}

main "$@"
