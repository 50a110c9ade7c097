"""The Beam recipe: its shards join to what one machine prepares.

Skipped where apache-beam is not installed; the project does not need it.
"""

import pathlib
import sys

import pytest

from behaviorlm_jax import config as config_lib
from behaviorlm_jax import workdir as workdir_lib

pytest.importorskip('apache_beam')
sys.path.append(str(pathlib.Path(__file__).parents[2] / 'launch'))

import beam_prepare


@pytest.fixture
def log(tmp_path):
  path = tmp_path / 'log.csv'
  path.write_text('who,time,behavior\n' + ''.join(
      f'u{i % 7},2024-01-01 {i // 60:02d}:{i % 60:02d},{"abcd"[i // 7 % 4]}\n'
      for i in range(280)))
  return path


def flags(log, workdir, *more):
  stage1 = pathlib.Path(__file__).parents[2] / 'configs' / 'stage1.py'
  return ['--runner=DirectRunner', '--shards=3', f'--log={log}',
          f'--workdir={workdir}', f'--config={stage1}', *more]


def test_the_shards_of_a_pipeline_join_to_the_whole(tmp_path, log):
  user = '--config.data.columns.user=who'
  beam_prepare.main(flags(log, tmp_path / 'beam', user))
  config = config_lib.default()
  config.data.events, config.data.columns.user = str(log), 'who'
  prints = {workdir_lib.open_events(config, workdir_lib.make(
      tmp_path / name)).fingerprint for name in ('beam', 'whole')}
  assert len(prints) == 1


def test_what_a_task_refuses_ends_the_pipeline(tmp_path, log):
  with pytest.raises(Exception, match="has no column 'user'"):
    beam_prepare.main(flags(log, tmp_path / 'beam'))
