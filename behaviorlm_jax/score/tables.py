"""The Markdown tables of the report.

Every cell goes through `cell`, so that no text of the log can break the page.
A table without rows is the empty string.
"""

FILES = (  # of the work directory, in the order in which they come to be
    ('events/', 'the sorted log, its behaviors, counts and rejected rows'),
    ('base/', 'evaluation and predictions of the untuned model'),
    ('baselines.json', 'scores of the four free baselines'),
    ('a_tuning/', 'stage 1: config, plan, metrics, checkpoints, adapter, '
     'evaluation, predictions'),
    ('b_tuning/', 'stage 2: the same files and `difficulty.parquet`'),
    ('report/', 'the plots of this page'))


def data_table(run) -> str:
  anchors = int(run.anchor.sum())
  rows = [(key.replace('_', ' '), _value(value))
          for key, value in run.summary.items()]
  shown = set(run.summary)
  rows += [(name, number(value)) for name, value in (
      ('behaviors', len(run.behaviors)), ('anchors', anchors),
      ('tails', len(run.behaviors) - anchors),
      ('unseen', run.unseen)) if name not in shown]
  return table(('what', 'value'), rows)


def _scored(run):
  """(name, evaluation) of baselines and stages that have one."""
  return list(run.baselines.items()) + [
      (s.name, s.evaluation) for s in run.stages if s.evaluation]


def results_table(run) -> str:
  keys = ('accuracy@1', 'accuracy@3', 'accuracy@5', 'ndcg@5', 'f1_weighted',
          'f1_macro')
  rows = [(name, *(fraction(scores['all'][key]) for key in keys))
          for name, scores in _scored(run)]
  head = ('all behaviors', *(key.replace('_', ' ') for key in keys))
  return table(head, rows)


def groups_table(run) -> str:
  keys = ('accuracy@1', 'precision_weighted', 'f1_macro')
  head, rows = ['by group'], []
  for group in ('anchor', 'tail'):
    head += [f'{group} n', *(f'{group} {k.replace("_", " ")}' for k in keys)]
  for name, scores in _scored(run):
    row = [name]
    for group in ('anchor', 'tail'):
      row += [number(scores[group]['n'])]
      row += [fraction(scores[group][key]) for key in keys]
    rows.append(row)
  return table(head, rows)


def context_table(run) -> str:
  """How much of each stage's skill is copying from its context."""
  head = ['stage']
  for where in ('in context', 'not in context'):
    head += [f'{where}: n', 'accuracy@1', 'mean log p']
  rows = []
  for stage in run.predicting:
    inside, log_prob = stage.column('in_context'), stage.column('log_prob')
    row = [stage.name]
    for mask in (inside, ~inside):
      row += [number(int(mask.sum()))]
      row += [f'{values[mask].mean():.3f}' if mask.any() else '-'
              for values in (stage.right, log_prob)]
    rows.append(row)
  return table(head, rows)


def files_table(run) -> str:
  return table(('file', 'content'), [
      (f'`{name}`', what) for name, what in FILES
      if (run.workdir / name).exists()])


def config_table(run) -> str:
  """One row per trained stage; the whole config is in its config.json."""
  keys = ('steps', 'batch', 'length', 'learning_rate')
  rows = []
  for stage in run.stages:
    if stage.config and stage.key != 'base':
      train = stage.config.get('train', {})
      rows.append((
          stage.name, *(_value(train.get(key, '-')) for key in keys),
          _value(stage.config.get('seed', '-')),
          _value(stage.ablations), f'`{stage.key}/config.json`'))
  head = ('stage', 'steps', 'batch (rows)', 'length (tokens)',
          'learning rate', 'seed', 'ablations', 'whole config')
  return table(head, rows)


def table(head, rows) -> str:
  """A Markdown table; empty without rows."""
  if not rows:
    return ''
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(
      '| ' + ' | '.join(cell(value) for value in line) + ' |'
      for line in lines)


def cell(value) -> str:
  """Text from the log made harmless in Markdown: one line, no column break."""
  text = ' '.join(str(value).split())
  for character in '\\|<*':
    text = text.replace(character, '\\' + character)
  return text


def fraction(value):
  return f'{value:.3f}'


def number(value):
  return f'{value:,}' if isinstance(value, int) else '-'


def _value(value):
  """Any JSON value as one cell."""
  if isinstance(value, dict):
    return ', '.join(f'{key} {_value(item)}' for key, item in value.items())
  if isinstance(value, list):
    return '; '.join(_value(item) for item in value) or 'none'
  if isinstance(value, bool) or not isinstance(value, int):
    return str(value)
  return number(value)
