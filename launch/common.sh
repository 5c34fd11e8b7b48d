# Functions that the scripts of this folder share; the settings are in env.sh.
#
# A script defines `start`, and where it can `logs` and `stop`, then calls `main "$@"`.

set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "launch: bash $BASH_VERSION is too old, 4.4 is needed; on macOS: brew install bash" >&2
  exit 2
}
SCRIPT=$0
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$ROOT/launch/env.sh"

# say TEXT: one line for the person, on standard error.
say() {
  printf 'launch: %s\n' "$*" >&2
}

# fail TEXT: ends with exit code 2, wrong input.
fail() {
  say "$*"
  exit 2
}

# quote WORD...: the words as one line that a shell reads back as the same words.
quote() {
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  printf '%s' "${words[*]}"
}

# dry: whether commands are printed instead of run.
dry() {
  [[ ${DRY_RUN:-} ]]
}

# run COMMAND...: runs it, or prints it in a dry run.
run() {
  if dry; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# need NAME...: each of these settings has a value.
need() {
  local name
  for name; do
    [[ ${!name} ]] || fail "$name is empty; set it in launch/env.sh or before the command: $name=... $SCRIPT"
  done
}

# need_shared: the work directory is one that all hosts can see.
need_shared() {
  [[ $WORKDIR == gs://* || $WORKDIR == s3://* || $WORKDIR == /* ]] ||
    fail "WORKDIR is '$WORKDIR', which hosts do not share; set it to gs://BUCKET/FOLDER, or /FOLDER on a disk all see"
}

# need_env: the file of variables, where there is one, has lines NAME=VALUE and is not one that git tracks.
need_env() {
  [[ $ENV_FILE ]] || return 0
  bash launch/with_env.sh "$ENV_FILE" true || fail "ENV_FILE is '$ENV_FILE'; name a file of lines NAME=VALUE"
  ! git ls-files --error-unmatch "$ENV_FILE" >/dev/null 2>&1 ||
    fail "ENV_FILE is '$ENV_FILE', which git tracks, so that it would be packed; move it out of the clone"
}

# check: looks whether flags, model and data are there, before anything is created.
check() {
  local python=${PYTHON:-.venv/bin/python} code=0
  [[ $CHECK != no ]] || return 0
  if ! dry && ! command -v "$python" >/dev/null; then
    say "$python is missing here, so that flags, model and data are not checked; \`make setup\` makes it"
    return 0
  fi
  run env JAX_PLATFORMS=cpu "$python" -m d1jax.main "${FLAGS[@]}" "--config.workdir=$WORKDIR" --check || code=$?
  ((code == 0)) || fail "nothing was created; CHECK=no starts all the same"
}

# limit: hosts end COMMAND by themselves when its time is over, even if nobody watches.
limit() {
  COMMAND=(timeout --foreground --kill-after=120 "$((HOURS * 3600))" "${COMMAND[@]}")
}

# setup EXTRA: one line, what a fresh host does first; EXTRA is that of launch/install.sh.
setup() {
  local line="bash launch/install.sh $1"
  [[ $WORKDIR != s3://* ]] || line+=" s3fs"
  [[ -z $PREPARE ]] || line+=" && { $PREPARE; }"
  printf '%s' "$line"
}

# pack FILE: the files that git tracks, as they stand, and those that PACK names, as a tar file. A file that git does
# not track may hold a secret.
pack() {
  local named others
  read -ra named <<<"$PACK"
  say "packing what git tracks${PACK:+, and $PACK,} into $1"
  dry && return
  for file in "${named[@]}"; do [[ -e $file ]] || fail "PACK names '$file', which does not exist"; done
  others=$(git ls-files --others --exclude-standard -- . "${named[@]/#/:!}" | head -n 4 | paste -sd ' ')
  [[ -z $others ]] || say "left out, since git does not track them: $others; PACK names what hosts need"
  { git ls-files -z --cached; ((${#named[@]} == 0)) || printf '%s\0' "${named[@]}"; } |
    while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done |
    tar --null --files-from=- -czf "$1"
}

# retry COMMAND...: runs it again while it ends with 75 (preempted), RETRIES times at most; returns its last exit code.
retry() {
  local attempt code
  for ((attempt = 0; ; attempt++)); do
    code=0
    "$@" || code=$?
    if ((code != 75 || attempt >= RETRIES)) || [[ ${STOPPED:-} ]]; then
      return "$code"
    fi
    say "preempted; attempt $((attempt + 2)) of $((RETRIES + 1)) in $RETRY_WAIT s"
    sleep "$RETRY_WAIT"
    [[ -z ${STOPPED:-} ]] || return "$code"
  done
}

# finish CODE: says how it ended and where everything is, and exits with the code.
finish() {
  case $1 in
    0) if dry; then say "a dry run: nothing was started"; else say "done"; fi ;;
    2) say "exit code 2: wrong input, see above; repair it, then run the same command again" ;;
    70) say "exit code 70: a loss, gradient or weight is not finite; the line above says how to go on" ;;
    130) say "exit code 130: stopped and saved; the same command goes on from there" ;;
    124) say "exit code 124: HOURS=$HOURS are over; the run is saved, and the same command goes on from there" ;;
    75) say "exit code 75: preempted and saved; the same command goes on from there" ;;
    *) say "exit code $1: see above; the same command goes on from the last checkpoint" ;;
  esac
  say "checkpoints, metrics and reports: $WORKDIR"
  [[ -z ${BILLED:-} ]] || dry || say "$BILLED"
  exit "$1"
}

# prefixed TEXT: copies standard input, each line behind the text; the greetings of JAX's processes are left out.
prefixed() {
  local line
  while IFS= read -r line || [[ $line ]]; do
    [[ $line == "[Gloo] Rank "*" is connected to "* ]] && continue
    printf '%s%s\n' "$1" "$line"
  done
}

# usage: the comment at the top of the script, and what all scripts take.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$SCRIPT"
  cat <<TEXT

  $SCRIPT [--dry-run] [FLAG...]   start; flags of d1jax.main take the place of FLAGS
TEXT
  declare -F logs >/dev/null && echo "  $SCRIPT logs [--dry-run]        follow the logs"
  declare -F stop >/dev/null && echo "  $SCRIPT stop [--dry-run]        end it"
  declare -F manifest >/dev/null && echo "  $SCRIPT manifest [FLAG...]      print what Kubernetes would get"
  cat <<TEXT

Settings are in launch/env.sh; a dry run (or DRY_RUN=1) prints the commands and runs none.
TEXT
}

# main WORD...: reads the command line and does what it says. COMMAND is what every process runs.
main() {
  local action=start flags=() word
  case ${1:-} in
    logs | stop | manifest) declare -F "$1" >/dev/null && action=$1 && shift ;;
  esac
  for word; do
    case $word in
      -h | --help) usage && exit 0 ;;
      --dry-run) DRY_RUN=1 ;;
      --*) flags+=("$word") ;;
      *) fail "$SCRIPT takes no '$word'; see $SCRIPT --help" ;;
    esac
  done
  [[ $RUN =~ ^[a-z]([a-z0-9-]{0,26}[a-z0-9])?$ ]] ||
    fail "RUN is '$RUN'; machines take at most 28 lower-case letters, digits and dashes, a letter first"
  [[ $HOURS =~ ^[1-9][0-9]*$ ]] || fail "HOURS is '$HOURS'; set it to a whole number of hours"
  ((${#flags[@]} == 0)) || FLAGS=("${flags[@]}")
  COMMAND=("${PYTHON:-.venv/bin/python}" -m d1jax.main "${FLAGS[@]}" "--config.workdir=$WORKDIR")
  cd "$ROOT"
  "$action"
}
