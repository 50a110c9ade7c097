"""launch/tpu_vm.sh: what gcloud is told, and what comes of it on a host."""

import pytest

COMMON = 'gcloud compute tpus tpu-vm ssh behaviorlm --zone=us-west4-a --worker=all '
EXPECTED = {
  'create': 'gcloud compute tpus queued-resources create behaviorlm '
  '--zone=us-west4-a --node-id=behaviorlm '
  '--accelerator-type=v5litepod-16 '
  '--runtime-version=v2-alpha-tpuv5-lite\n',
  'status': 'gcloud compute tpus queued-resources describe behaviorlm '
  "--zone=us-west4-a '--format=value(state.state)'\n"
  f"{COMMON}'--command=echo $(hostname) "
  '$(systemctl show behaviorlm \\\n'
  "  --property=ActiveState,Result,ExecMainStatus)'\n",
  'stop': f"{COMMON}'--command=sudo systemctl stop behaviorlm'\n",
  'delete': 'gcloud compute tpus queued-resources delete behaviorlm '
  '--zone=us-west4-a --force\n',
}


@pytest.mark.parametrize('action', EXPECTED)
def test_dry_run(launch, action):
  done = launch('tpu_vm.sh', '--dry-run', action)
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout == EXPECTED[action]


@pytest.mark.parametrize(
  'action', ['create', 'install', 'run', 'status', 'logs', 'stop', 'delete']
)
def test_what_a_dry_run_prints_is_what_runs(launch, programs, odd, action, tmp_path):
  for name in ('gcloud', 'git'):
    programs(name)
  settings = {'TMPDIR': str(tmp_path), 'SPOT': 'yes', 'NAME': 'mine'}
  printed = launch('tpu_vm.sh', '--dry-run', action, *odd, **settings).stdout
  assert not programs.calls('gcloud') and not programs.calls('git')
  assert launch('tpu_vm.sh', action, *odd, **settings).returncode == 0
  real = {name: programs.calls(name) for name in ('gcloud', 'git')}
  assert real['gcloud']
  launch.shell('-c', printed)
  for name, calls in real.items():
    assert programs.calls(name) == 2 * calls


def test_arguments_reach_systemd_on_the_host(launch, programs, odd):
  programs('gcloud')
  launch('tpu_vm.sh', 'run', *odd)
  [call] = programs.calls('gcloud')
  programs('sudo')
  launch.shell('-c', call[-1].removeprefix('--command='))
  *before, started = programs.calls('sudo')
  assert before == [
    ['systemctl', 'stop', 'behaviorlm'],
    ['systemctl', 'reset-failed', 'behaviorlm'],
  ]
  assert started[:2] == ['systemd-run', '--unit=behaviorlm']
  at = started.index('/home/me/behaviorlm_jax/.venv/bin/python')
  assert [word.replace('$$', '$') for word in started[at + 1 :]] == [
    '-u',
    '-m',
    'behaviorlm_jax.main',
    *odd,
    '--config.distributed.coordinator=auto',
  ]
  assert started[at + 5].count('$') == 2 * odd[1].count('$')


def test_spot_slices(launch):
  printed = launch('tpu_vm.sh', '--dry-run', 'create', SPOT='1').stdout
  assert printed.endswith(' --spot\n')


@pytest.mark.parametrize('action', [(), ('train',)])
def test_an_unknown_action_is_refused(launch, action):
  done = launch('tpu_vm.sh', *action)
  assert done.returncode == 2
  assert done.stderr == (
    f'error: launch/tpu_vm.sh [--dry-run] ACTION ARGS: ACTION is '
    f"'{''.join(action)}'; give create, install, run, status, logs, stop or "
    'delete.\n'
  )
