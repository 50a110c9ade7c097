"""Three faults of the campaign, one of each sort; all of them take an hour."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / 'benchmarks'))

import faults

pytestmark = pytest.mark.slow


def numbers():
  """One fault of a single process, one of two, one that goes on with fewer."""
  drawn = faults.draw()
  wanted = (('torn', 1, 1), ('kill', 2, 2), ('kill', 2, 1))
  return [
    next(
      fault.number
      for fault in drawn
      if (fault.kind, fault.processes, fault.after) == one
    )
    for one in wanted
  ]


def test_three_faults_end_as_if_nothing_was(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      faults.__file__,
      f'--folder={tmp_path / "campaign"}',
      '--only',
      *map(str, numbers()),
    ],
    capture_output=True,
    text=True,
    check=False,
    timeout=600,
  )
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  assert done.stdout.splitlines()[-1] == '3 faults, 3 as they should be'


def test_the_campaign_is_large_and_always_the_same():
  drawn = faults.draw()
  assert len(drawn) >= 60 and drawn == faults.draw()
  assert {fault.kind for fault in drawn} == {
    'kill',
    'stop',
    'torn',
    'full',
    'unreadable',
    'nan',
    'freeze',
  }
  assert all(
    set(fault.hit) <= set(range(fault.processes)) and fault.hit for fault in drawn
  )
  assert 0 < min(f.share for f in drawn) < 0.1 < 0.9 < max(f.share for f in drawn) < 1
