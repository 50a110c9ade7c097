"""The log that is made up, and a whole measurement of a small one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

sys.path.append(str(Path(__file__).parents[2] / 'benchmarks'))

import generated_log

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parents[2] / 'benchmarks' / 'data.py'


def test_a_log_follows_its_seed_and_is_like_a_real_one(tmp_path, monkeypatch):
  monkeypatch.setattr(generated_log, '_CHUNK', 30_000)
  paths = [tmp_path / f'{i}.parquet' for i in range(3)]
  for path, seed in zip(paths, (0, 0, 1), strict=True):
    generated_log.write(path, 100_000, seed)
  assert paths[0].read_bytes() == paths[1].read_bytes()
  assert paths[0].read_bytes() != paths[2].read_bytes()
  table = parquet.read_table(paths[0])
  assert len(table) == 100_000
  user, time = (np.asarray(table[name]) for name in ('user', 'time'))
  late = np.maximum.accumulate(time) - time
  assert late.max() <= np.timedelta64(9, 'h')
  sizes = np.sort(np.unique(user, return_counts=True)[1])[::-1]
  assert 900 < len(sizes) <= 1000
  assert sizes[: len(sizes) // 10].sum() > 0.3 * sizes.sum()  # A heavy tail.
  behaviors = np.unique(np.asarray(table['behavior']), return_counts=True)[1]
  assert len(behaviors) == generated_log.BEHAVIORS
  assert behaviors.max() > 50 * behaviors.min()


def test_a_small_log_is_measured_whole():
  done = subprocess.run(
    [
      sys.executable,
      PROGRAM,
      '--sizes=0.01,0.02',
      '--steps=1',
      '--batch=4',
      '--length=512',
      '--workers=0,1',
      '--shards=2',
      '--model=random://tiny',
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  rows = [line.split(' | ') for line in done.stdout.splitlines()]
  for phase in ('| shard 0 of 2', '| join', '| open and check', '| plan a', '| plan b'):
    assert len([row for row in rows if row[0] == phase]) == 2
  loaded = [row for row in rows if row[0] in ('| 0.01', '| 0.02')]
  assert sum('x ' in row[3] for row in loaded) == 4
