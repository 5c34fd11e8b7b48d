#!/usr/bin/env bash
# launch/attach.sh ATTEMPT COMMAND...
#
# Runs on each host of a TPU. Starts the command apart from the connection, shows its output, and ends with its exit
# code. Called again with the same ATTEMPT, as gcloud does when a connection breaks, it shows the same command again;
# with another ATTEMPT it first ends the command before, which saves itself.
# Whoever watched that one gets exit code 130: it ended because a person wanted it, and is not to be tried again.
# launch/attach.sh           follows the output of the command that runs
# launch/attach.sh --stop    ends it
#
# AFTER is a line of shell that is run LINGER seconds after the command has ended, unless another ATTEMPT, or a stop,
# came meanwhile: it deletes the TPU of a run that nobody watches any more.

. "$(dirname "$0")/common.sh"

# own FOLDER: makes a folder that no other user can enter, and ends with 2 where somebody else made it before. Whoever
# could write there would choose what is signalled, and, with links, what is overwritten.
own() {
  mkdir -m 700 -- "$1" 2>/dev/null || true
  if [[ -L $1 || ! -d $1 || $(stat -c %u -- "$1") != "$UID" ]]; then
    fail "$1 is not a folder of $(id -un)'s own: have it removed, or set TMPDIR to a folder of yours"
  fi
  chmod 700 -- "$1"
}

# Gone after a reboot, as the process numbers are.
DIR=${TMPDIR:-/tmp}/launch-$(id -un)-$RUN
[[ ! -e $DIR && ! -L $DIR ]] || own "$DIR"

# end: SIGTERM to the command that runs, SIGKILL to what is left of it and of what it started after GRACE seconds.
end() {
  local second
  kill -TERM "$(cat "$DIR/pid" 2>/dev/null)" 2>/dev/null || return 0
  for ((second = 0; second < GRACE; second++)); do
    [[ ! -s $DIR/code ]] || return 0
    sleep 1
  done
  kill -KILL -- "-$(<"$DIR/group")" 2>/dev/null || true
}

# keep COMMAND...: runs it and keeps its exit code; outlives a SIGTERM to all processes of a machine that goes down.
keep() {
  local code=0 attempt
  attempt=$(<"$DIR/attempt")
  trap : TERM
  echo $$ >"$DIR/group"
  (echo "$BASHPID" >"$DIR/pid" && exec "$@") || code=$?
  echo "$code" >"$DIR/code"
  [[ -z ${AFTER:-} ]] || later "$attempt" &
}

# later ATTEMPT: runs AFTER, if the attempt is still the last one by then.
later() {
  sleep "${LINGER:-1800}"
  [[ $(<"$DIR/attempt") != "$1" ]] || eval "$AFTER"
}

# begin ATTEMPT COMMAND...: in a session of its own, so that nothing but `end` reaches it.
begin() {
  own "$DIR"
  echo "$1" >"$DIR/attempt"
  end
  rm -f "$DIR"/{pid,group,code}
  : >"$DIR/log"
  setsid bash "$0" --keep "${@:2}" >"$DIR/log" 2>&1 </dev/null &
  until [[ -s $DIR/pid ]]; do sleep 0.1; done
}

# follow ATTEMPT: its output from the start until the command ends; returns its exit code.
follow() {
  tail -n +1 -F --pid="$(<"$DIR/group")" "$DIR/log" 2>/dev/null | prefixed "[$(hostname)] "
  if [[ $(<"$DIR/attempt") != "$1" ]]; then
    say "stopped, or started anew, from elsewhere"
    return 130
  fi
  return "$(cat "$DIR/code" 2>/dev/null || echo 137)"
}

case ${1:-} in
  --keep) keep "${@:2}" ;;
  --stop)
    [[ ! -e $DIR/pid ]] || echo stopped >"$DIR/attempt"
    end
    ;;
  '')
    [[ -e $DIR/pid ]] || fail "nothing was started on $(hostname)"
    follow "$(<"$DIR/attempt")"
    ;;
  *)
    [[ $(cat "$DIR/attempt" 2>/dev/null) == "$1" ]] || begin "$@"
    follow "$1"
    ;;
esac
