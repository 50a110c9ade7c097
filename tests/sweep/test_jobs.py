"""Sweeps: what runs, what is shared, what is not run again, the rows."""

import csv
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import sklearn.metrics
from pyarrow import parquet

from behaviorlm_jax import config as config_lib
from behaviorlm_jax import measure
from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.evaluate import adjust
from behaviorlm_jax.report import run_files
from behaviorlm_jax.sweep import choices, few_shot, jobs, results, settings
from behaviorlm_jax.sweep import rows as rows_lib

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TABLES = ('results.csv', 'differences.csv', 'trade_off.csv')
SHORT = {
  'a.steps': 2,
  'difficulty.score': 'nll',
  'checkpoint.every': 2,
  'eval.max_samples': 20,
  'eval.validation_samples': 20,
}


@pytest.fixture(scope='module')
def make_sweep(make_run_config):
  """A sweep of a log named `walks`; its committed rows lie in `committed`."""

  def make(committed, order=('stage_a', 'first', 'drawn', 'one', 'sasrec'), **fields):
    config = settings.empty()
    config.base = make_run_config(SHORT | fields)
    config.logs = {'walks': config.base.data.events, 'other': ''}
    config.methods = {
      'stage_a': settings.method(('no_balanced_stage',), seeds=2),
      'first': settings.method(start='stage_a', seeds=2),
      'drawn': settings.method(('no_difficulty',), 'stage_a'),
      'one': settings.method(('one_stage',)),
      'sasrec': settings.method(fields={'stages': (), 'sasrec': {'steps': 3}}),
    }
    config.order = order
    config.contrasts = (
      ('first', 'one'),
      ('first', 'one_adjusted'),
      ('first', 'markov'),
      ('first', 'not_run'),
      ('first_matched', 'one_adjusted'),
      ('first_mixed_matched', 'one_mixed_adjusted'),
      ('first_mixed', 'one_mixed'),
    )
    config.drawn = ('first', 'one', 'markov')
    config.results = str(committed)
    return config

  return make


@pytest.fixture(scope='module')
def swept(tmp_path_factory, make_sweep):
  """The folder of a whole sweep, read only."""
  folder = tmp_path_factory.mktemp('swept')
  jobs.run_all(make_sweep(folder / 'none'), folder)
  return folder


def read(path, *key, **where):
  """{values of `key`: row} of a CSV file, of rows that are as `where` says."""
  with path.open(newline='') as lines:
    rows = [row for row in csv.DictReader(lines) if row | where == row]
  return {tuple(row[column] for column in key): row for row in rows}


def copied(swept, folder):
  """`folder`, with the rows of a sweep."""
  for name in TABLES:
    shutil.copy(swept / name, folder / name)
  return folder


def test_runs_go_seed_by_seed_in_the_order_asked_for(make_sweep, tmp_path):
  config = make_sweep(tmp_path, order=('one', 'stage_a', 'first', 'drawn'))
  assert [job.key for job in jobs.jobs(config, tmp_path)] == [
    ('walks', 'one', 0),
    ('walks', 'stage_a', 0),
    ('walks', 'first', 0),
    ('walks', 'drawn', 0),
    ('walks', 'stage_a', 1),
    ('walks', 'first', 1),
  ]


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    ({'order': ('frist',)}, r"'frist' \(did you mean first\?\)"),
    (
      {'methods': {'drawn': {'start': 'first'}}},
      "drawn starts from 'first', which has no stage a of its own",
    ),
    ({'order': ('drawn',)}, "drawn starts from 'stage_a'.*not in config.order"),
    ({'base': {'distributed': {'coordinator': 'a:1'}}}, 'a sweep is one proc'),
    ({'logs': {'walks': ''}}, 'names no log.*--config.logs.NAME=FILE'),
  ],
)
def test_a_sweep_that_cannot_run_is_refused(make_sweep, tmp_path, fields, match):
  config = make_sweep(tmp_path)
  config.update(fields)
  with pytest.raises(InputError, match=match):
    jobs.jobs(config, tmp_path)


def test_settings_name_what_differs_from_the_defaults_but_for_seed_and_paths(
  monkeypatch,
):
  config = config_lib.default()
  plain = results.settings_hash(config)
  config.seed, config.data.events, config.init_from = 3, 'a.csv', 'runs/x'
  assert results.settings_hash(config) == plain
  config.a.steps += 1
  assert results.settings_hash(config) != plain
  config.a.steps -= 1
  monkeypatch.setattr(config_lib, 'DEFAULTS', config_lib.DEFAULTS + 1)
  assert results.settings_hash(config) != plain


def test_every_predictor_has_the_scores_of_its_evaluation(swept):
  rows = read(swept / 'results.csv', 'seed', 'method', 'group', 'metric')
  names = lambda seed: {key[1] for key in rows if key[0] == seed}
  assert names('0') >= {
    *('untuned', 'markov', 'markov_adjusted', 'user_frequent', 'stage_a', 'first'),
    *('drawn', 'one', 'one_adjusted', 'first_mixed_adjusted'),
    *('sasrec', 'sasrec_adjusted'),
  }
  assert names('1').isdisjoint({'drawn', 'one'})
  for name, folder, kind in (
    ('sasrec_mixed', 'sasrec/sasrec', 'mixed'),
    ('stage_a', 'stage_a/a_tuning', None),
    ('one_adjusted', 'one/b_tuning', 'adjusted'),
  ):
    path = swept / 'walks/seed0' / folder / 'evaluation.json'
    found = json.loads(path.read_text())
    scores = (found['fitted'][kind] if kind else found)['tail']
    row = rows['0', name, 'tail', 'f1_macro']
    assert float(row['value']) == pytest.approx(scores['f1_macro'], rel=1e-4)
    assert int(row['n']) == scores['n']


def test_runs_share_the_untuned_scores_and_start_from_the_adapter(swept):
  folder = swept / 'walks/seed0'
  base = [
    (folder / name / 'base/predictions.parquet').read_bytes()
    for name in ('first', 'drawn', 'one', 'sasrec')
  ]
  assert len(set(base)) == 1
  assert not (folder / 'drawn/a_tuning').exists()
  config = json.loads((folder / 'drawn/b_tuning/config.json').read_text())
  assert config['init_from'] == str(folder / 'stage_a')
  assert not list(swept.rglob('checkpoints'))


def test_deciles_go_from_the_most_frequent_behaviors_on(swept):
  """F1 of each tenth, of one run, by hand."""
  folder = swept / 'walks/seed0/one'
  behaviors = json.loads((folder / 'events/behaviors.json').read_text())
  counts = {b['name']: -b['train_count'] for b in behaviors if b['train_count']}
  names = sorted(counts, key=counts.get)  # Stable: equals by id.
  table = parquet.read_table(folder / 'b_tuning/predictions.parquet')
  true, predicted = (table[c].to_pylist() for c in ('behavior', 'predicted'))
  f1 = sklearn.metrics.f1_score(
    true, predicted, labels=names, average=None, zero_division=0
  )
  rows = read(swept / 'results.csv', 'group', method='one', metric='f1_macro')
  for i, part in enumerate(np.array_split(f1, 10), start=1):
    if len(part):
      found = float(rows[f'decile_{i}',]['value'])
      assert found == pytest.approx(part.mean(), abs=1e-5)
  assert ('decile_1',) in rows


def test_nll_is_the_mean_over_the_events_of_a_group(swept):
  path = swept / 'walks/seed0/one/b_tuning/predictions.parquet'
  table = parquet.read_table(path, columns=['group', 'log_prob']).to_pylist()
  rows = read(swept / 'results.csv', 'group', method='one', metric='nll')
  for (group,), row in rows.items():
    part = [-event['log_prob'] for event in table if group in ('all', event['group'])]
    assert float(row['value']) == pytest.approx(np.mean(part), rel=1e-4)
    assert int(row['n']) == len(part)
  assert {('all',), ('anchor',)} <= rows.keys()


def test_cost_is_that_of_both_stages(swept):
  rows = read(swept / 'results.csv', 'method', 'metric', group='training', seed='0')
  found = lambda *key: float(rows[key]['value'])
  targets = lambda folder: sum(
    json.loads(line)['samples']
    for line in (swept / 'walks/seed0' / folder / 'metrics.jsonl').open()
  )
  alone = targets('stage_a/a_tuning')
  assert found('stage_a', 'targets') == alone
  for name in ('first', 'drawn'):
    assert found(name, 'targets') == alone + targets(f'{name}/b_tuning')
  assert found('one', 'targets') == targets('one/b_tuning')
  assert found('one', 'seconds') > 0


def test_finished_and_committed_runs_are_not_run_again(
  swept, make_sweep, tmp_path, monkeypatch
):
  ran = []
  monkeypatch.setattr(jobs, 'run_job', lambda job: ran.append(job.key))
  jobs.run_all(make_sweep(tmp_path / 'none'), swept)
  assert not ran
  jobs.run_all(make_sweep(copied(swept, tmp_path)), tmp_path / 'empty')
  assert not ran
  # Other settings are other runs, and so is the run that they start from.
  config = make_sweep(tmp_path)
  config.methods.drawn.fields = {'plan': {'per_behavior': 3}}
  jobs.run_all(config, tmp_path / 'empty')
  assert ran == [('walks', 'stage_a', 0), ('walks', 'drawn', 0)]
  # A folder that other settings made is not taken for finished, but refused.
  ran.clear()
  jobs.run_all(config, swept)
  assert ran == [('walks', 'drawn', 0)]
  monkeypatch.undo()
  with pytest.raises(InputError, match=r'plan\.per_behavior.*another --workdir'):
    jobs.run_all(config, swept)
  monkeypatch.setattr(jobs, 'run_job', lambda job: ran.append(job.key))
  # So is what starts from a run of other settings.
  ran.clear()
  config = make_sweep(tmp_path, order=('stage_a', 'drawn'))
  config.methods.stage_a.fields = {'plan': {'window': 30}}
  jobs.run_all(config, tmp_path / 'empty')
  assert [name for _, name, seed in ran if not seed] == ['stage_a', 'drawn']


def test_a_sweep_that_ended_while_it_scored_goes_on_to_the_same_rows(
  swept, make_sweep, tmp_path, monkeypatch
):
  config, score = make_sweep(tmp_path / 'none', order=('one',)), measure.score

  def interrupted(this, adapter, samples, folder):
    if folder.parent.name == 'b_tuning':
      raise KeyboardInterrupt
    return score(this, adapter, samples, folder)

  monkeypatch.setattr(measure, 'score', interrupted)
  with pytest.raises(KeyboardInterrupt):
    jobs.run_all(config, tmp_path)
  monkeypatch.undo()
  steps = tmp_path / 'walks/seed0/one/b_tuning/metrics.jsonl'
  before = steps.read_bytes()
  jobs.run_all(config, tmp_path)
  assert steps.read_bytes() == before  # Nothing was learned again.
  rows = lambda folder: [
    row
    for row in read(folder / 'results.csv', 'method', 'group', 'metric').values()
    if row['method'].startswith('one') and row['metric'] != 'seconds'
  ]
  assert rows(tmp_path) == rows(swept) and rows(swept)


def test_differences_are_paired_over_the_seeds_that_both_have(swept):
  rows = read(swept / 'differences.csv', 'control', 'metric', method='first')
  assert {control for control, _ in rows} == {'one', 'one_adjusted', 'markov'}
  assert rows['markov', 'accuracy']['seeds'] == '0 1'
  assert rows['one', 'accuracy']['seeds'] == '0'
  for row in rows.values():
    low, change, high = (float(row[k]) for k in ('low', 'change', 'high'))
    assert low <= change <= high
  scores = read(swept / 'results.csv', 'method', 'seed', 'metric', group='all')
  gain = lambda method, control, seed, metric: (
    float(scores[method, seed, metric]['value'])
    - float(scores[control, seed, metric]['value'])
  )
  for control, metric, expected in (
    ('markov', 'accuracy', [gain('first', 'markov', s, 'accuracy@1') for s in '01']),
    ('one', 'log p', [gain('one', 'first', '0', 'nll')]),
  ):
    change = float(rows[control, metric]['change'])
    assert change == pytest.approx(np.mean(expected), abs=1e-4)
  assert ('one_adjusted', 'log p') not in rows


@pytest.mark.parametrize(
  'known, settings, kept',
  [
    ('0', '', ['0 1']),
    ('0 1', '', ['0 1']),
    ('2', '', ['0 1', '2']),
    ('1 2', '', ['0 1']),
    ('0 1 2', '', ['0 1 2']),
    ('0 1 2', 'others', ['0 1']),
    ('2', 'others', ['0 1']),
  ],
)
def test_a_difference_replaces_those_over_some_of_its_seeds(
  swept, make_sweep, tmp_path, known, settings, kept
):
  rows = rows_lib.read_folder(tmp_path)
  every = jobs.jobs(make_sweep(tmp_path), swept)
  finished = [job for job in every if job.finished and job.name == 'first']
  named = dict(data='walks', method='first', control='markov', metric='accuracy')
  rows.add(
    'differences.csv',
    **named,
    **dict.fromkeys(('n', 'before', 'change', 'low', 'high'), 0),
    seeds=known,
    settings=f'{finished[0].settings}/{settings}',
  )
  results.add_rows(finished, (('first', 'markov'),), rows, tmp_path)
  found = [row['seeds'] for row in rows.of('differences.csv') if row | named == row]
  assert sorted(found) == kept


@pytest.fixture
def at_hand(swept, make_sweep, tmp_path):
  """A folder with some finished runs, of a sweep whose rest ran elsewhere.

  Committed are the choices of all runs, and no rows.
  """

  def make(*places):
    elsewhere, here = tmp_path / 'elsewhere', tmp_path / 'here'
    shutil.copytree(swept / 'choices', elsewhere / 'choices')
    for place in places:
      (here / 'walks' / place).parent.mkdir(parents=True, exist_ok=True)
      (here / 'walks' / place).symlink_to(swept / 'walks' / place)
    config = make_sweep(elsewhere)
    config.contrasts = (*config.contrasts, ('first', 'stage_a'))
    return config, here

  return make


def differences(config, folder):
  """{(method, control, score): its row}, collected anew."""
  jobs.collect(config, jobs.jobs(config, folder), folder)
  return read(folder / 'differences.csv', 'method', 'control', 'metric')


@pytest.mark.parametrize(
  'places',
  [
    ('seed0/stage_a', 'seed0/first', 'seed1/stage_a'),
    ('seed0/one', 'seed1/stage_a'),
    ('seed0/sasrec', 'seed1/stage_a', 'seed1/first'),
  ],
)
def test_runs_are_compared_with_those_that_ended_elsewhere(
  swept, at_hand, places, tmp_path
):
  config, here = at_hand(*places)
  found = differences(config, here)
  (tmp_path / 'all').mkdir()
  (tmp_path / 'all/walks').symlink_to(swept / 'walks')
  expected = differences(config, tmp_path / 'all')
  assert found.keys() == expected.keys()
  assert {method for method, _, _ in found} == (
    {'first', 'first_matched', 'first_mixed', 'first_mixed_matched'}
  )
  assert found['first', 'one', 'log p']['seeds'] == '0'
  assert found['first', 'stage_a', 'log p']['seeds'] == '0 1'
  for key, row in expected.items():
    for column, value in row.items():
      if column in ('before', 'change', 'low', 'high'):
        assert float(found[key][column]) == pytest.approx(float(value), abs=2e-6)
      else:
        assert found[key][column] == value
  # Those of all runs are kept, wherever they ran.
  kept = lambda folder: {
    path.relative_to(folder) for path in folder.rglob('choices/*/*/*')
  }
  assert kept(here) == kept(swept) and len(kept(here)) == 7


def test_a_run_at_hand_stands_before_what_is_kept_of_it(at_hand, swept, tmp_path):
  config, here = at_hand('seed0/one', 'seed0/stage_a', 'seed0/first')
  place = 'choices/walks/seed0/first.parquet'
  table = parquet.read_table(tmp_path / 'elsewhere' / place)
  rows = table.to_pylist()
  for row in rows:
    row['predicted'] = [0] * len(row['predicted'])
  wrong = pa.Table.from_pylist(rows, table.schema)
  parquet.write_table(wrong, tmp_path / 'elsewhere' / place)
  differences(config, here)
  assert parquet.read_table(here / place) == table


@pytest.mark.parametrize('other', ['settings', 'events', 'anchors'])
def test_choices_of_other_settings_or_events_are_left_out(at_hand, other, monkeypatch):
  config, here = at_hand('seed0/stage_a', 'seed0/first')
  assert ('first', 'one', 'accuracy') in differences(config, here)
  if other == 'settings':
    config.methods.one.fields = {'a': {'learning_rate': 1e-5}}
  else:
    digest = choices.digest
    monkeypatch.setattr(
      choices,
      'digest',
      lambda names, anchor, samples, true: digest(
        names, anchor ^ (other == 'anchors'), samples + (other == 'events'), true
      ),
    )
  assert ('first', 'one', 'accuracy') not in differences(config, here)


def test_a_damaged_file_of_choices_is_named(at_hand, tmp_path):
  config, here = at_hand('seed0/stage_a', 'seed0/first')
  path = tmp_path / 'elsewhere/choices/walks/seed0/one.parquet'
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(InputError, match=r'one\.parquet cannot be read .*; del'):
    differences(config, here)


def test_kept_choices_hold_neither_behaviors_that_happened_nor_users(swept):
  paths = list((swept / 'choices').rglob('*.parquet'))
  assert len(paths) == 7  # Five runs of seed 0, two of seed 1.
  for path in paths:
    table = parquet.read_table(path)
    assert table.column_names == ['predictor', 'predicted', 'log_p', 'by_tau']
    assert set(table['predictor'].to_pylist()) == {
      path.stem,
      *(f'{path.stem}_{kind}' for kind in adjust.NAMES),
    }
    assert set(table.schema.metadata) == {b'settings', b'digest'}


def test_the_report_needs_nothing_but_the_rows(swept, tmp_path, make_sweep):
  jobs.report(make_sweep(tmp_path), copied(swept, tmp_path))
  text = (tmp_path / 'tables.md').read_text()
  assert '## walks' in text and '| one_adjusted | 20 |' in text
  # Other seeds have other test events: they are shown apart.
  both, first = text.split('Seeds 0, 1: mean')[1].split('Seed 0: mean')[:2]
  assert '| first |' in both and '| one |' not in both
  assert '| first |' in first and '| one |' in first
  assert '±' in text and '![' in text
  for name in ('trade_off', 'deciles', 'retention', 'cost'):
    data = (tmp_path / f'{name}.png').read_bytes()
    assert data.startswith(b'\x89PNG')


def test_the_command_reports_and_explains(swept, tmp_path, command_environment):
  copied(swept, tmp_path)
  command = (
    f'-m behaviorlm_jax.sweep --config=configs/ablations.py --workdir={tmp_path}'
  )
  call = lambda *more: subprocess.run(
    [sys.executable, *command.split(), *more],
    cwd=ROOT,
    env=command_environment,
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )
  done = call('--report')
  assert done.returncode == 0, done.stderr[-2000:]
  assert '## walks' in (tmp_path / 'tables.md').read_text()
  wrong = call()
  assert wrong.returncode == 2
  assert wrong.stderr.strip().endswith('foursquare_nyc, india_time_use.')


def test_a_folder_without_rows_is_refused(tmp_path, make_sweep):
  with pytest.raises(InputError, match=r'no results\.csv with rows'):
    jobs.report(make_sweep(tmp_path), tmp_path)


def test_rows_survive_being_written_and_read(swept, tmp_path):
  rows_lib.write_folder(tmp_path, rows_lib.read_folder(swept))
  for name in TABLES:
    assert (tmp_path / name).read_bytes() == (swept / name).read_bytes()


def shipped(name):
  """The config of configs/ablations.py:NAME."""
  path = str(ROOT / 'configs/ablations.py')
  config = runpy.run_path(path)['get_config'](name)
  config.logs = {'foursquare_nyc': 'a.csv', 'india_time_use': 'b.csv'}
  return config


@pytest.mark.parametrize('name', ['controls', 'one_pass', 'few_shot'])
def test_contrasts_of_the_shipped_sweeps_name_what_they_run(tmp_path, name):
  config = shipped(name)
  every = jobs.jobs(config, tmp_path)
  assert len({job.key for job in every}) == len(every)
  known = {job.name for job in every} | {'untuned', 'markov', 'markov_adjusted'}
  kinds = (*adjust.NAMES, 'matched', 'mixed_matched')
  known |= {f'{job.name}_{kind}' for job in every for kind in kinds}
  assert {name for pair in config.contrasts for name in pair} <= known
  assert len(set(config.contrasts)) == len(config.contrasts)
  assert all(method != control for method, control in config.contrasts)
  assert set(config.order) == set(config.methods)


def test_committed_rows_of_other_questions_are_not_taken_for_todays(tmp_path):
  """They were scored with 24 events in each question: see docs/results.md."""
  rows = rows_lib.read_folder(ROOT / 'docs/results/one_pass').of('results.csv')
  known = {(row['data'], row['method'], row['seed'], row['settings']) for row in rows}
  found = [(*job.key, job.settings) for job in jobs.jobs(shipped('one_pass'), tmp_path)]
  assert known and not known & set(found)


def test_the_main_controls_have_three_seeds(tmp_path):
  every = jobs.jobs(shipped('controls'), tmp_path)
  once = {'over_vocabulary', 'no_balance', 'no_anchor_stage'}
  assert {job.name for job in every} - {job.name for job in every if job.seed == 2} == (
    once
  )


def test_a_run_of_few_shots_reads_a_log_of_its_own(make_sweep, tmp_path, monkeypatch):
  monkeypatch.setattr(few_shot, 'FROM', 3)
  config = make_sweep(tmp_path / 'none', order=('stage_a', 'few', 'few_one'))
  config.methods.stage_a.seeds = 1
  config.methods.few = settings.method(('no_difficulty',), 'stage_a', shots=2)
  config.methods.few_one = settings.method(('one_stage',), shots=2)
  config.contrasts = (('few', 'few_one'), ('few', 'stage_a'), ('few', 'markov'))
  jobs.run_all(config, tmp_path)
  whole, few, one = jobs.jobs(config, tmp_path)
  assert few.settings == results.settings_hash(few.config, whole.settings, 2)
  assert few.settings != results.settings_hash(few.config, whole.settings, 3)
  assert few.folder == tmp_path / 'walks/seed0_2_shots/few'
  events = events_lib.open_events(few.folder / 'events')
  # Siblings of as many shots share them, and what was measured on them.
  for name in ('events/behaviors.json', 'base/evaluation.json', 'baselines.json'):
    assert (few.folder / name).read_text() == (one.folder / name).read_text()
  counts = {b.name: b.train_count for b in events.behaviors}
  assert counts['airport'] == counts['hotel'] == 2
  rows = read(tmp_path / 'results.csv', 'method', 'group', 'metric')
  targets = run_files.plan_targets(few.folder / 'b_tuning/plan.parquet')
  names = [events.behaviors[b].name for b in events.behavior[targets]]
  expected = (names.count('airport') + names.count('hotel')) / 2
  assert float(rows['few', 'few_shot', 'targets']['value']) == expected > 0
  assert ('stage_a', 'few_shot', 'targets') not in rows  # Nothing was thinned.
  assert {name for name, *key in rows if key == ['few_shot', 'f1_macro']} >= {
    'few',
    'few_one_mixed',
    'stage_a',
    'markov',
  }
  for name in ('markov', 'untuned'):  # Of the whole log.
    assert rows[name, 'all', 'f1_macro']['settings'] == whole.settings
  # Test events are the same, so all may be compared.
  found = read(tmp_path / 'differences.csv', 'method', 'control')
  assert found.keys() == set(config.contrasts)
