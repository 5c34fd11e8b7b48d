# What tpu_vm.sh and queued.sh share: a TPU that is created, prepared, used, and created again after a preemption.
#
# They set KIND (gcloud's group of commands), STATE (the field that holds a resource's state), READY (its value when
# hosts can be reached), HOSTS (the flags that reach all of them), and define `create`.

REACH=()
[[ $PUBLIC == yes ]] || REACH=(--internal-ip)
PAID="the TPU $RUN is paid for until: $SCRIPT stop"
PLACE=("--zone=$ZONE" "--project=$PROJECT" --quiet)

# gc COMMAND...: gcloud for this kind of resource.
gc() {
  run gcloud compute tpus "$KIND" "$1" "${@:2}" "${PLACE[@]}"
}

# remote LINE: a shell line on all hosts at once; ends with the exit code of the first host that failed. A host that is
# gone is noticed within two minutes.
remote() {
  gc ssh "$RUN" "${HOSTS[@]}" "${REACH[@]}" --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oConnectTimeout=30 \
    "--command=$1"
}

# look: sets FOUND to the state of the TPU; empty where there is none, and in a dry run.
look() {
  FOUND=
  dry || FOUND=$(gc describe "$RUN" "--format=value($STATE)" 2>/dev/null) || FOUND=
}

# gone: whether there is no TPU any more.
gone() {
  ! dry && look && [[ -z $FOUND ]]
}

# remove: deletes the TPU.
remove() {
  local force=()
  [[ $KIND == tpu-vm ]] || force=(--force)
  gc delete "$RUN" "${force[@]}"
}

# provide: a TPU that can be used; one that was taken away is deleted and asked for again. 75: it was there, and cannot
# be had again just now.
provide() {
  while look && [[ $FOUND != "$READY" ]]; do
    case $FOUND in
      '')
        create || return "${SEEN:-1}"
        ! dry || return 0
        ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        say "the TPU $RUN is $FOUND; deleting it, to ask for it again"
        remove || return
        ;;
      FAILED | STOPPED) fail "the TPU $RUN is $FOUND; gcloud compute tpus $KIND describe $RUN says why" ;;
      *)
        say "waiting for the TPU $RUN, which is $FOUND"
        sleep "$RETRY_WAIT"
        ;;
    esac
  done
  SEEN=75
}

# options: sets OPTIONS to what both kinds of creation take.
options() {
  read -ra OPTIONS <<<"$EXTRA"
  [[ $SPOT != yes ]] || OPTIONS+=(--spot)
  [[ -z $RESERVATION ]] || OPTIONS+=(--reserved)
  [[ $PUBLIC == yes ]] || OPTIONS+=(--internal-ips)
  [[ -z $SERVICE_ACCOUNT ]] || OPTIONS+=("--service-account=$SERVICE_ACCOUNT")
}

# prepare: the working tree, the file of variables, and what they need, on all hosts.
prepare() {
  local file=/tmp/d1jax.tgz
  dry || file=$(mktemp)
  pack "$file" || return
  gc scp "$file" "$RUN:d1jax.tgz" "${HOSTS[@]}" "${REACH[@]}" || return
  dry || rm -f "$file"
  if [[ $ENV_FILE ]]; then
    remote "install -m 600 /dev/null d1jax.env" || return
    gc scp "$ENV_FILE" "$RUN:d1jax.env" "${HOSTS[@]}" "${REACH[@]}" || return
  fi
  remote "mkdir -p d1jax && tar -xzf d1jax.tgz -C d1jax && cd d1jax && $(setup tpu)"
}

# attempt: from whatever there is to the end of the run. A TPU that is gone counts as preempted.
attempt() {
  local code=0 number=1 words=("${COMMAND[@]}") left=$((HOURS * 3600)) after=
  dry || number=$(date +%s) left=$((UNTIL - SECONDS))
  ((left > 0)) || return 124
  [[ -z $ENV_FILE ]] || words=(bash launch/with_env.sh ../d1jax.env "${words[@]}")
  words=(timeout --foreground --kill-after=120 "$left" "${words[@]}")
  # Should this script be gone by then, a host deletes the TPU half an hour after the run has ended.
  [[ $KEEP == yes ]] || after=" AFTER=$(quote "$(DRY_RUN=1 remove)")"
  provide || return
  { prepare && remote "cd d1jax && RUN=$RUN$after bash launch/attach.sh $number $(quote "${words[@]}")"; } || code=$?
  case $code in
    0 | 2 | 70 | 71 | 74 | 75 | 124 | 130) return "$code" ;;
  esac
  look
  [[ $FOUND == "$READY" ]] || code=75
  return "$code"
}

start() {
  local code=0
  need PROJECT ZONE ACCELERATOR RUNTIME
  need_shared
  need_env
  check
  UNTIL=$((SECONDS + HOURS * 3600))
  trap 'say "the run goes on without you; see it: $SCRIPT logs; end it: $SCRIPT stop" && exit 130' INT
  retry attempt || code=$?
  # With any other code the run may still go on there: somebody else took it over, or the connection broke.
  case $KEEP$code in
    no0 | no2 | no70 | no71 | no74 | no75 | no124) gone || remove || BILLED="$PAID" ;;
    *) gone || BILLED="$PAID" ;;
  esac
  finish "$code"
}

logs() {
  need PROJECT ZONE
  remote "cd d1jax && RUN=$RUN bash launch/attach.sh"
}

stop() {
  need PROJECT ZONE
  remote "cd d1jax && RUN=$RUN bash launch/attach.sh --stop" || say "no host could be asked to save"
  remove
}
