#!/usr/bin/env bash
# Runs the trainer on TPU slices of a GKE cluster, as a JobSet (gke_jobset.yaml):
#
#   IMAGE=… launch/gke.sh --config=configs/stage1.py --workdir=gs://BUCKET/RUN
#   launch/gke.sh --logs
#   launch/gke.sh --delete
#
# To go on with a run that has ended, --delete it and give the first command
# again. With --dry-run as the first argument commands are printed, not run.
# Settings, from the environment:
set -euo pipefail
NAME=${NAME:-behaviorlm}
ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice}
TOPOLOGY=${TOPOLOGY:-4x4}  # Of one slice.
CHIPS=${CHIPS:-4}  # Of each host.
SLICES=${SLICES:-1}
MAX_RESTARTS=${MAX_RESTARTS:-20}
IMAGE=${IMAGE:-}  # Of launch/Dockerfile.

fail() {
  echo "error: $1" >&2
  exit 2
}

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=true
  shift
fi
case ${1:-} in
  --logs)
    ${dry_run:+echo} kubectl logs \
      --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --prefix --tail=100 \
      --follow --max-log-requests=256
    exit ;;
  --delete)
    ${dry_run:+echo} kubectl delete jobset "$NAME"
    exit ;;
  '')
    fail 'launch/gke.sh [--dry-run] ARGS: no ARGS; give those of the trainer,'\
' --logs or --delete.' ;;
esac

[[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*)*$ && $CHIPS =~ ^[1-9][0-9]*$ ]] \
  || fail "TOPOLOGY is '$TOPOLOGY' and CHIPS '$CHIPS'; give such as 4x4 and 4."
total=$((${TOPOLOGY//x/*}))
((total % CHIPS == 0)) \
  || fail "TOPOLOGY $TOPOLOGY has $total chips, no whole hosts of CHIPS=$CHIPS."
# shellcheck disable=SC2034  # It is read by its name.
HOSTS=$((total / CHIPS))
if [[ -z $IMAGE ]]; then
  [[ $dry_run ]] \
    || fail 'IMAGE is not set; build launch/Dockerfile, push it, give its name.'
  IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/behaviorlm:TAG
fi

ARGS=
for argument in "$@" --config.distributed.coordinator=auto; do
  argument=${argument//\\/\\\\}
  argument=${argument//\"/\\\"}
  argument=${argument//$'\n'/\\n}
  # Kubernetes puts variables in place of $(NAME), and $ in place of $$.
  ARGS+="${ARGS:+, }\"${argument//\$/\$\$}\""
done

manifest=$(<"$(dirname "$0")/gke_jobset.yaml")
for name in NAME ACCELERATOR TOPOLOGY CHIPS HOSTS SLICES MAX_RESTARTS IMAGE \
  ARGS; do
  filled=
  while [[ $manifest == *"@$name@"* ]]; do
    filled+=${manifest%%"@$name@"*}${!name}
    manifest=${manifest#*"@$name@"}
  done
  manifest=$filled$manifest
done
if [[ $dry_run ]]; then
  printf "kubectl create --filename=- <<'EOF'\n%s\nEOF\n" "$manifest"
else
  kubectl create --filename=- <<<"$manifest"
fi
