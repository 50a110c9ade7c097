"""The tasks of the Beam recipe join to what one machine prepares.

Beam itself, which the project does not need, is left out.
"""

import importlib.util
from pathlib import Path

import pytest

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.cluster import workspace
from behaviorlm_jax.data import prepared

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prepare():
  """The function that Beam maps over the numbers of shards."""
  spec = importlib.util.spec_from_file_location(
    'beam_prepare', ROOT / 'launch/beam_prepare.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.prepare


@pytest.fixture
def log(tmp_path, make_log):
  return make_log(tmp_path / 'log.csv', users=7)


def flags(log, workdir, *more):
  return [
    f'--config={ROOT}/configs/stage1.py',
    f'--workdir={workdir}',
    f'--config.data.events={log}',
    *more,
  ]


def test_the_shards_of_all_elements_join_to_the_whole(tmp_path, log, prepare):
  for index in range(2):
    assert prepare(index, 2, flags(log, tmp_path / 'beam')) == f'{index}/2'
  config = config_lib.default()
  config.data.events = str(log)
  prints = {
    prepared.load_events(config, workspace.local(tmp_path / name)).fingerprint
    for name in ('beam', 'whole')
  }
  assert len(prints) == 1


def test_what_a_task_refuses_ends_the_pipeline(tmp_path, log, prepare):
  with pytest.raises(
    RuntimeError,
    match='shard 0/2 ended with exit code 2: '
    r".*has no column 'who'",
  ):
    prepare(0, 2, flags(log, tmp_path / 'beam', '--config.data.columns.user=who'))
