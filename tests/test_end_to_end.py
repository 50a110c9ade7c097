"""One real run through the command: every file, and that they agree."""

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pyarrow import parquet
from safetensors import numpy as safetensors_numpy

from behaviorlm_jax import run as run_lib
from behaviorlm_jax import setup
from behaviorlm_jax.cluster import workspace
from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.evaluate import adjust, baselines, decisions, evaluation, metrics
from behaviorlm_jax.model import lora, weights
from behaviorlm_jax.train import sharding

STAGES = ('a_tuning', 'b_tuning')
ARMS = ('base', *STAGES)
LENGTH = 192  # Of a prompt with an answer, at most.
TAILS = {'airport', 'hotel'}
SCORES = (
  {'n'}
  | {
    f'{kind}_{mean}'
    for kind in ('precision', 'recall', 'f1')
    for mean in ('weighted', 'macro')
  }
  | {'accuracy@1', 'accuracy@3', 'accuracy@5', 'ndcg@3', 'ndcg@5'}
)
OF_P = {'log_p', 'map', 'coverage@5'}


@pytest.fixture(scope='module')
def base():
  return weights.open_base('random://tiny')


@pytest.fixture(scope='module')
def prompts(finished, base, make_run_config):
  events = events_lib.open_events(finished / 'events')
  data = make_run_config().data
  return prompts_lib.Prompts(
    events, base.tokenizer, data.instruction, data.history, data.weekday
  )


@pytest.fixture(scope='module')
def brute(finished, base):
  """(stage or None, prompt) -> log p of every behavior, name by name.

  Each token's softmax runs over those with which some name goes on.
  """
  params = jax.tree.map(jnp.asarray, weights.read_params(base, np.float32))
  answers = [label['tokens'] for label in read_json(finished / 'a_tuning/labels.json')]

  def within(logits, answer, i):
    nexts = sorted(
      {other[i] for other in answers if other[:i] == answer[:i] and len(other) > i}
    )
    return logits[answer[i]] - np.logaddexp.reduce(logits[nexts])

  @functools.partial(jax.jit, static_argnums=1)
  def forward(adapter, alpha, tokens):
    model = lora.attach(base.config, params, adapter, alpha)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    hidden, _ = model.packed_hidden(tokens, positions, jnp.ones_like(tokens))
    return model.logits(hidden)

  def scores(stage, prompt):
    adapter = alpha = None
    if stage:
      adapter, alpha = lora.read_adapter(finished / stage / 'adapter')
    tokens = np.zeros((len(answers), LENGTH), np.int32)
    for row, answer in zip(tokens, answers, strict=True):
      row[: len(prompt) + len(answer)] = [*prompt, *answer]
    found = np.asarray(forward(adapter, alpha, tokens), np.float64)
    return np.array(
      [
        sum(within(row[len(prompt) - 1 + i], answer, i) for i in range(len(answer)))
        for row, answer in zip(found, answers, strict=True)
      ]
    )

  return scores


def read_json(path):
  return json.loads(path.read_text())


def predictions(finished, arm):
  return parquet.read_table(finished / arm / 'predictions.parquet').to_pylist()


def targets_of(finished, stage):
  """Events that the plan of a stage teaches, in order."""
  table = parquet.read_table(finished / stage / 'plan.parquet')
  return [
    target
    for row in table['segments'].to_pylist()
    for segment in row
    for target in segment['targets']
  ]


def test_events_folder(finished):
  folder = finished / 'events'
  behaviors = {b['name']: b for b in read_json(folder / 'behaviors.json')}
  assert {b for b in behaviors if behaviors[b]['group'] == 'tail'} == TAILS
  assert behaviors['home']['group'] == 'anchor'
  summary = read_json(folder / 'summary.json')
  counts = [b['count'] for b in behaviors.values()]
  assert sum(counts) == summary['events'] == sum(summary['splits'].values())
  assert math.isclose(sum(b['share'] for b in behaviors.values()), 1)
  assert (folder / 'rejected.csv').read_text() == 'line,reason,text\n'
  assert (folder / 'user.npy').exists()


def assert_measured(found):
  """Whether evaluation.json says all of a predictor, fitted ones aside."""
  assert {'ece', 'reliability', *metrics.GROUPS} <= set(found)
  for name in metrics.GROUPS:
    assert set(found[name]) == SCORES | OF_P and found[name]['log_p'] <= 0
    unit = {k: v for k, v in found[name].items() if k not in ('n', 'log_p')}
    assert all(0 <= value <= 1 for value in unit.values())
  assert 0 <= found['ece'] <= 1 and np.shape(found['reliability']) == (15, 3)
  assert set(found['calibration']) == {'a', 'b', 'validation_samples'}
  assert tuple(found['points']) == decisions.POINTS
  for point in found['points'].values():
    assert isinstance(point['how'], str) and set(point['all']) == SCORES


@pytest.mark.parametrize('arm', ARMS)
def test_evaluation_has_all_scores_of_every_group(finished, arm):
  found = read_json(finished / arm / 'evaluation.json')
  fitted = found.pop('fitted')
  assert_measured(found)
  groups = {name: found[name] for name in metrics.GROUPS}
  sizes = {name: group['n'] for name, group in groups.items()}
  assert sizes['all'] == 60 == sizes['anchor'] + sizes['tail']
  assert sizes['tail'] > 0
  rows = predictions(finished, arm)
  hits = np.mean([row['predicted'] == row['behavior'] for row in rows])
  assert math.isclose(found['all']['accuracy@1'], hits)
  assert list(fitted) == list(adjust.NAMES)
  for name, scores in fitted.items():
    if name == 'mixed':
      assert_measured(scores)
    else:
      assert set(scores['all']) == SCORES
    assert scores['validation_samples'] > 0
    hits = np.mean([row[name] == row['behavior'] for row in rows])
    assert math.isclose(scores['all']['accuracy@1'], hits)


def test_retention_is_measured_against_the_untuned_model(finished):
  base, *stages = (
    read_json(finished / arm / 'retention.json')['conversations'] for arm in ARMS
  )
  assert base['perplexity_ratio'] == 1 and base['kl_to_base'] == 0
  for one in stages:
    assert one['n'] == base['n'] and one['kl_to_base'] > 0
    assert math.isclose(
      one['perplexity_ratio'], one['perplexity'] / base['perplexity'], rel_tol=1e-6
    )


@pytest.mark.slow
def test_sasrec_is_trained_and_evaluated_as_the_others_are(copy_run, run_stages):
  workdir = copy_run()
  fields = {'stages': (), 'sasrec.steps': 2, 'sasrec.width': 8}
  run_stages(fields, workdir)
  found = read_json(workdir / 'sasrec' / 'evaluation.json')
  assert_measured(found)
  assert found['all']['n'] == 60
  assert set(found['fitted']) == set(adjust.NAMES)
  assert [row['sample'] for row in predictions(workdir, 'sasrec')] == [
    row['sample'] for row in predictions(workdir, 'base')
  ]
  assert '| SASRec, with counts |' in (workdir / 'report.md').read_text()


def test_held_out_conversations_are_not_trained_on(make_run_config, base, tmp_path):
  for share in (0.3, 0.0):
    config = make_run_config({'retention.conversations': share})
    layout = sharding.make_layout(config.mesh, config.train)
    this = setup.open_setup(config, workspace.local(tmp_path), layout)
    held = this.retention.conversations
    seen = {c.tokens.tobytes() for c in this.conversations}
    assert len(seen) + len(held) == 6 and bool(held) == bool(share)
    assert seen.isdisjoint(c.tokens.tobytes() for c in held)


@pytest.mark.parametrize('arm', ARMS)
def test_fitted_predictions_follow_from_log_p(finished, arm):
  rows = predictions(finished, arm)
  known = [
    b
    for b in read_json(finished / 'events' / 'behaviors.json')
    if b['group'] != 'unseen'
  ]
  log_p = parquet.read_table(finished / arm / 'log_p').sort_by('sample').to_pylist()
  test = [row for row in log_p if row['split'] == 'test']
  assert [row['sample'] for row in test] == [row['sample'] for row in rows]
  fitted = read_json(finished / arm / 'evaluation.json')['fitted']
  share = np.array([b['train_count'] + 1 for b in known], float)
  prior = np.log(share / share.sum())
  for row, one in zip(test, rows, strict=True):
    assert math.isclose(np.exp(row['log_p']).sum(), 1, rel_tol=1e-4)
    adjusted = np.array(row['log_p']) - fitted['adjusted']['tau'] * prior
    best = adjusted[[b['name'] for b in known].index(one['adjusted'])]
    assert best >= adjusted.max() - 1e-4


def test_baselines_have_the_same_scores_on_the_same_samples(finished):
  found = read_json(finished / 'baselines.json')
  assert tuple(found) == baselines.NAMES
  for name, one in found.items():
    assert_measured(one)
    assert one['all']['n'] == 60, name


@pytest.mark.parametrize('arm', [*ARMS, 'baselines'])
def test_choices_and_log_p_of_each_event_have_the_scores_of_the_evaluation(
  finished, arm
):
  rows = predictions(finished, ARMS[0])
  behaviors = [row['behavior'] for row in rows]
  if arm == 'baselines':
    rows = parquet.read_table(finished / 'baselines.parquet').to_pylist()
    evaluations = read_json(finished / 'baselines.json')
    found = {f'{name}_': one for name, one in evaluations.items()}
  else:
    rows = predictions(finished, arm)
    evaluation = read_json(finished / arm / 'evaluation.json')
    found = {'': evaluation, 'mixed_': evaluation['fitted']['mixed']}
  for prefix, one in found.items():
    log_p = np.mean([row[f'{prefix}log_prob'] for row in rows])
    assert math.isclose(log_p, one['all']['log_p'], rel_tol=1e-5)
    for point, scores in one['points'].items():
      chosen = [row[f'{prefix}point_{point}'] for row in rows]
      hits = np.mean([x == y for x, y in zip(chosen, behaviors, strict=True)])
      assert math.isclose(scores['all']['accuracy@1'], hits)


def test_no_validation_samples_are_drawn_where_none_are_wanted(
  prompts, make_run_config
):
  config = make_run_config({'eval.validation_samples': 0})
  drawn = evaluation.draw_splits(
    prompts.events, config.eval, config.plan.min_context, config.seed
  )
  assert len(drawn.test) == 60 and not len(drawn.validation)


@pytest.mark.parametrize('arm', ARMS)
def test_predictions_agree_with_the_events(finished, prompts, make_run_config, arm):
  events, rows = prompts.events, predictions(finished, arm)
  samples = [row['sample'] for row in rows]
  config = make_run_config()
  drawn = evaluation.draw_splits(
    events, config.eval, config.plan.min_context, config.seed
  )
  assert samples == list(drawn.test)
  table = parquet.read_table(finished / arm / 'log_p')
  starts = dict(
    zip(*(table[name].to_pylist() for name in ('sample', 'start')), strict=True)
  )
  for row in rows:
    at = row['sample']
    behavior = events.behaviors[events.behavior[at]]
    assert events.split[at] == events_lib.SPLITS.index('test')
    assert row['user'] == events.users[events.user[at]]
    assert row['time'] == np.datetime64(int(events.time[at]), 's').item()
    assert (row['behavior'], row['group']) == (behavior.name, behavior.group)
    assert events.first[at] <= starts[at] <= prompts.question_start(at)
    assert at - starts[at] <= config.plan.window
    assert row['prompt_tokens'] == prompts.question(at, starts[at]).tolist()
    past = events.behavior[starts[at] : at]
    assert row['in_context'] == (events.behavior[at] in past)


@pytest.mark.parametrize('arm', ARMS)
def test_predicted_is_the_first_of_the_top_five(finished, arm):
  for row in predictions(finished, arm):
    top = dict(zip(row['top5'], row['top5_log_prob'], strict=True))
    assert len(top) == 5 and row['predicted'] == row['top5'][0]
    assert row['top5_log_prob'] == sorted(row['top5_log_prob'], reverse=True)
    assert np.exp(row['top5_log_prob']).sum() <= 1 + 1e-5
    if row['behavior'] in top:
      assert row['log_prob'] == top[row['behavior']]
    else:
      assert row['log_prob'] <= row['top5_log_prob'][-1]


@pytest.mark.parametrize('arm', ARMS)
def test_log_prob_is_that_of_the_exported_adapter(finished, brute, arm):
  names = [b['name'] for b in read_json(finished / 'a_tuning/labels.json')]
  stage = arm if arm in STAGES else None
  for row in predictions(finished, arm)[::25]:
    scores = brute(stage, row['prompt_tokens'])
    true = scores[names.index(row['behavior'])]
    assert row['log_prob'] == pytest.approx(true, abs=1e-4)
    best = sorted(scores, reverse=True)[:5]
    np.testing.assert_allclose(row['top5_log_prob'], best, atol=1e-4)


def test_stages_differ(finished):
  first, second, third = (
    [row['log_prob'] for row in predictions(finished, arm)] for arm in ARMS
  )
  assert first != second and second != third


@pytest.mark.parametrize('stage', STAGES)
def test_labels_end_with_the_end_of_the_line(finished, prompts, stage):
  labels = read_json(finished / stage / 'labels.json')
  assert [b['name'] for b in labels] == [b.name for b in prompts.events.behaviors]
  for label in labels:
    assert set(label) == {'name', 'group', 'tokens'}
    text = prompts.tokenizer.decode(label['tokens'])
    assert text == f' {label["name"]}\n'


@pytest.mark.parametrize('stage', STAGES)
def test_metrics_have_one_row_per_step(finished, read_rows, steps, stage):
  rows = read_rows(finished / stage / 'metrics.jsonl')
  assert [row['step'] for row in rows] == list(range(1, steps + 1))
  assert all(math.isfinite(row['loss']) and row['loss'] > 0 for row in rows)
  assert [row['step'] for row in rows if 'val_loss' in row] == [3, 6]
  assert list((finished / stage / 'tensorboard').iterdir())


@pytest.mark.parametrize('stage', STAGES)
def test_config_of_the_stage_is_complete(finished, run_fields, stage):
  values = read_json(finished / stage / 'config.json')
  assert values['ablations'] == [] and values['seed'] == 0
  for name, value in run_fields.items():
    found = values
    for part in name.split('.'):
      found = found[part]
    assert found == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize('stage', STAGES)
def test_adapter_has_the_layout_of_peft(finished, stage):
  folder = finished / stage / 'adapter'
  settings = read_json(folder / 'adapter_config.json')
  assert settings['peft_type'] == 'LORA' and settings['r'] == 4
  assert settings['lora_alpha'] == 32 and settings['bias'] == 'none'
  assert settings['target_modules'] == ['q_proj', 'v_proj']
  tensors = safetensors_numpy.load_file(folder / 'adapter_model.safetensors')
  assert {name: value.shape for name, value in tensors.items()} == {
    f'base_model.model.model.layers.{layer}.self_attn.{name}.{side}.weight': shape
    for layer in (0, 1)
    for name, out in (('q_proj', 64), ('v_proj', 32))
    for side, shape in (('lora_A', (4, 64)), ('lora_B', (out, 4)))
  }
  assert all(value.dtype == np.float32 and value.any() for value in tensors.values())


@pytest.mark.parametrize('stage', STAGES)
def test_plan_holds_the_rows_of_every_step(finished, steps, stage):
  table = parquet.read_table(finished / stage / 'plan.parquet')
  rows = table.to_pylist()
  assert [(row['step'], row['row']) for row in rows] == [
    (step, row) for step in range(steps) for row in range(2)
  ]
  for row in rows:
    assert sum(segment['length'] for segment in row['segments']) <= 192


def test_plans_teach_training_events_and_conversations(finished, prompts):
  events = prompts.events
  anchors = events.anchors
  for stage in STAGES:
    targets = targets_of(finished, stage)
    assert (events.split[targets] == 0).all()
    assert (np.asarray(targets) - events.first[targets] >= 2).all()
    found = anchors[events.behavior[targets]]
    assert found.any()
    assert stage == 'a_tuning' or not found.all()
  table = parquet.read_table(finished / 'a_tuning/plan.parquet')
  kinds = {segment['kind'] for row in table['segments'].to_pylist() for segment in row}
  assert kinds == {'window', 'conversation'}


@pytest.fixture(scope='module')
def by_nll(finished, tmp_path_factory, make_run_config):
  """Work directory of a stage b that chose by nll and teaches nothing beside."""
  workdir = tmp_path_factory.mktemp('by_nll') / 'work'
  shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns('b_tuning'))
  fields = {'difficulty.score': 'nll', 'plan.neighbours': 0.0, 'stages': ('b',)}
  run_lib.run(make_run_config(fields), workdir)
  return workdir


@pytest.mark.slow
def test_balanced_plan_draws_every_behavior_equally(by_nll, prompts):
  targets = targets_of(by_nll, 'b_tuning')
  drawn = np.bincount(prompts.events.behavior[targets], minlength=6)
  assert drawn.min() > 0 and drawn.max() - drawn.min() <= 1


@pytest.mark.slow
def test_difficulty_is_that_of_the_stage_a_model(by_nll, prompts, brute):
  rows = parquet.read_table(by_nll / 'b_tuning/difficulty.parquet')
  rows = rows.to_pylist()
  events = prompts.events
  drawn = [row['behavior'] for row in rows]
  assert {name: drawn.count(name) for name in drawn} == {
    b.name: min(4, b.train_count) for b in events.behaviors
  }
  for row in rows[::6]:
    behavior = events.behavior[row['sample']]
    assert events.behaviors[behavior].name == row['behavior']
    assert events.behaviors[behavior].group == row['group']
    scores = brute('a_tuning', prompts.question(row['sample']))
    assert row['score'] == pytest.approx(-scores[behavior], abs=1e-4)
  chosen = set(targets_of(by_nll, 'b_tuning'))
  assert chosen <= {row['sample'] for row in rows}


def test_report_shows_tables_plots_and_examples(finished):
  text = (finished / 'report.md').read_text()
  for image in ('trade_off', 'f1', 'targets', 'predictors', 'reliability'):
    assert f'(report/{image}.png)' in text
    data = (finished / 'report' / f'{image}.png').read_bytes()
    assert data.startswith(b'\x89PNG') and len(data) > 5000
  for words in ('untuned', 'A-Tuning', 'B-Tuning', 'Worked examples'):
    assert words in text
  assert text.count('likeliest of B-Tuning') == 1 + 10


@pytest.mark.slow
def test_running_again_does_nothing_again(finished, run_command):
  # The report and its plots are drawn anew, and alike.
  look = lambda: {
    path: (path.read_bytes(), path.stat().st_mtime_ns)
    for path in sorted(finished.rglob('*'))
    if path.is_file()
  }
  before = look()
  done = run_command(finished)
  assert done.returncode == 0, done.stderr[-3000:]
  after = look()
  assert {p: content for p, (content, _) in before.items()} == {
    p: content for p, (content, _) in after.items()
  }
  touched = {p.relative_to(finished).parts[0] for p in after if before[p] != after[p]}
  assert touched <= {'report.md', 'report.html', 'report', 'base'}
  assert 'is finished' in done.stderr
