"""What a run says it will do is what it does, and its table is readable."""

import json
import time
import types

import numpy as np
import pytest
from pyarrow import parquet

from behaviorlm_jax import config as config_lib
from behaviorlm_jax import curriculum, estimate, measure, setup
from behaviorlm_jax.cluster import processor, workspace
from behaviorlm_jax.train import sharding

pytestmark = pytest.mark.usefixtures('compile_once')


@pytest.fixture
def opened(make_run_config):
  """(work directory, fields) -> the setup of a run there."""

  def make(workdir, fields=None):
    config = make_run_config(fields)
    layout = sharding.make_layout(config.mesh, config.train)
    return setup.open_setup(config, workspace.local(workdir), layout)

  return make


def set_times(module, times, monkeypatch):
  """What a module's clock says, one time after the other."""
  clock = types.SimpleNamespace(monotonic=iter(times).__next__)
  monkeypatch.setattr(module, 'time', clock)


def tokens_of(this):
  return {name: tokens for name, _, tokens in estimate.parts_ahead(this)}


def test_a_new_work_directory_has_everything_ahead(opened, tmp_path):
  found = [part.name for part in estimate.parts_ahead(opened(tmp_path))]
  arm = lambda folder: [f'{folder}: retention', f'{folder}: evaluation']
  assert found == [
    *arm('base'),
    'a_tuning: training',
    *arm('a_tuning'),
    'b_tuning: training',
    *arm('b_tuning'),
    'report',
  ]


def test_of_a_finished_run_only_the_report_is_ahead(opened, finished):
  assert list(tokens_of(opened(finished))) == ['report']


def test_what_is_finished_is_not_ahead(opened, copy_run, steps):
  this = opened(
    copy_run('b_tuning/evaluation.json', f'b_tuning/checkpoints/{steps}', 'base')
  )
  found = {part.name: part.what for part in estimate.parts_ahead(this)}
  # The first checkpoint, of step 3, is still there.
  assert found.pop('b_tuning: training') == '3 steps, 1,152 tokens'
  assert list(found) == [
    'base: retention',
    'base: evaluation',
    'b_tuning: evaluation',
    'report',
  ]


def test_scored_tokens_are_those_that_the_model_is_given(opened, tmp_path, monkeypatch):
  this = opened(tmp_path)
  given = 0

  def note(program, tokens_of):
    def noted(*arguments):
      nonlocal given
      given += tokens_of(arguments)
      return program(*arguments)

    return noted

  nodes = sum(len(tree.tokens) for tree in this.scorer.trees)
  read = note(this.scorer._read, lambda given: np.count_nonzero(given[2]['segments']))
  monkeypatch.setattr(this.scorer, '_read', read)
  (tmp_path / 'base').mkdir()
  scored = measure.score(this, None, this.samples.every, tmp_path / 'base' / 'log_p')
  expected = given + nodes * len(scored.samples)
  # Rows are not quite full.
  assert 1 <= tokens_of(this)['base: evaluation'] / expected < 1.3


def test_retention_is_ahead_by_its_products(opened, tmp_path):
  this = opened(tmp_path)
  base, held = this.base.config, this.retention.conversations
  params = dict(this.model.params)
  layers = sum(x.size for name, x in params.items() if name.startswith('layers.'))
  operations = 0
  for conversation in held:
    for answer in conversation.answers:
      operations += 2 * layers + answer * 3 * 2 * base.vocab * base.embed
  expected = operations / (2 * layers)
  assert tokens_of(this)['base: retention'] == pytest.approx(expected)


@pytest.mark.parametrize('remat, passes', [('products', 3), ('none', 3), ('full', 4)])
def test_trained_tokens_are_those_of_plan_and_validation(
  opened, tmp_path, remat, passes
):
  this = opened(tmp_path, {'model.remat': remat})
  stage = config_lib.stage_of(this.config, 'a')
  plan = curriculum.make_plan(this, stage, tmp_path, {})
  lesson = curriculum.lesson(this, stage, plan)
  validation = curriculum.validation(this, stage)
  size = lambda lesson: sum(
    lesson.assemble(row)['tokens'].size for row in lesson.plan.rows
  )
  # Two checkpoints, each of which is validated.
  expected = passes * size(lesson) + 2 * size(validation)
  assert tokens_of(this)['a_tuning: training'] == expected


def test_candidates_ahead_are_those_that_are_scored(opened, copy_run, run_stages):
  fields = {'difficulty.score': 'nll', 'difficulty.candidates': 6}
  workdir = copy_run('b_tuning', 'base', 'a_tuning/config.json')
  this = opened(workdir, fields)
  found = {part.name: part for part in estimate.parts_ahead(this)}
  run_stages(fields, workdir, only='b')
  table = parquet.read_table(workdir / 'b_tuning/difficulty.parquet')
  assert found['b_tuning: difficulty'].what == f'{len(table)} training events'
  seconds = json.loads((workdir / 'timing.json').read_text())
  assert seconds.keys() >= found.keys()


def test_the_table_has_a_line_for_each_part_and_its_time(opened, tmp_path, monkeypatch):
  this = opened(tmp_path, {'stages': (), 'retention.conversations': 0.0})
  layers = [x for name, x in this.model.params.items() if name.startswith('layers.')]
  # With which a token takes a second.
  speed = 2 * sum(x.size for x in layers) / estimate._REACHED
  monkeypatch.setattr(processor, 'product_speed', lambda *shape: speed)
  seconds = (60 + 75) * estimate.event_tokens(this)
  assert estimate.ahead(this).splitlines() == [
    '  base: evaluation      60 test events, 75 validation events         '
    + estimate.about(seconds),
    '  report                tables and figures',
  ]


@pytest.mark.parametrize(
  'seconds, text',
  [
    (0.2, '1 s'),
    (7.1, '8 s'),
    (31, '35 s'),
    (90, '90 s'),
    (91, '2 min'),
    (200, '4 min'),
    (25.5 * 60, '30 min'),
    (100 * 60, '2 h'),
    (50 * 3600, '3 days'),
  ],
)
def test_times_are_rounded_up(seconds, text):
  assert estimate.about(seconds) == f'about {text}'


def test_a_clock_counts_a_part_without_those_inside_of_it(monkeypatch):
  set_times(setup, [0, 10, 14, 15, 20, 23], monkeypatch)
  clock = setup.Clock()
  with clock.part('plan'), clock.part('difficulty'):
    pass
  with clock.part('plan'):
    pass
  assert clock.seconds == {'difficulty': 4, 'plan': 15 - 4 + 3}


def test_what_an_earlier_call_measured_stays(tmp_path):
  place = workspace.local(tmp_path)
  for seconds in ({'log': 30.04, 'report': 10.0}, {'report': 99.0, 'sasrec': 1.0}):
    clock = setup.Clock()
    clock.seconds = seconds
    clock.keep(place)
  assert json.loads((tmp_path / 'timing.json').read_text()) == {
    'log': 30.0,
    'report': 10.0,
    'sasrec': 1.0,
  }


def test_speed_is_operations_over_seconds(monkeypatch):
  set_times(processor, [0, 1], monkeypatch)
  # Two rounds of two products, in one second.
  rounds, operations = 2, 2 * (2 * 2048 * 8 * 16)
  assert processor.product_speed(8, 16, 'float32') == rounds * operations


def test_speed_is_about_that_of_numpy():
  x, y = np.ones((2048, 512), np.float32), np.ones((512, 512), np.float32)
  x @ y
  begin = time.monotonic()
  for _ in range(20):
    x @ y
  theirs = 20 * 2 * x.size * 512 / (time.monotonic() - begin)
  # Within what other work on the machine may change.
  assert theirs / 20 < processor.product_speed(512, 512, 'float32') < theirs * 20
