#!/usr/bin/env bash
# Runs the trainer on all hosts of a TPU slice, through gcloud:
#
#   launch/tpu_vm.sh create   # Asks for the slice; see status.
#   launch/tpu_vm.sh install  # What is committed here, on every host.
#   launch/tpu_vm.sh run --config=configs/stage1.py --workdir=gs://BUCKET/RUN
#   launch/tpu_vm.sh status   # Of the slice, and of the run on every host.
#   launch/tpu_vm.sh logs     # Of one host; WORKER=2, or all.
#   launch/tpu_vm.sh stop     # SIGTERM: all save and end.
#   launch/tpu_vm.sh delete
#
# `run` stops what runs, and goes on from what it saved. With --dry-run as the
# first argument commands are printed, not run. Settings, from the environment:
set -euo pipefail
NAME=${NAME:-behaviorlm}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SPOT=${SPOT:-}  # Anything: cheaper, may be taken away.
WORKER=${WORKER:-0}

quote() {  # For a shell, where it needs that.
  if [[ $1 =~ ^[[:alnum:]_./:=,@-]+$ ]]; then
    printf '%s' "$1"
  else
    printf "'%s'" "${1//\'/\'\\\'\'}"
  fi
}

dry_run=
call() {
  if [[ -z $dry_run ]]; then
    "$@"
    return
  fi
  local word line=
  for word; do
    line+="${line:+ }$(quote "$word")"
  done
  echo "$line"
}

ssh() {  # WORKER COMMAND
  call gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" \
    --command="$2"
}

if [[ ${1:-} == --dry-run ]]; then
  dry_run=true
  shift
fi
action=${1:-}
[[ -z $action ]] || shift
case $action in
  create)
    call gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" \
      --node-id="$NAME" --accelerator-type="$TYPE" \
      --runtime-version="$RUNTIME" ${SPOT:+--spot} ;;
  install)
    tar=${TMPDIR:-/tmp}/behaviorlm_jax.tar
    call git archive --output="$tar" HEAD
    call gcloud compute tpus tpu-vm scp "$tar" "$NAME:" --zone="$ZONE" \
      --worker=all
    # The images have Python 3.10; uv brings its own.
    ssh all 'set -e
mkdir -p behaviorlm_jax
tar -xf behaviorlm_jax.tar -C behaviorlm_jax
cd behaviorlm_jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.12
python3 -m uv pip install --quiet --editable ".[tpu,gcs]"' ;;
  run)
    arguments=
    for argument in "$@" --config.distributed.coordinator=auto; do
      # systemd puts variables in place of $NAME, and $ in place of $$.
      arguments+=" $(quote "${argument//\$/\$\$}")"
    done
    # A service: it outlives the connection, and gets SIGTERM and time to save
    # when the machine is taken away.
    # shellcheck disable=SC2029  # It is quoted for the host.
    ssh all "sudo systemctl stop behaviorlm 2>/dev/null
sudo systemctl reset-failed behaviorlm 2>/dev/null
sudo systemd-run --unit=behaviorlm --uid=\$(id -u) -p TimeoutStopSec=120 \\
  --working-directory=\"\$HOME/behaviorlm_jax\" \\
  \"\$HOME/behaviorlm_jax/.venv/bin/python\" -u -m behaviorlm_jax.main$arguments" ;;
  status)
    call gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
      --format='value(state.state)'
    ssh all 'echo $(hostname) $(systemctl show behaviorlm \
  --property=ActiveState,Result,ExecMainStatus)' ;;
  logs)
    ssh "$WORKER" 'sudo journalctl --unit=behaviorlm --output=cat --lines=100 \
  --follow' ;;
  stop)
    ssh all 'sudo systemctl stop behaviorlm' ;;
  delete)
    call gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" \
      --force ;;
  *)
    echo "error: launch/tpu_vm.sh [--dry-run] ACTION ARGS: ACTION is" \
      "'$action'; give create, install, run, status, logs, stop or delete." >&2
    exit 2 ;;
esac
