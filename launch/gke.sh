#!/usr/bin/env bash
# Trains on TPUs of an existing GKE cluster, as a JobSet: kubectl gets it from here, or Cluster Toolkit makes it
# (SUBMIT=gcluster). The image is that of the Dockerfile. The JobSet starts all hosts again when they end with 75, or
# when a neighbour is preempted; `stop` lets the run save itself and deletes it.

. "$(dirname "$0")/common.sh"

# Process 0 of each slice.
FIRST=jobset.sigs.k8s.io/jobset-name=$RUN,batch.kubernetes.io/job-completion-index=0

# json WORD...: the words as strings of JSON, which YAML reads too, separated by commas.
json() {
  local word comma=
  for word; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    printf '%s"%s"' "$comma" "${word//$'\t'/\\t}"
    comma=', '
  done
}

# shape: sets TPU, TOPOLOGY, SLICE_HOSTS and HOST_CHIPS from ACCELERATOR, where it is a v5e or v6e.
shape() {
  local chips=${ACCELERATOR##*-} kind
  case $ACCELERATOR in
    v6e-*) kind=tpu-v6e-slice ;;
    v5e-* | v5litepod-*) kind=tpu-v5-lite-podslice ;;
    *)
      need TPU TOPOLOGY SLICE_HOSTS HOST_CHIPS
      return
      ;;
  esac
  local -A known=([1]=1x1 [4]=2x2 [8]=2x4 [16]=4x4 [32]=4x8 [64]=8x8 [128]=8x16 [256]=16x16)
  [[ ${known[$chips]:-} ]] || fail "ACCELERATOR is '$ACCELERATOR'; slices have ${!known[*]} chips"
  TPU=${TPU:-$kind} TOPOLOGY=${TOPOLOGY:-${known[$chips]}}
  # Up to 8 chips are of one host; hosts of larger slices have 4.
  HOST_CHIPS=${HOST_CHIPS:-$((chips > 8 ? 4 : chips))}
  SLICE_HOSTS=${SLICE_HOSTS:-$((chips / HOST_CHIPS))}
}

# manifest: the JobSet. Exit codes that a start would meet again end it; 75, and what a signal ended, starts again.
manifest() {
  limit
  need IMAGE ACCELERATOR
  need_shared
  shape
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $RUN
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  ttlSecondsAfterFinished: 86400
  failurePolicy:
    maxRestarts: $RETRIES
    rules:
    - name: ended
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy, DeadlineExceeded]
  replicatedJobs:
  - name: slice
    replicas: $SLICES
    template:
      spec:
        parallelism: $SLICE_HOSTS
        completions: $SLICE_HOSTS
        completionMode: Indexed
        backoffLimit: 0
        activeDeadlineSeconds: $((HOURS * 3600 + 600))
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              operator: In
              values: [1, 2, 70, 71, 74, 124, 130]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            $([[ -z $SERVICE_ACCOUNT ]] || echo "serviceAccountName: $SERVICE_ACCOUNT")
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $TPU
              cloud.google.com/gke-tpu-topology: $TOPOLOGY
              $([[ $SPOT != yes ]] || echo 'cloud.google.com/gke-spot: "true"')
              $([[ -z $RESERVATION ]] || echo "cloud.google.com/reservation-name: $RESERVATION")
            containers:
            - name: d1jax
              image: $(json "$IMAGE")
              command: [$(json "${COMMAND[@]}")]
              $([[ -z $ENV_FILE ]] || echo "envFrom: [{secretRef: {name: $RUN}}]")
              resources:
                limits:
                  google.com/tpu: $HOST_CHIPS
YAML
}

# submit: hands the JobSet over.
submit() {
  local file=/tmp/d1jax.yaml more
  read -ra more <<<"$EXTRA"
  case $SUBMIT in
    kubectl)
      if [[ $ENV_FILE ]]; then
        run kubectl delete secret "$RUN" --ignore-not-found
        run kubectl create secret generic "$RUN" "--from-env-file=$ENV_FILE"
      fi
      dry || file=$(mktemp)
      dry || manifest >"$file"
      run kubectl create "--filename=$file" "${more[@]}"
      ;;
    gcluster)
      [[ -z $ENV_FILE ]] || fail "ENV_FILE is '$ENV_FILE', but gcluster has no secrets; use SUBMIT=kubectl"
      limit
      [[ -z $SERVICE_ACCOUNT ]] || more+=("--service-account=$SERVICE_ACCOUNT")
      run gcluster job submit "--name=$RUN" "--cluster=$CLUSTER" "--project=$PROJECT" "--location=$ZONE" \
        "--image=$IMAGE" "--compute-type=$ACCELERATOR" "--num-slices=$SLICES" "--restarts=$RETRIES" \
        --restart-on-exit-codes=75 --grace-period=120s "${more[@]}" \
        "--command=exec $(quote "${COMMAND[@]}")"
      ;;
    *) fail "SUBMIT is '$SUBMIT'; set it to kubectl or gcluster" ;;
  esac
}

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

# connect: kubectl speaks to the cluster.
connect() {
  need PROJECT ZONE CLUSTER
  run gcloud container clusters get-credentials "$CLUSTER" "--location=$ZONE" "--project=$PROJECT"
}

start() {
  local code=0
  need PROJECT ZONE CLUSTER IMAGE ACCELERATOR
  need_shared
  need_env
  [[ $SUBMIT != kubectl ]] || shape
  check
  connect || finish $?
  submit || finish $?
  BILLED="the nodes of the cluster $CLUSTER are paid for, whatever they run, until its pools shrink or it is deleted:"
  BILLED+=" gcloud container clusters delete $(quote "$CLUSTER" "--location=$ZONE" "--project=$PROJECT")"
  trap 'say "the run goes on without you; see it: $SCRIPT logs; end it: $SCRIPT stop" && exit 130' INT
  follow || code=$?
  finish "$code"
}

logs() {
  follow
}

stop() {
  connect
  run kubectl delete jobset "$RUN"
  run kubectl delete secret "$RUN" --ignore-not-found
}

main "$@"
