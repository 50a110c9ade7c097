"""The tables of the report, as blocks; a table without rows is left out."""

import numpy as np

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.report import run_files
from behaviorlm_jax.report.blocks import Mono, Table
from behaviorlm_jax.report.verdict import Outcome

FILES = (  # of the work directory, in the order in which they come to be
  ('events/', 'the sorted log, its behaviors, counts and rejected rows'),
  ('base/', 'evaluation and predictions of the untuned model'),
  ('baselines.json', 'scores of the free baselines'),
  (
    'a_tuning/',
    'stage 1: config, plan, metrics, checkpoints, adapter, evaluation, predictions',
  ),
  (
    'b_tuning/',
    'stage 2: the same files, and difficulty.parquet where samples were scored',
  ),
  ('report/', 'the figures of this page'),
)
FITTED = {
  'adjusted': 'adjusted',
  'mixed': 'with counts',
  'mixed_adjusted': 'with counts, adjusted',
}


def data(run: run_files.RunFiles) -> Table:
  anchors = int(run.anchor.sum())
  rows = [(key.replace('_', ' '), _value(value)) for key, value in run.summary.items()]
  rows += [
    (name, value)
    for name, value in (
      ('behaviors', len(run.behaviors)),
      ('anchors', anchors),
      ('tails', len(run.behaviors) - anchors),
      ('unseen', run.unseen),
    )
    if name not in run.summary
  ]
  return Table(('what', 'value'), rows)


def _scored(run: run_files.RunFiles) -> list[tuple[str, dict]]:
  """(name, evaluation) of baselines and stages that have one."""
  rows = list(run.baselines.items())
  for stage in [run.sasrec] * bool(run.sasrec) + run.scored:
    rows.append((stage.name, stage.evaluation))
    fitted = stage.evaluation.get('fitted', {})
    rows += [
      (f'{stage.name}, {FITTED[name]}', scores) for name, scores in fitted.items()
    ]
  return rows


def results(run: run_files.RunFiles) -> Table:
  # The names of evaluate.metrics: what is shown can be found in evaluation.json.
  keys = ('accuracy@1', 'accuracy@3', 'accuracy@5', 'ndcg@5', 'f1_weighted', 'f1_macro')
  rows = [
    (name, *(scores['all'][key] for key in keys)) for name, scores in _scored(run)
  ]
  return Table(
    ('all behaviors', *(key.replace('_', ' ') for key in keys)),
    rows,
    'Every predictor on the same test events, as fractions: first the free '
    'baselines, which only count, then the stages. With counts: mixed with '
    'markov; adjusted: rare names raised or lowered; both as the validation '
    'split would have it.',
  )


def groups(run: run_files.RunFiles) -> Table:
  keys = ('accuracy@1', 'precision_weighted', 'f1_macro')
  names = [(group, key) for group in ('anchor', 'tail') for key in ('n', *keys)]
  rows = [
    (name, *(scores[group][key] for group, key in names))
    for name, scores in _scored(run)
  ]
  head = [f'{group} {key.replace("_", " ")}' for group, key in names]
  return Table(
    ('by group', *head),
    rows,
    'Frequent (anchor) and rare (tail) behaviors apart; n test events each.',
  )


def retention(run: run_files.RunFiles) -> Table:
  """What each stage still knows of the untuned model."""
  columns = ('perplexity', 'perplexity_ratio', 'kl_to_base')
  found = [
    (stage.name, stage.retention['conversations'])
    for stage in run.stages
    if stage.retention
  ]
  if not found:
    return Table((), [])
  rows = [
    (name, *(_with_interval(values, column) for column in columns))
    for name, values in found
  ]
  head = [column.replace('_', ' ') for column in columns]
  n = found[-1][1]['n']  # The same conversations for every stage.
  return Table(
    ('stage', *head),
    rows,
    'Held-out conversations: perplexity of their answer tokens, its ratio to '
    'the untuned model and the KL divergence from it in nats per token '
    f'(n = {n:,} conversations). Brackets: 95 % intervals.',
  )


def _with_interval(values: dict, name: str) -> str:
  interval = values[f'{name}_interval']
  around = f' ({interval[0]:.3f} to {interval[1]:.3f})' if interval else ''
  return f'{values[name]:.3f}{around}'


def changes(outcome: Outcome | None) -> Table:
  """Each comparison of the verdict in numbers."""
  words = {'within': 'within its uncertainty', 'unknown': 'unknown'}
  if not outcome:
    return Table((), [])
  rows = [
    (
      change.score,
      change.other,
      change.before,
      change.after,
      change.size,
      *(change.interval or (None, None)),
      words.get(change.outcome, change.outcome),
    )
    for changes in outcome.contrasts.values()
    for change in changes
  ]
  return Table(
    (
      'score',
      'compared with',
      'its score',
      outcome.final,
      'change',
      '95 % from',
      '95 % to',
      'reads as',
    ),
    rows,
    f'What {outcome.final} changed. The intervals come from 1,000 redraws '
    f'of the {outcome.users:,} users, the same for both sides.'
    if outcome.users > 1
    else f'What {outcome.final} changed.',
  )


def context(run: run_files.RunFiles) -> Table:
  """How much of each stage's skill is copying from its context."""
  head = ['stage']
  for where in ('in context', 'not in context'):
    head += [f'{where}: {what}' for what in ('n', 'accuracy@1', 'mean log p')]
  rows = []
  # Not the baselines: of these scores alone are kept, no predictions.
  for stage in run.predicting:
    inside, log_prob = stage.column('in_context'), stage.column('log_prob')
    row = [stage.name]
    for mask in (inside, ~inside):
      row += [int(mask.sum())]
      row += [
        # The mean of nothing is shown as missing, not as 0.
        float(values[mask].mean()) if mask.any() else None
        for values in (stage.right, log_prob)
      ]
    rows.append(row)
  return Table(
    tuple(head),
    rows,
    'Test events whose true behavior stands in the context that the model '
    'was shown, and those where it does not; log p in nats.',
  )


def behaviors(run: run_files.RunFiles) -> Table:
  """Every behavior, most frequent first."""
  stages = [(stage, run.per_behavior(stage)) for stage in run.predicting]
  if not stages:
    return Table((), [])
  support = stages[-1][1][3]
  head = ['behavior', 'group', 'training events', 'test events']
  for stage, _ in stages:
    head += [f'{stage.name}: recall', f'{stage.name}: F1']
  rows = []
  for i in run.by_frequency:
    row = run.behaviors[i]
    rows.append(
      (
        row['name'],
        row['group'],
        row['train_count'],
        int(support[i]),
        *(float(scores[k][i]) for _, scores in stages for k in (1, 2)),
      )
    )
  return Table(
    tuple(head),
    rows,
    'Sorted by training events. Recall and F1 are '
    'fractions; without a test event both are 0.',
  )


def times(run: run_files.RunFiles) -> Table:
  """How fast each stage was trained; columns only for what was noted."""
  columns = {
    name: []
    for name in (
      'steps',
      'first step after (s)',
      'seconds per step (median)',
      'tokens per second',
      'targets per second',
      'wasted positions (share)',
    )
  }
  trained = [stage for stage in run.stages if stage.steps]
  # A step notes what it can tell; a column that none has filled is left out.
  for stage in trained:
    for column, value in zip(columns.values(), _speed(stage.steps), strict=True):
      column.append(value)
  kept = {
    name: values
    for name, values in columns.items()
    if any(value is not None for value in values)
  }
  rows = [
    (stage.name, *values)
    for stage, *values in zip(trained, *kept.values(), strict=True)
  ]
  return Table(
    ('stage', *kept),
    rows,
    'Compilation counts for the first step only; '
    'the rates are those of the steps after it.',
  )


def _speed(steps: list[dict]) -> tuple[float | None, ...]:
  """The values of a row of `times`; None for what no step noted."""
  noted = lambda key: [row[key] for row in steps if row.get(key) is not None]
  first, seconds, padding = map(noted, ('seconds_to_first_step', 'seconds', 'padding'))
  tokens, targets = _rate(steps, 'tokens'), _rate(steps, 'samples')
  return (
    len(steps),
    first[0] if first else None,
    # Not the mean: a step that waited for the disk would move it.
    float(np.median(seconds)) if seconds else None,
    None if tokens is None else round(tokens),
    targets,
    float(np.mean(padding)) if padding else None,
  )


def _rate(steps: list[dict], key: str) -> float | None:
  """Sum of `key` per second over the steps that noted both."""
  pairs = [
    (row[key], row['seconds']) for row in steps if key in row and 'seconds' in row
  ]
  if not pairs:
    return None
  # Sum over sum: a mean of rates would count short steps as much as long ones.
  amount, seconds = map(sum, zip(*pairs, strict=True))
  return amount / seconds


def files(run: run_files.RunFiles) -> Table:
  return Table(
    ('file', 'content'),
    [(Mono(name), what) for name, what in FILES if (run.workdir / name).exists()],
  )


def config(run: run_files.RunFiles) -> Table:
  """One row per trained stage; the whole config is in its config.json."""
  taught = ('steps', 'learning_rate', 'interpolation', 'softmax', 'prior')
  rows = []
  for stage in run.stages:
    if stage.config and stage.key != 'base':
      name = 'a' if stage.key == 'a_tuning' else 'one' if stage.one_stage else 'b'
      own = config_lib.stage_of(stage.config, name)
      rows.append(
        (
          stage.name,
          *(_value(stage.config['train'][key]) for key in ('batch', 'length')),
          *(_value(getattr(own, key)) for key in taught),
          _value(stage.config.get('seed')),
          _value(stage.ablations),
          Mono(f'{stage.key}/config.json'),
        )
      )
  head = (
    'stage',
    'batch (rows)',
    'length (tokens)',
    'steps',
    'learning rate',
    'interpolation',
    'softmax',
    'prior',
    'seed',
    'ablations',
    'whole config',
  )
  return Table(head, rows)


def _value(value: object) -> object:
  """Any JSON value as one cell; fractions as they were written."""
  if isinstance(value, dict):
    return ', '.join(f'{key} {_text(item)}' for key, item in value.items())
  if isinstance(value, list):
    return '; '.join(_text(item) for item in value) or 'none'
  return str(value) if isinstance(value, float | bool) else value


def _text(value: object) -> str:
  # Not isinstance: True is an int.
  return f'{value:,}' if type(value) is int else str(_value(value))
