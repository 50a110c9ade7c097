"""Ablations and the ways to start stages: what each run leaves.

Runs begin as copies of the finished run without what they are about to make,
so that only the ablated stages run.
"""

import collections
import importlib.util
import json
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from pyarrow import parquet

from behaviorlm_jax import ablations, curriculum, setup
from behaviorlm_jax import config as config_lib
from behaviorlm_jax import run as run_lib
from behaviorlm_jax.cluster import workspace
from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.model import lora
from behaviorlm_jax.train import sharding

CONFIGS = Path(__file__).parents[1] / 'configs'
ADAPTER = 'adapter/adapter_model.safetensors'
# Enough draws to tell natural frequencies from balance.
MORE = {'a.steps': 24, 'checkpoint.every': 24}
# What ablations of stage b have something to take from; only what was drawn counts.
SCORED = {'difficulty.score': 'nll', 'plan.neighbours': 0.0}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compile_once')]


@pytest.fixture
def ablated(copy_run, make_run_config, monkeypatch):
  """Runs the stages that ablations leave, above a finished stage a if `keep`;
  returns the work directory."""
  # The report has tests of its own and takes longer than a tiny stage.
  monkeypatch.setattr(run_lib.report, 'write_report', lambda *_: None)

  def run(*names, only=None, fields=None):
    gone = ['b_tuning'] if only == 'b' else ['a_tuning', 'b_tuning']
    workdir = copy_run(*gone, name='-'.join(names) or 'none')
    config = make_run_config(fields)
    config.stages = (only,) if only else ('a', 'b')
    run_lib.run(ablations.ablate(config, names), workdir)
    return workdir

  return run


@pytest.fixture
def script_config(make_run_config):
  """The config of a file in configs/, with the settings of the tests."""

  def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return make_run_config(config=module.get_config())

  return load


def segments(folder):
  table = parquet.read_table(folder / 'plan.parquet')
  return [segment for row in table['segments'].to_pylist() for segment in row]


def kinds(folder):
  return {segment['kind'] for segment in segments(folder)}


def drawn(workdir, stage):
  """{behavior: targets of the stage's plan}."""
  events = events_lib.open_events(workdir / 'events')
  targets = [t for s in segments(workdir / stage) for t in s['targets']]
  counts = np.bincount(events.behavior[targets], minlength=6)
  return {b.name: int(n) for b, n in zip(events.behaviors, counts, strict=True)}


def recorded(folder):
  return json.loads((folder / 'config.json').read_text())['ablations']


def is_finished(folder):
  return (
    (folder / 'evaluation.json').exists()
    and (folder / 'predictions.parquet').exists()
    and (folder / ADAPTER).exists()
  )


def test_no_auxiliary_leaves_conversations_out(ablated):
  workdir = ablated('no_auxiliary', only='a')
  assert kinds(workdir / 'a_tuning') == {'window'}
  assert recorded(workdir / 'a_tuning') == ['no_auxiliary']
  assert is_finished(workdir / 'a_tuning')


@pytest.mark.parametrize(
  'fields', [{'a.prior': 'uniform'}, {'a.softmax': 'vocabulary'}]
)
def test_other_losses_teach_other_things(ablated, finished, read_rows, fields):
  folder = ablated(only='a', fields=fields) / 'a_tuning'
  assert is_finished(folder)
  losses = [
    [row['loss'] for row in read_rows(one / 'metrics.jsonl')[:2]]
    for one in (folder, finished / 'a_tuning')
  ]
  assert losses[0] != losses[1] and np.isfinite(losses).all()


@pytest.mark.parametrize(
  ('stage', 'content', 'budget'),
  [
    ('a', 'anchors', 'balanced'),
    ('a', 'all', 'balanced'),
    ('one', 'all', 'balanced'),
    ('one', 'anchors', 'balanced'),
    ('one', 'balanced', 'natural'),
    ('b', 'all', 'natural'),
    ('b', 'anchors', 'tempered'),
  ],
)
def test_what_a_stage_draws_is_known_beforehand(
  finished, make_run_config, stage, content, budget
):
  """Or counted, where behaviors take turns."""
  config = make_run_config({'a.content': content, 'plan.budget': budget})
  events = events_lib.open_events(finished / 'events')
  samples = samples_lib.of_split(events, 'train', config.plan.min_context).all()
  counts = np.bincount(events.behavior[samples], minlength=events.known)
  anchors = events.anchors
  segment = plan_lib.Segment('window', 0, 10, [3, 4, 9], [1.0, 0.5, 1.0], 0, 0)
  plan = plan_lib.Plan([[segment], [segment]], 0, '')
  found = curriculum.drawn_counts(
    types.SimpleNamespace(config=config, events=events),
    config_lib.stage_of(config, stage),
    plan,
  )
  if (stage, content) == ('a', 'anchors'):
    counts[~anchors] = 0
  elif content == 'balanced' or budget == 'tempered':
    counts = np.zeros(events.known)
    for target, weight in zip(segment.targets, segment.weights, strict=True):
      counts[events.behavior[target]] += 2 * weight
  np.testing.assert_array_equal(found, counts)


@pytest.mark.parametrize(
  ('content', 'softmax', 'group'),
  [
    ('anchors', 'names', 'anchor'),
    ('all', 'names', 'known'),
    ('anchors', 'vocabulary', None),
  ],
)
def test_anchors_taught_alone_compete_with_anchors_alone(
  make_run_config, tmp_path, content, softmax, group
):
  config = make_run_config({'a.content': content, 'a.softmax': softmax})
  layout = sharding.make_layout(config.mesh, config.train)
  found = setup.open_setup(config, workspace.local(tmp_path), layout)
  stage = config_lib.stage_of(config, 'a')
  tree = curriculum.tree_of(found, stage)
  stream = curriculum.segments(found, stage, 'train', np.random.default_rng(0))
  plan = plan_lib.take(stream, 4 * config.train.batch, config.train.length, '')
  lesson = curriculum.lesson(found, stage, plan)
  if group is None:
    assert tree is None and lesson.names is None
    return
  groups = [b.group for b in found.events.behaviors[: found.events.known]]
  size = groups.count('anchor') if group == 'anchor' else len(groups)
  assert len(tree.paths) == size
  first = {int(label[0]) for label in found.prompts.labels[:size]}
  assert set(lesson.names.tokens[0].tolist()) - {-1} == first
  row = lesson.assemble(plan.rows[0])
  assert (row['answer_nodes'] >= 0).any()


@pytest.mark.parametrize('prior', ['natural', 'uniform'])
def test_stage_b_allows_for_how_often_it_draws_a_behavior(
  ablated, make_run_config, monkeypatch, prior
):
  seen = []
  names_of = curriculum.loss_lib.names_of

  def spied(tree, *counts):
    seen.append(counts)
    return names_of(tree, *counts)

  monkeypatch.setattr(curriculum.loss_lib, 'names_of', spied)
  workdir = ablated(only='b', fields={'b.prior': prior, 'plan.neighbours': 3.0})
  expected = collections.Counter()
  events = events_lib.open_events(workdir / 'events')
  for segment in segments(workdir / 'b_tuning'):
    for target, weight in zip(segment['targets'], segment['weights'], strict=True):
      expected[events.behavior[target]] += weight
  trained, validated = seen
  np.testing.assert_allclose(
    trained[0], [expected[b] for b in range(events.known)], rtol=1e-6
  )
  assert (validated[0] != trained[0]).any()
  samples = samples_lib.of_split(
    events, 'train', make_run_config().plan.min_context
  ).all()
  kept = np.bincount(events.behavior[samples], minlength=events.known)
  np.testing.assert_array_equal(
    trained[1], kept if prior == 'natural' else np.ones(events.known)
  )


def test_scores_over_the_vocabulary_are_others_than_within_names(
  run_stages, finished, tmp_path
):
  run_stages({'a.softmax': 'vocabulary', 'score.softmax': 'vocabulary'}, only='a')
  log_p = lambda workdir: parquet.read_table(workdir / 'a_tuning/predictions.parquet')[
    'log_prob'
  ].to_numpy()
  assert np.abs(log_p(tmp_path / 'work') - log_p(finished)).max() > 0.01


def test_no_difficulty_scores_nothing_and_stays_balanced(ablated):
  workdir = ablated('no_difficulty', only='b', fields=SCORED)
  assert not (workdir / 'b_tuning/difficulty.parquet').exists()
  counts = drawn(workdir, 'b_tuning').values()
  assert max(counts) - min(counts) <= 1
  assert recorded(workdir / 'b_tuning') == ['no_difficulty']
  assert is_finished(workdir / 'b_tuning')


def test_no_balance_draws_as_often_as_behaviors_occur(ablated):
  workdir = ablated('no_balance', only='b', fields=MORE | SCORED)
  counts = drawn(workdir, 'b_tuning')
  assert counts['home'] > 2 * max(counts['gym'], counts['cafe'])
  assert counts['gym'] + counts['cafe'] > counts['airport'] + counts['hotel']
  # The pool that was scored is natural, too, and as large as a balanced one.
  table = parquet.read_table(workdir / 'b_tuning/difficulty.parquet')
  assert len(table) == 24
  assert table['group'].to_pylist().count('tail') < 4
  assert is_finished(workdir / 'b_tuning')


def test_no_balanced_stage_ends_after_stage_a(ablated, finished):
  workdir = ablated('no_balanced_stage')
  assert not (workdir / 'b_tuning').exists()
  assert recorded(workdir / 'a_tuning') == ['no_balanced_stage']
  # Stage a itself is not changed.
  assert (workdir / 'a_tuning' / ADAPTER).read_bytes() == (
    finished / 'a_tuning' / ADAPTER
  ).read_bytes()


def test_no_anchor_stage_starts_stage_b_from_the_untuned_model(ablated):
  workdir = ablated('no_anchor_stage', fields=SCORED)
  assert not (workdir / 'a_tuning').exists()
  assert is_finished(workdir / 'b_tuning')
  assert recorded(workdir / 'b_tuning') == ['no_anchor_stage']
  # Its difficulty is that of the untuned model on every behavior.
  table = parquet.read_table(workdir / 'b_tuning/difficulty.parquet')
  assert set(table['behavior'].to_pylist()) == set(drawn(workdir, 'b_tuning'))


@pytest.mark.parametrize('names', [(), ('anchors_first',)])
def test_stage_a_teaches_tails_unless_anchors_come_first(ablated, names):
  workdir = ablated(*names, only='a', fields=MORE)
  counts = drawn(workdir, 'a_tuning')
  tails = counts['airport'] + counts['hotel']
  assert counts['home'] > tails and (tails == 0) == bool(names)
  assert kinds(workdir / 'a_tuning') == {'window', 'conversation'}
  assert is_finished(workdir / 'a_tuning')


def test_one_stage_takes_the_steps_of_both(ablated, read_rows, steps):
  workdir = ablated('one_stage')
  assert not (workdir / 'a_tuning').exists()
  folder = workdir / 'b_tuning'
  assert [row['step'] for row in read_rows(folder / 'metrics.jsonl')] == list(
    range(1, 2 * steps + 1)
  )
  assert recorded(folder) == ['one_stage'] and is_finished(folder)
  assert kinds(folder) == {'window', 'conversation'}
  assert not (folder / 'difficulty.parquet').exists()
  counts = drawn(workdir, 'b_tuning')
  assert counts['home'] > max(counts['gym'], counts['airport'])


def test_no_difficulty_and_no_balance_together(ablated):
  workdir = ablated('no_difficulty', 'no_balance', only='b', fields=MORE | SCORED)
  assert not (workdir / 'b_tuning/difficulty.parquet').exists()
  counts = drawn(workdir, 'b_tuning')
  assert counts['home'] > 2 * max(counts['gym'], counts['cafe'])
  assert recorded(workdir / 'b_tuning') == ['no_balance', 'no_difficulty']
  assert is_finished(workdir / 'b_tuning')


def test_no_auxiliary_and_one_stage_together(ablated):
  workdir = ablated('no_auxiliary', 'one_stage')
  assert kinds(workdir / 'b_tuning') == {'window'}
  assert recorded(workdir / 'b_tuning') == ['no_auxiliary', 'one_stage']
  assert is_finished(workdir / 'b_tuning')


def test_stage1_then_stage2_equals_one_run_of_both(script_config, finished, tmp_path):
  workdir = tmp_path / 'work'
  run_lib.run(ablations.ablate(script_config('stage1'), []), workdir)
  assert not (workdir / 'b_tuning').exists()
  run_lib.run(ablations.ablate(script_config('stage2'), []), workdir)
  for stage in ('a_tuning', 'b_tuning'):
    for name in (ADAPTER, 'predictions.parquet', 'config.json'):
      assert (workdir / stage / name).read_bytes() == (
        finished / stage / name
      ).read_bytes(), (stage, name)


def test_stage2_starts_from_stage_a_of_another_directory(
  script_config, finished, tmp_path
):
  config = script_config('stage2')
  config.init_from = str(finished)
  workdir = tmp_path / 'work'
  for name in ('events', 'base'):
    shutil.copytree(finished / name, workdir / name)
  run_lib.run(ablations.ablate(config, []), workdir)
  assert not (workdir / 'a_tuning').exists()
  assert (workdir / 'b_tuning' / ADAPTER).read_bytes() == (
    finished / 'b_tuning' / ADAPTER
  ).read_bytes()


@pytest.mark.parametrize('share', [0.0, 0.25])
def test_interpolation_ends_on_the_way_between_the_stages(
  script_config, finished, tmp_path, share
):
  config = script_config('stage2')
  config.init_from = str(finished)
  config.b.interpolation = share
  run_lib.run(ablations.ablate(config, []), tmp_path / 'work')
  start, end, found = (
    lora.read_adapter(folder / 'adapter')[0]
    for folder in (
      finished / 'a_tuning',
      finished / 'b_tuning',
      tmp_path / 'work/b_tuning',
    )
  )
  # By default stage b goes half of the way.
  jax.tree.map(
    lambda x, y, z: np.testing.assert_allclose(
      z, x + share / 0.5 * (y - x), rtol=1e-6, atol=1e-8
    ),
    start,
    end,
    found,
  )
  assert any(
    np.abs(x - y).max() > 1e-4
    for x, y in zip(jax.tree.leaves(start), jax.tree.leaves(end), strict=True)
  )


def test_by_default_stage_b_is_gentler_and_learns_neighbours(finished, read_rows):
  targets = drawn(finished, 'b_tuning').values()
  assert sum(targets) > 2 * len(segments(finished / 'b_tuning'))
  peaks = [
    max(row['learning_rate'] for row in read_rows(finished / name / 'metrics.jsonl'))
    for name in ('a_tuning', 'b_tuning')
  ]
  assert peaks[1] == peaks[0] / 2


def test_from_nothing_a_share_of_what_was_learned_is_kept():
  rng = np.random.default_rng(0)
  end = {'q_proj': {'a': rng.normal(size=(2, 5, 3)), 'b': rng.normal(size=(2, 3, 4))}}
  start = {'q_proj': {'a': rng.normal(size=(2, 5, 3)), 'b': np.zeros((2, 3, 4))}}
  found = run_lib.interpolate(start, end, 0.3)['q_proj']
  np.testing.assert_allclose(
    found['a'] @ found['b'], 0.3 * (end['q_proj']['a'] @ end['q_proj']['b'])
  )


def test_stage_a_can_go_part_of_the_way(run_stages, tmp_path, monkeypatch):
  monkeypatch.setattr(run_lib.report, 'write_report', lambda *_: None)
  run_stages({'a.interpolation': 0.0}, only='a')
  folder = tmp_path / 'work'
  assert (folder / 'a_tuning' / ADAPTER).exists()
  shown = [
    (folder / name / 'predictions.parquet').read_bytes()
    for name in ('base', 'a_tuning')
  ]
  assert shown[0] == shown[1]


def test_eligible_tails_exist_for_these_tests(finished, make_run_config):
  # Guards the counts above: tails can be taught and are few.
  events = events_lib.open_events(finished / 'events')
  samples = samples_lib.of_split(
    events, 'train', make_run_config().plan.min_context
  ).all()
  names = [events.behaviors[b].name for b in events.behavior[samples]]
  assert 4 <= names.count('airport') < names.count('home') / 20
