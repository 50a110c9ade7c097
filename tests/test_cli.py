"""What a command says, and how it ends, also under a burst of SIGTERMs."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import behaviorlm_jax

PACKAGE = Path(behaviorlm_jax.__file__).parent
PROGRAM = """
import time
from absl import app
from behaviorlm_jax import cli
from behaviorlm_jax.cluster import preemption
def work():
  print('ready', flush=True)
  {wait}
app.run(lambda argv: cli.run_command(argv, work))
"""
# Between two steps, where a stop is looked for; and inside of what is stopped
# at once and cleans up.
WAITS = {
  'between': """
  while True:
    time.sleep(0.01)
    preemption.check()""",
  'at once': """
  with preemption.at_once():
    try:
      time.sleep(60)
    finally:
      time.sleep(0.1)""",
}


@pytest.mark.parametrize('wait', WAITS)
def test_a_burst_of_sigterms_ends_with_the_code_of_one(wait):
  child = subprocess.Popen(
    [sys.executable, '-c', PROGRAM.format(wait=WAITS[wait].strip())],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert child.stdout.readline() == 'ready\n'
  while child.poll() is None:
    child.send_signal(signal.SIGTERM)
    time.sleep(0.005)
  _, said = child.communicate()
  assert child.returncode == 75, said
  assert said.splitlines()[-1].startswith('stopped by SIGTERM')


def test_a_run_without_torch_says_nothing_of_what_it_does_not_need(
  run_command, tmp_path
):
  program = (
    'import runpy, sys; sys.modules["torch"] = None; '
    'runpy.run_module("behaviorlm_jax.main", run_name="__main__", alter_sys=True)'
  )
  fields = {'stages': (), 'data.conversations': '', 'eval.max_samples': 5}
  done = run_command(tmp_path / 'work', fields, program=('-c', program))
  assert done.returncode == 0, done.stderr[-3000:]
  said = re.findall(r'^[IWE]\d{4} .* (\w+\.py):\d+\]', done.stderr, re.MULTILINE)
  own = {path.name for path in PACKAGE.rglob('*.py')}
  assert 'run.py' in said and set(said) <= own
  assert not re.search('transformers|pytorch|tpu', done.stderr, re.IGNORECASE)
  assert 'conversations 9 left out' in done.stderr  # A warning stays.
