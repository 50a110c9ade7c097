#!/usr/bin/env bash
# Runs N processes of the trainer on this machine, as a pod runs one a host:
#
#   launch/local.sh N --config=configs/quickstart.py --workdir=runs/two
#
# Lines of process i begin with [i]. SIGTERM and SIGINT go to all. The exit code
# is 1 or 2 if that of any process is: see what it says. Otherwise that of the
# first that did not end well: 75 and above, run the same command again.
# JAX_NUM_CPU_DEVICES=M gives each M devices (on CPU).
set -uo pipefail
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "error: launch/local.sh N ARGS: N is '${1:-}'; give how many processes." >&2
  exit 2
fi
processes=$1
shift
python=${PYTHON:-python}
port=$("$python" -c 'import socket
with socket.create_server(("", 0)) as s: print(s.getsockname()[1])')

pids=()
for ((i = 0; i < processes; i++)); do
  "$python" -u -m behaviorlm_jax.main "$@" \
    --config.distributed.coordinator="localhost:$port" \
    --config.distributed.processes="$processes" \
    --config.distributed.process="$i" \
    > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT

code=0
for pid in "${pids[@]}"; do
  wait "$pid"
  ended=$?
  while kill -0 "$pid" 2>/dev/null; do  # A signal ended the wait, not it.
    wait "$pid"
    ended=$?
  done
  # What went wrong in one explains the rest.
  if ((code == 0 || (ended > 0 && ended < 75))); then
    code=$ended
  fi
done
exit "$code"
