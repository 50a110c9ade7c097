"""How a command ends: exit codes, also under a burst of SIGTERMs."""

import signal
import subprocess
import sys
import time

import pytest

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
