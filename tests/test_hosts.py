"""Two real processes make one run: what one process makes, written once."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from pyarrow import parquet

from behaviorlm_jax import hosts
from behaviorlm_jax.train import preemption

ROOT = pathlib.Path(__file__).parents[1]
STAGES = ('a_tuning', 'b_tuning')


@pytest.fixture(scope='session')
def start_two(run_fields, command_environment):
  """Starts launch/local.sh with two processes; its Popen.

  `flags`: of both; `environment`: variables to add.
  """

  def start(workdir, *flags, environment=None):
    values = run_fields | {
        f'data.columns.{name}': name for name in ('user', 'time', 'behavior')}
    command = [str(ROOT / 'launch/local.sh'), '2',
               '--config=configs/quickstart.py', f'--workdir={workdir}',
               *(f'--config.{name}={value}' for name, value in values.items()),
               *flags]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=command_environment | {
            'PYTHON': sys.executable} | (environment or {}))
  return start


@pytest.fixture(scope='session')
def run_two(start_two):
  """The same, to its end: (code, stderr)."""

  def run(*arguments, **options):
    process = start_two(*arguments, **options)
    _, err = process.communicate(timeout=300)
    return process.returncode, err
  return run


@pytest.fixture(scope='module')
def of_two(run_two, tmp_path_factory):
  """Work directory of a whole run of two processes; read-only."""
  workdir = tmp_path_factory.mktemp('two') / 'work'
  code, err = run_two(workdir)
  assert code == 0, err[-3000:]
  return workdir


def plan_rows(folder):
  return parquet.read_table(folder / 'plan.parquet')['segments'].to_pylist()


@pytest.mark.slow
def test_two_processes_make_what_one_makes(of_two, finished, read_rows, steps):
  for stage in STAGES:
    one, other = finished / stage, of_two / stage
    assert plan_rows(one) == plan_rows(other)
    losses, expected = (
        [(row['step'], row['loss'], row.get('val_loss', 0.0)) for row in
         read_rows(folder / 'metrics.jsonl')] for folder in (other, one))
    assert len(losses) == steps  # Written once.
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    found, expected = (json.loads((folder / 'evaluation.json').read_text())
                       for folder in (other, one))
    for group in ('all', 'anchor', 'tail'):
      assert found[group] == pytest.approx(expected[group], abs=1e-4)
  found, expected = (
      parquet.read_table(folder / 'a_tuning/log_probs.parquet')['log_p']
      .to_pylist() for folder in (of_two, finished))
  np.testing.assert_allclose(found, expected, atol=1e-4)
  assert (of_two / 'hosts.txt').read_text().startswith('2 processes')
  assert (of_two / 'report.html').exists()
  assert not list(of_two.rglob('*.tmp'))


@pytest.mark.slow
def test_one_table_of_difficulty_gives_one_plan(run_two, finished, copy_run):
  workdir = copy_run('b_tuning/plan.parquet', 'b_tuning/evaluation.json',
                     'b_tuning/adapter', 'b_tuning/checkpoints')
  code, err = run_two(workdir)
  assert code == 0, err[-3000:]
  facts = [parquet.read_schema(folder / 'b_tuning/plan.parquet').metadata
           for folder in (workdir, finished)]
  assert facts[0] == facts[1]  # Its hash, too.


@pytest.mark.slow
def test_sigterm_stops_all_and_fewer_go_on(
    start_two, run_command, finished, copy_run, read_rows, steps):
  workdir = copy_run('a_tuning', 'b_tuning')
  process = start_two(workdir, '--config.checkpoint.every=100')
  metrics = workdir / 'a_tuning/metrics.jsonl'
  while process.poll() is None and not (
      metrics.exists() and metrics.read_text().count('\n')):
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=120)
  if process.returncode:  # Six tiny steps may be over before all have agreed.
    assert process.returncode == preemption.EXIT_CODE, err[-3000:]
    assert len(re.findall(r'\[\d\] stopped by SIGTERM', err)) == 2
  done = run_command(workdir, {'checkpoint.every': 100})
  assert done.returncode == 0, done.stderr[-3000:]
  for stage in STAGES:
    found, expected = ([row['loss'] for row in
                        read_rows(folder / stage / 'metrics.jsonl')]
                       for folder in (workdir, finished))
    assert len(found) == steps
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('mine, field', [
    ('--config.train.learning_rate=0.5', r'config.train.learning_rate: 0.\d+ '
     r'and 0.\d+'),
    ('--workdir={other}', 'what they read in .*hosts.txt .--workdir must be ')])
def test_processes_that_differ_are_refused(
    start_two, tmp_path, mine, field, run_fields):
  """The second process gets a flag of its own, by a Python that adds it."""
  python = tmp_path / 'python'
  python.write_text(f'''#!/bin/bash
for last; do :; done
if [[ $last == *process=1 ]]; then
  set -- "$@" "{mine.format(other=tmp_path / 'other')}"
fi
exec {sys.executable} "$@"
''')
  python.chmod(0o755)
  process = start_two(tmp_path / 'work', environment={'PYTHON': str(python)})
  _, err = process.communicate(timeout=120)
  assert process.returncode == 2, err[-3000:]
  errors = [line for line in err.splitlines() if '] error: ' in line]
  assert len(errors) == 2 and all(re.search(field, line) for line in errors)
  assert not (tmp_path / 'work/events').exists()


def test_local_launcher_wants_a_number():
  done = subprocess.run([str(ROOT / 'launch/local.sh'), '--workdir=x'],
                        capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert done.stderr == ("error: launch/local.sh N ARGS: N is '--workdir=x'; "
                         'give how many processes.\n')


def test_one_process_decides_by_itself(tmp_path):
  assert hosts.leader() and not hosts.several()
  assert hosts.first(lambda x: x + 1, 1) == 2
  assert hosts.exists(tmp_path) and not hosts.exists(tmp_path / 'none')
  assert hosts.told(3) == 3 and hosts.every(True) and not hosts.every(False)
  hosts.agree({'anything': os.urandom(4).hex()})


def test_what_fails_on_the_first_host_is_raised_there():
  def fail():
    raise OSError('no')

  with pytest.raises(OSError, match='no'):
    hosts.first(fail)
