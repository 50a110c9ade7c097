"""Odd but right input runs with warnings, and what it left is its own."""

import io
import json
import logging
import shutil
from pathlib import Path

import pytest

from behaviorlm_jax import ablations
from behaviorlm_jax import run as run_lib

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compile_once')]


@pytest.fixture(scope='module')
def odd_input(tmp_path_factory, make_log, write_model):
  """A log without tail, with a behavior of the test split; a plain model."""
  folder = tmp_path_factory.mktemp('odd')
  path = make_log(folder / 'log.csv')
  text = path.read_text().replace('airport', 'gym').replace('hotel', 'cafe')
  lines = text.splitlines()
  lines[-1] = lines[-1].rpartition(',')[0] + ',surprise'
  path.write_text('\n'.join(lines) + '\n')
  model = write_model(folder / 'model')
  return {'data.events': str(path), 'model.address': str(model)}


@pytest.fixture(scope='module')
def odd_run(tmp_path_factory, odd_input, make_run_config):
  """Work directory of a run of stage a on it, and its warnings."""
  workdir = tmp_path_factory.mktemp('odd_run') / 'work'
  lines = io.StringIO()
  handler = logging.StreamHandler(lines)
  handler.setLevel(logging.WARNING)
  logger = logging.getLogger('absl')
  logger.addHandler(handler)
  try:
    run_lib.run(
      ablations.ablate(make_run_config(odd_input), ['no_balanced_stage']), workdir
    )
  finally:
    logger.removeHandler(handler)
  (workdir / 'warnings.txt').write_text(lines.getvalue())
  return workdir


def test_odd_input_is_warned_of_and_runs(odd_run):
  warnings = (odd_run / 'warnings.txt').read_text()
  assert 'no tail behavior' in warnings
  assert 'only in the test split: 1' in warnings
  assert 'has no chat template' in warnings
  labels = json.loads((odd_run / 'a_tuning/labels.json').read_text())
  assert {label['name'] for label in labels} == {'home', 'work', 'gym', 'cafe'}
  assert (odd_run / 'report.md').exists()


@pytest.mark.parametrize(
  ('fields', 'warned'), [({}, False), ({'data.split': (0.5, 0.001, 0.499)}, True)]
)
def test_a_validation_split_without_a_behavior_or_any_is_no_obstacle(
  make_log, run_stages, tmp_path, caplog, fields, warned
):
  path = make_log(tmp_path / 'log.csv')
  lines = path.read_text().splitlines()
  for user in range(20):  # In training alone.
    at = 1 + 40 * user + 8
    lines[at] = lines[at].rpartition(',')[0] + ',museum'
  path.write_text('\n'.join(lines) + '\n')
  run_stages({'data.events': str(path), 'a.steps': 1, 'b.steps': 1, **fields})
  work = tmp_path / 'work'
  assert (work / 'b_tuning/evaluation.json').exists()
  assert ('the validation split has no sample' in caplog.text) == warned


def test_log_or_model_that_changed_in_place(odd_input, odd_run, refused, write_model):
  options = {'workdir': odd_run, 'ablations': ['no_balanced_stage']}
  model, log = (Path(odd_input[name]) for name in ('model.address', 'data.events'))
  write_model(model, seed=1)
  refused('was made from another base model', odd_input, **options)
  write_model(model)
  log.write_text(log.read_text().replace('home', 'club'))
  refused('another content', odd_input, **options)


def test_plan_of_another_log_and_model(refused, copy_run, odd_run):
  workdir = copy_run('a_tuning/evaluation.json')
  shutil.copy(odd_run / 'a_tuning/plan.parquet', workdir / 'a_tuning')
  refused(
    r'a_tuning/plan\.parquet was made from other events, another model', workdir=workdir
  )
