"""The tables of the report, as blocks; a table without rows is left out."""

from collections.abc import Sequence

import numpy as np

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.report.blocks import Mono, Table
from behaviorlm_jax.report.predictors import PredictorFiles
from behaviorlm_jax.report.run_files import RunFiles
from behaviorlm_jax.report.verdict import Outcome

_GROWS = (
  'Tail macro-F1 grows with the number n of test events: compare it only where n is '
  'the same.'
)


def data(run: RunFiles) -> Table:
  rows = [(_spaced(key), _value(value)) for key, value in run.summary.items()]
  return Table(('what', 'value'), rows)


def results(predictors: Sequence[PredictorFiles]) -> Table:
  # The names of evaluate: what is shown can be found in evaluation.json.
  keys = ('n', 'log_p', 'map', 'coverage@5', 'accuracy@1', 'accuracy@3', 'accuracy@5')
  columns = {'all': (*keys, 'ndcg@5', 'f1_weighted', 'f1_macro')}
  return Table(
    ('all behaviors', *_heads(columns), 'ece'),
    [
      (one.name, *_scores(one.evaluation, columns), one.evaluation.get('ece'))
      for one in predictors
    ],
    'Every predictor as it is on the same test events: first the free baselines, which '
    'only count, then what is trained. With counts: mixed with markov. Log p in nats, '
    'all else as fractions; ece: how far probabilities are off, lower is better.',
  )


def groups(predictors: Sequence[PredictorFiles]) -> Table:
  keys = ('n', 'log_p', 'map', 'coverage@5', 'accuracy@1', 'precision_weighted')
  columns = dict.fromkeys(('anchor', 'tail'), (*keys, 'f1_macro'))
  return Table(
    ('by group', *_heads(columns)),
    [(one.name, *_scores(one.evaluation, columns)) for one in predictors],
    'Frequent (anchor) and rare (tail) behaviors apart, every predictor as it is; n '
    f'test events each. {_GROWS}',
  )


def points(predictors: Sequence[PredictorFiles]) -> Table:
  """A row per predictor and operating point."""
  columns = {'all': ('n', 'accuracy@1', 'f1_macro')}
  columns |= dict.fromkeys(('anchor', 'tail'), ('n', 'f1_macro'))
  return Table(
    ('predictor', 'point', 'rule', *_heads(columns)),
    [
      (one.name, _spaced(point), found['how'], *_scores(found, columns))
      for one in predictors
      for point, found in one.evaluation.get('points', {}).items()
    ],
    'What each predictor reaches where it is used for accuracy, for macro-F1 of all '
    'behaviors, or for the tail at little cost to the anchors. The validation split '
    f'settled every rule. {_GROWS}',
  )


def _scores(evaluation: dict, columns: dict[str, Sequence[str]]) -> list[float | None]:
  # Older versions wrote fewer of them.
  return [evaluation[group].get(key) for group in columns for key in columns[group]]


def _heads(columns: dict[str, Sequence[str]]) -> list[str]:
  names = [f'{group} {key}' for group in columns for key in columns[group]]
  return [_spaced(name.removeprefix('all ')) for name in names]


def _spaced(key: str) -> str:
  return key.replace('_', ' ')


def changes(outcome: Outcome | None) -> Table:
  """Each comparison of the verdict in numbers."""
  if not outcome:
    return Table()
  rows = [
    (
      change.score,
      change.other,
      change.before,
      change.after,
      change.size,
      *(change.interval or (None, None)),
      'within its uncertainty' if change.outcome == 'within' else change.outcome,
    )
    for changes in outcome.contrasts.values()
    for change in changes
  ]
  head = ('score', 'compared with', 'its score', outcome.final, 'change')
  text = f'What {outcome.final} changed.'
  if outcome.users > 1:
    text += f' Intervals: the same 1,000 redraws of {outcome.users:,} users for both.'
  return Table((*head, '95 % from', '95 % to', 'reads as'), rows, text)


def context(run: RunFiles) -> Table:
  """How much of each stage's skill is copying from its context."""
  rows = []
  # Not the baselines: they have no context.
  for stage in run.predicting:
    inside, log_prob = stage.column('in_context'), stage.column('log_prob')
    row = [stage.name]
    for part in (inside, ~inside):
      # The mean of nothing is shown as missing, not as 0.
      means = [float(v[part].mean()) for v in (stage.right, log_prob) if part.any()]
      row += [int(part.sum()), *(means or [None, None])]
    rows.append(row)
  wheres, columns = ('in context', 'not in context'), ('n', 'accuracy@1', 'mean log p')
  return Table(
    ('stage', *(f'{where}: {column}' for where in wheres for column in columns)),
    rows,
    'Test events whose true behavior stands in the context that the model '
    'was shown, and those where it does not; log p in nats.',
  )


def retention(run: RunFiles) -> Table:
  """What each stage still knows of the untuned model."""
  columns = ('perplexity', 'perplexity_ratio', 'kl_to_base')
  found = {s.name: s.retention['conversations'] for s in run.stages if s.retention}
  if not found:
    return Table()
  n = next(iter(found.values()))['n']  # The same conversations for every stage.
  return Table(
    ('stage', *(column.replace('_', ' ') for column in columns)),
    [
      (name, *(_with_interval(values, column) for column in columns))
      for name, values in found.items()
    ],
    'Held-out conversations: perplexity of their answer tokens, its ratio to '
    'the untuned model and the KL divergence from it in nats per token '
    f'(n = {n:,} conversations). Brackets: 95 % intervals.',
  )


def _with_interval(values: dict, name: str) -> str:
  interval = values[f'{name}_interval']
  around = f' ({interval[0]:.3f} to {interval[1]:.3f})' if interval else ''
  return f'{values[name]:.3f}{around}'


def behaviors(run: RunFiles) -> Table:
  """Every behavior, most frequent first."""
  stages = {stage.name: run.per_behavior(stage) for stage in run.predicting}
  if not stages:
    return Table()
  support = list(stages.values())[-1][3]
  names = [f'{stage}: {score}' for stage in stages for score in ('recall', 'F1')]
  rows = []
  for i in run.by_frequency:
    row = run.behaviors[i]
    # Of precision, recall, F1 and support.
    scores = [float(score) for found in stages.values() for score in found[1:3, i]]
    rows.append(
      (row['name'], row['group'], row['train_count'], int(support[i]), *scores)
    )
  return Table(
    ('behavior', 'group', 'training events', 'test events', *names),
    rows,
    'Sorted by training events. Recall and F1 are '
    'fractions; without a test event both are 0.',
  )


def times(run: RunFiles) -> Table:
  """How fast each stage was trained."""
  head = ('stage', 'steps', 'first step after (s)', 'seconds per step (median)')
  rates = ('tokens per second', 'targets per second', 'wasted positions (share)')
  return Table(
    (*head, *rates),
    [(stage.name, *_speed(stage.steps)) for stage in run.stages if stage.steps],
    'Compilation counts for the first step only; '
    'the rates are those of the steps after it.',
  )


def _speed(steps: list[dict]) -> tuple[float | None, ...]:
  """The values of a row of `times`; None for what was not measured."""
  # A step that waited for a compilation, as the first does, is not timed.
  waited = [row for row in steps if 'seconds_to_first_step' in row]
  timed = [row for row in steps if 'seconds' in row]
  seconds, tokens, targets = (
    [row[key] for row in timed] for key in ('seconds', 'tokens', 'samples')
  )
  return (
    len(steps),
    waited[0]['seconds_to_first_step'] if waited else None,
    # Not the mean: a step that waited for the disk would move it.
    float(np.median(seconds)) if timed else None,
    # Sum over sum: a mean of rates would count short steps as much as long ones.
    round(sum(tokens) / sum(seconds)) if timed else None,
    sum(targets) / sum(seconds) if timed else None,
    float(np.mean([row['padding'] for row in steps])),
  )


def config(run: RunFiles) -> Table:
  """One row per trained stage; the whole config is in its config.json."""
  taught = ('steps', 'learning_rate', 'interpolation', 'softmax', 'prior')
  rows = []
  for stage in run.stages:
    if not stage.config or stage.key == 'base':
      continue
    name = 'a' if stage.key == 'a_tuning' else 'one' if stage.one_stage else 'b'
    own = config_lib.stage_of(stage.config, name)
    # Of all fields those that runs differ in; the rest is in the file that is named.
    values = (
      *(stage.config['train'][key] for key in ('batch', 'length')),
      *(getattr(own, key) for key in taught),
      *(stage.config[key] for key in ('seed', 'ablations')),
    )
    whole = Mono(f'{stage.key}/config.json')
    rows.append((stage.name, *map(_value, values), whole))
  names = (_spaced(key) for key in taught)
  head = ('stage', 'batch (rows)', 'length (tokens)', *names)
  return Table((*head, 'seed', 'ablations', 'whole config'), rows)


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
