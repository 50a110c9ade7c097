"""Runs that are killed and run again end bit for bit as if left alone.

The child sends the real signal to itself after the n-th call of a function of
the program: no race decides in which stage it lands. `MetricsFile.write` runs
once a step, while the next step is on its way and the last checkpoint may be
half-written.
"""

import errno
import logging
import os
import shutil
import signal

import pytest

from behaviorlm_jax import run as run_lib
from behaviorlm_jax.cluster import preemption
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.train import checkpoints

pytestmark = pytest.mark.slow
STAGES = ('a_tuning', 'b_tuning')
ADAPTER = 'adapter/adapter_model.safetensors'
CHILD = """
import importlib, os, runpy, sys, time
path, name, number, at, waited_for = sys.argv[1:6]
del sys.argv[1:6]
owner = importlib.import_module(path)
*classes, name = name.split('.')
for part in classes:
  owner = getattr(owner, part)
inner, calls = getattr(owner, name), 0
def counted(*args, **options):
  global calls
  result = inner(*args, **options)
  calls += 1
  if calls == int(at):
    while waited_for and not os.path.exists(waited_for):
      time.sleep(0.01)
    os.kill(os.getpid(), int(number))
  return result
setattr(owner, name, counted)
runpy.run_module('behaviorlm_jax.main', run_name='__main__', alter_sys=True)
"""
WRITE = ('behaviorlm_jax.train.loop', 'MetricsFile.write')
SCORE = ('behaviorlm_jax.score.scorer', 'Scorer._batch')


@pytest.fixture
def run_until(run_command):
  """Runs the command until its n-th call of a function, which a signal ends.

  The signal waits until the path `waited_for` exists, if one is given.
  """

  def run(workdir, function, number, at, waited_for=''):
    program = ('-c', CHILD, *function, str(int(number)), str(at), str(waited_for))
    done = run_command(workdir, program=program)
    code = preemption.EXIT_CODE if number == signal.SIGTERM else -number
    assert done.returncode == code, done.stderr[-3000:]
    return done

  return run


@pytest.fixture
def assert_same(finished, read_rows, steps):
  """The work directory ended as the finished run did."""

  def check(workdir, stages=STAGES):
    for stage in stages:
      folder, whole = workdir / stage, finished / stage
      losses, expected = (
        [
          (row['step'], row['loss'], row.get('val_loss'))
          for row in read_rows(path / 'metrics.jsonl')
        ]
        for path in (folder, whole)
      )
      assert [step for step, *_ in losses] == list(range(1, steps + 1))
      assert losses == expected
      for name in (ADAPTER, 'predictions.parquet', 'evaluation.json'):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), (
          stage,
          name,
        )

  return check


def steps_of(folder, read_rows):
  return [row['step'] for row in read_rows(folder / 'metrics.jsonl')]


def saved(folder):
  """Steps of the finished checkpoints."""
  return sorted(
    int(path.name) for path in (folder / 'checkpoints').iterdir() if path.name.isdigit()
  )


def test_sigkill_in_each_stage_changes_nothing(
  run_until, run_command, assert_same, steps, copy_run
):
  workdir = copy_run('a_tuning', 'b_tuning')
  first, second = (workdir / stage for stage in STAGES)
  # Step 4 is noted right after the checkpoint of step 3 began to be written: in
  # stage a the kill waits until it is finished, in stage b it does not.
  run_until(workdir, WRITE, signal.SIGKILL, 4, first / 'checkpoints/3')
  assert saved(first) == [3]
  assert not (first / 'adapter').exists() and not second.exists()
  run_until(workdir, WRITE, signal.SIGKILL, steps - 3 + 4)
  assert (first / 'evaluation.json').exists()
  assert (second / 'metrics.jsonl').exists()
  assert not (second / 'adapter').exists()
  done = run_command(workdir)
  assert done.returncode == 0, done.stderr[-3000:]
  assert_same(workdir)


def test_sigterm_anywhere_saves_and_changes_nothing(
  run_until, run_command, assert_same, read_rows, steps, finished, copy_run
):
  workdir = copy_run('a_tuning', 'b_tuning', 'base')
  first, second = (workdir / stage for stage in STAGES)
  # While the untuned model is scored.
  done = run_until(workdir, SCORE, signal.SIGTERM, 1)
  assert done.stderr.splitlines()[-1].startswith('stopped by SIGTERM')
  assert not (workdir / 'base/evaluation.json').exists()
  assert not first.exists()
  # Step 1 is noted while step 2 runs; checkpoints are due at 3 and 6 alone.
  run_until(workdir, WRITE, signal.SIGTERM, 1)
  assert saved(first) == steps_of(first, read_rows)[-1:] == [2]
  assert not second.exists()
  run_until(workdir, WRITE, signal.SIGTERM, steps - 2 + 1)
  assert (first / 'evaluation.json').exists()
  assert saved(second) == steps_of(second, read_rows)[-1:] == [2]
  done = run_command(workdir)
  assert done.returncode == 0, done.stderr[-3000:]
  assert_same(workdir)
  for name in ('evaluation.json', 'predictions.parquet'):
    assert (workdir / 'base' / name).read_bytes() == (
      finished / 'base' / name
    ).read_bytes()


def remove_state(folder):
  shutil.rmtree(folder / 'state')


def remove_values(folder):
  """Leaves the structure but none of the arrays."""
  for path in (folder / 'state').rglob('*'):
    if path.is_file() and path.parent.name == 'd':
      path.unlink()


def cut_files(folder):
  for path in (folder / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_facts(folder):
  shutil.rmtree(folder / 'facts')


@pytest.mark.usefixtures('compile_once')
@pytest.mark.parametrize('tear', [remove_state, remove_values, cut_files, remove_facts])
def test_torn_checkpoint_is_skipped_with_a_warning(
  make_run_config, copy_run, assert_same, caplog, monkeypatch, tear
):
  monkeypatch.setattr(run_lib.report, 'write_report', lambda *_: None)
  workdir = copy_run('a_tuning/evaluation.json', 'a_tuning/adapter', 'b_tuning')
  tear(workdir / 'a_tuning/checkpoints/6')
  config = make_run_config()
  config.stages = ('a',)
  with caplog.at_level(logging.WARNING):
    run_lib.run(config, workdir)
  assert 'checkpoint 6 cannot be read' in caplog.text
  assert saved(workdir / 'a_tuning') == [3, 6]
  assert_same(workdir, ['a_tuning'])


@pytest.mark.usefixtures('compile_once')
def test_a_torn_first_checkpoint_is_as_a_kill_before_it(
  make_run_config, copy_run, assert_same, monkeypatch
):
  monkeypatch.setattr(run_lib.report, 'write_report', lambda *_: None)
  workdir = copy_run(
    'a_tuning/evaluation.json', 'a_tuning/adapter', 'b_tuning', 'a_tuning/checkpoints/6'
  )
  cut_files(workdir / 'a_tuning/checkpoints/3')
  config = make_run_config()
  config.stages = ('a',)
  run_lib.run(config, workdir)
  assert_same(workdir, ['a_tuning'])


@pytest.mark.usefixtures('compile_once')
def test_when_all_checkpoints_are_torn_none_is_deleted(make_run_config, copy_run):
  workdir = copy_run('a_tuning/evaluation.json', 'a_tuning/adapter', 'b_tuning')
  for step in '36':
    cut_files(workdir / 'a_tuning/checkpoints' / step)
  with pytest.raises(
    InputError,
    match=r'none of the checkpoints \[6, 3\] can '
    'be read; delete the folder',
  ):
    run_lib.run(make_run_config(), workdir)
  assert saved(workdir / 'a_tuning') == [3, 6]


@pytest.mark.usefixtures('compile_once')
@pytest.mark.parametrize('fault', [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_costs_no_checkpoint(
  make_run_config, copy_run, monkeypatch, fault
):
  workdir = copy_run('a_tuning/evaluation.json', 'a_tuning/adapter', 'b_tuning')

  def fail(*arguments, **options):
    raise OSError(fault, os.strerror(fault))

  monkeypatch.setattr(checkpoints.ocp.Checkpointer, 'restore', fail)
  with pytest.raises(OSError, match=os.strerror(fault)):
    run_lib.run(make_run_config(), workdir)
  assert saved(workdir / 'a_tuning') == [3, 6]


FULL = """
import errno, os, runpy, time
from behaviorlm_jax.train import loop

write = loop.MetricsFile.write
def full(self, row):
  if row['step'] < 5:
    return write(self, row)
  while not os.path.exists(os.environ['CHECKPOINT']):
    time.sleep(0.01)
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'metrics.jsonl')
loop.MetricsFile.write = full
runpy.run_module('behaviorlm_jax.main', run_name='__main__', alter_sys=True)
"""


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(
  run_command, copy_run, assert_same
):
  workdir = copy_run('b_tuning')
  done = run_command(
    workdir,
    program=('-c', FULL),
    environment={'CHECKPOINT': str(workdir / 'b_tuning/checkpoints/3')},
  )
  assert done.returncode == 2
  assert saved(workdir / 'b_tuning') == [3]
  assert 'Traceback' not in done.stderr
  assert done.stderr.splitlines()[-1] == (
    "error: [Errno 28] No space left on device: 'metrics.jsonl'; mend that "
    'and run the same command again: it goes on from what was finished.'
  )
  done = run_command(workdir)
  assert done.returncode == 0, done.stderr[-3000:]
  assert_same(workdir)
