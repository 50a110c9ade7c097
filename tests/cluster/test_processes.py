"""Two real processes make one run: what one process makes, written once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow import parquet

from behaviorlm_jax.cluster import preemption, processes, workspace

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STAGES = ('a_tuning', 'b_tuning')


@pytest.fixture(scope='module')
def of_two(run_two, tmp_path_factory):
  """Work directory of a whole run of two processes, each with half of the rows
  and two devices that share its weights; read-only."""
  workdir = tmp_path_factory.mktemp('two') / 'work'
  code, err = run_two(
    workdir, '--config.mesh.tensor=2', environment={'JAX_NUM_CPU_DEVICES': '2'}
  )
  assert code == 0, err[-3000:]
  return workdir


def test_two_processes_make_what_one_makes(of_two, assert_same_numbers):
  assert_same_numbers(of_two)
  assert (of_two / 'hosts.txt').read_text().startswith('2 processes')
  assert (of_two / 'report.html').exists()
  assert not list(of_two.rglob('*.tmp'))


def test_four_devices_make_what_one_makes(run_command, tmp_path, assert_same_numbers):
  done = run_command(
    tmp_path / 'work',
    {'mesh.fsdp': 2, 'mesh.tensor': 2},
    environment={'JAX_NUM_CPU_DEVICES': '4'},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert_same_numbers(tmp_path / 'work')


def test_one_table_of_difficulty_gives_one_plan(run_two, run_command, copy_run):
  workdir = copy_run('b_tuning')
  fields = {'difficulty.score': 'nll', 'stages': ('b',)}
  done = run_command(workdir, fields)
  assert done.returncode == 0, done.stderr[-3000:]
  plan = workdir / 'b_tuning/plan.parquet'
  facts = parquet.read_schema(plan).metadata
  for path in (plan, plan.with_name('evaluation.json')):
    path.unlink()
  flags = [f'--config.{name}={value}' for name, value in fields.items()]
  code, err = run_two(workdir, *flags)
  assert code == 0, err[-3000:]
  assert parquet.read_schema(plan).metadata == facts  # Its hash, too.


def test_sigterm_stops_all_at_one_step_which_is_saved(start_two, copy_run, read_rows):
  workdir = copy_run('a_tuning', 'b_tuning')
  # A checkpoint at every step: Orbax must not take the signal for itself.
  process = start_two(workdir, '--config.a.steps=400', '--config.checkpoint.every=1')
  folder = workdir / 'a_tuning'
  metrics = folder / 'metrics.jsonl'
  deadline = time.monotonic() + 200
  while (
    process.poll() is None
    and time.monotonic() < deadline
    and not (metrics.exists() and metrics.read_text().count('\n') > 2)
  ):
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  code, err = process.finish()
  assert code == preemption.EXIT_CODE, err[-3000:]
  assert len(re.findall(r'\[\d\] stopped by SIGTERM', err)) == 2
  last = read_rows(metrics)[-1]['step']
  assert 2 < last < 400
  assert (
    max(
      int(path.name)
      for path in (folder / 'checkpoints').iterdir()
      if path.name.isdigit()
    )
    == last
  )


def test_wrong_input_ends_both_with_its_sentence(run_two, tmp_path):
  code, err = run_two(tmp_path / 'work', '--config.data.events=none.csv')
  assert code == 2
  lines = sorted(line for line in err.splitlines() if '] error: ' in line)
  assert lines[0].startswith("[0] error: data.events: 'none.csv' does not ex")
  assert lines[1:] == ['[1] error: process 0 failed; its log says at what.']


def test_processes_with_other_devices_are_refused(start_two, tmp_path):
  python = own_flags(tmp_path, environment='JAX_NUM_CPU_DEVICES=2')
  process = start_two(tmp_path / 'work', environment={'PYTHON': python})
  code, err = process.finish()
  assert code == 2, err[-3000:]
  assert (
    err.count(
      'error: processes differ in their devices: process 0 has 1, '
      'process 1 has 2; give each the same number.'
    )
    == 2
  )


def own_flags(folder, flag='', environment=''):
  """A Python that gives the second process a flag or variable of its own."""
  python = folder / 'python'
  python.write_text(f"""#!/bin/bash
for last; do :; done
if [[ $last == *process=1 ]]; then
  set -- "$@" {flag}
  export {environment or 'A=1'}
fi
exec {sys.executable} "$@"
""")
  python.chmod(0o755)
  return str(python)


@pytest.mark.parametrize(
  'mine, field',
  [
    (
      '--config.a.learning_rate=0.5',
      r'config.a.learning_rate: 0.\d+ '
      r'and 0.\d+',
    ),
    ('--workdir={other}', 'what they read in .*hosts.txt .--workdir must be '),
  ],
)
def test_processes_that_differ_are_refused(start_two, tmp_path, mine, field):
  python = own_flags(tmp_path, mine.format(other=tmp_path / 'other'))
  process = start_two(tmp_path / 'work', environment={'PYTHON': python})
  code, err = process.finish()
  assert code == 2, err[-3000:]
  errors = [line for line in err.splitlines() if '] error: ' in line]
  assert len(errors) == 2 and all(re.search(field, line) for line in errors)
  assert not (tmp_path / 'work/events').exists()


PROGRAM = """
import json, sys
import jax
from behaviorlm_jax import config
from behaviorlm_jax.cluster import processes

settings = config.default().distributed
settings.update({'coordinator': 'auto', 'timeout': 60})
processes.meet(settings)
processes.start(settings)
me, said = jax.process_index(), {}
def fail():
  raise OSError('no room')
def note(name, function, *arguments):
  try:
    said[name] = function(*arguments)
  except (OSError, ValueError, processes.Elsewhere) as error:
    said[name] = f'{type(error).__name__}: {error}'
note('count', jax.process_count)
note('shared', processes.shared, ['it', 5 + me])
note('all', processes.every, True)
note('one', processes.every, me == 1)
note('first', processes.on_primary, lambda: 'done')
note('fails', processes.on_primary, fail)
note('agrees', processes.assert_same, {'this': 'same'})
note('differs', processes.assert_same, {'this': 'same', 'that': f'{me} and more' * me})
print(json.dumps(said))
"""


def test_auto_takes_what_slurm_says_and_processes_go_together(command_environment):
  """As srun sets it; the port follows from the number of the job."""
  started = []
  for process in range(2):
    slurm = {
      'SLURM_JOB_ID': str(os.getpid()),
      'SLURM_NTASKS': '2',
      'SLURM_STEP_NODELIST': 'localhost',
      'SLURM_STEP_NUM_NODES': '1',
      'SLURM_PROCID': str(process),
      'SLURM_LOCALID': str(process),
    }
    started.append(
      subprocess.Popen(
        [sys.executable, '-c', PROGRAM],
        env=command_environment | slurm,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
      )
    )
  said = []
  for process in started:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    said.append(json.loads(out.splitlines()[-1]))
  for name, value in {
    'count': 2,
    'shared': ['it', 5],
    'all': True,
    'one': False,
    'agrees': None,
  }.items():
    assert [one[name] for one in said] == [value, value]
  assert [one['first'] for one in said] == ['done', None]
  assert said[0]['fails'] == 'OSError: no room'
  assert said[1]['fails'] == 'Elsewhere: process 0 failed; its log says at what'
  assert said[0]['differs'] == said[1]['differs']
  assert re.fullmatch(
    r'InputError: process 0 \(.+\) and process 1 \(.+\) differ in that:  and '
    r'1 and more; give all processes the same\.',
    said[0]['differs'],
  )


def test_auto_without_any_cluster_is_refused(run_command, tmp_path):
  done = run_command(tmp_path / 'work', {'distributed.coordinator': 'auto'})
  assert done.returncode == 2
  assert (
    'error: distributed.coordinator is auto, but there is no sign of a '
    'TPU pod, GKE, Slurm or MPI here'
  ) in done.stderr
  assert 'Traceback' not in done.stderr


def test_local_launcher_wants_a_number():
  done = subprocess.run(
    [str(ROOT / 'launch/local.sh'), '--workdir=x'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr == (
    "error: launch/local.sh N ARGS: N is '--workdir=x'; give how many processes.\n"
  )


def test_one_process_decides_by_itself(tmp_path):
  alone = workspace.local(tmp_path)
  assert processes.is_primary() and not processes.several()
  assert processes.on_primary(lambda x: x + 1, 1) == 2
  assert alone.exists(tmp_path) and not alone.exists(tmp_path / 'none')
  assert processes.shared([3]) == [3]
  assert processes.every(True) and not processes.every(False)
  processes.assert_same({'anything': os.urandom(4).hex()})


def test_what_fails_on_the_first_host_is_raised_there():
  def fail():
    raise OSError('no')

  with pytest.raises(OSError, match='no'):
    processes.on_primary(fail)
