#!/usr/bin/env bash
# Trains on this machine in PROCESSES processes that meet over the network, as several hosts would, on its CPU; with
# PROCESSES=1 on whatever JAX finds. Once one ends badly, the others are ended too. Ctrl-C and SIGTERM let the run save
# itself.

. "$(dirname "$0")/common.sh"

# Process numbers that still run, by their place; each leads a group of its own.
PIDS=()

# signal NAME: to all that still run.
signal() {
  local pid
  for pid in "${PIDS[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}

# free_port: a port that nobody listens on.
free_port() {
  local port=$((20000 + RANDOM % 12000))
  while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do ((port++)); done
  echo "$port"
}

# watch: waits for all; returns the worst exit code: a failure before 75 before 0, of failures the first.
watch() {
  local place code worst=0 limit=
  while ((${#PIDS[@]} > 0)); do
    for place in "${!PIDS[@]}"; do
      kill -0 "${PIDS[place]}" 2>/dev/null && continue
      code=0
      wait "${PIDS[place]}" || code=$?
      # What it started and left behind.
      kill -KILL -- "-${PIDS[place]}" 2>/dev/null || true
      unset "PIDS[place]"
      ((code == 0)) && continue
      say "process $place ended with exit code $code"
      ((worst == 0 || worst == 75)) && worst=$code
      limit=${limit:-$((SECONDS + GRACE))}
    done
    if [[ $limit ]] && ((${#PIDS[@]} > 0 && SECONDS >= limit)); then
      say "ending the others: $(quote "${!PIDS[@]}")"
      signal TERM
      sleep 2
      signal KILL
    fi
    sleep 0.2
  done
  return "$worst"
}

# attempt: all processes once, each line behind the number of its process.
attempt() {
  local place port=12345 output filters=() words code=0
  dry || port=$(free_port)
  for ((place = 0; place < PROCESSES; place++)); do
    words=("${COMMAND[@]}")
    if ((PROCESSES > 1)); then
      words=(env "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" "${words[@]}" "--config.distributed.coordinator=127.0.0.1:$port")
      words+=("--config.distributed.processes=$PROCESSES" "--config.distributed.process=$place")
    fi
    if dry; then
      run "${words[@]}"
      continue
    fi
    exec {output}> >(trap '' INT TERM; prefixed "[$place] ")
    filters+=($!)
    set -m
    "${words[@]}" >&"$output" 2>&1 </dev/null &
    PIDS[place]=$!
    set +m
    exec {output}>&-
  done
  watch || code=$?
  ((${#filters[@]} == 0)) || wait "${filters[@]}" || true
  return "$code"
}

start() {
  local code=0
  dry || command -v "${COMMAND[0]}" >/dev/null || fail "${COMMAND[0]} is missing: run make setup first"
  trap 'STOPPED=yes; signal TERM' TERM HUP
  trap 'STOPPED=yes; signal INT' INT
  retry attempt || code=$?
  finish "$code"
}

main "$@"
