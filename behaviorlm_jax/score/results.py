"""What many runs say together: three tables of rows, and a page of them.

  results.csv      a score of one predictor of one run
  differences.csv  what one predictor changes against another, over all seeds
  trade_off.csv    anchor against tail macro-F1 of one predictor at one tau

The page needs nothing but these files. A row names its run by log, method and
seed, and by `settings`: a hash of all that its config changes, so that a row of
other settings is not taken for it. Predictors that are fitted on the validation
split are named after what they stand on: `one_stage_adjusted`. In differences
`NAME_matched` is NAME at the anchor macro-F1 of its control (compare.matched).
"""

import csv
import dataclasses
import hashlib
import io
import json
import re

import numpy as np
from absl import logging

from behaviorlm_jax import config as config_lib
from behaviorlm_jax import files
from behaviorlm_jax import workdir as workdir_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.score import adjust
from behaviorlm_jax.score import blocks
from behaviorlm_jax.score import compare
from behaviorlm_jax.score import difficulty
from behaviorlm_jax.score import labels
from behaviorlm_jax.score import plots
from behaviorlm_jax.score import run_files

SCORES = (('all', 'accuracy@1'), ('all', 'precision_weighted'),
          ('anchor', 'f1_macro'), ('tail', 'f1_macro'),
          ('all', 'nll'))  # Of the main table.
METRICS = ('accuracy@1', 'precision_weighted', 'f1_weighted', 'f1_macro',
           'ndcg@5')
# What stands in the column `group` for scores of score.retention.
RETENTION = (('conversations', 'perplexity_ratio'),
             ('conversations', 'kl_to_base'), ('questions', 'accuracy'))
# Training steps alone, of both stages; neither compilation nor scoring.
COST = (('training', 'seconds'), ('training', 'targets'))
# Groups of behaviors by training frequency, the most frequent tenth first.
DECILES = {f'decile_{i}': i for i in range(1, 11)}
# Of tail behaviors that plan.shots would limit, and of runs where it does: how
# many targets of each were taught, on average.
FEW_SHOT = 'few_shot', 'f1_macro'
FEW_TARGETS = 'few_shot', 'targets'
_MATCHED = '_matched'
# Columns of each file; those before `:` name a row.
_FILES = {
    'results.csv': 'data method seed group metric : value n settings',
    'differences.csv': 'data method control metric : seeds n before change low '
                       'high settings',
    'trade_off.csv': 'data method seed tau : anchor tail settings'}
_NUMBERS = {'seed': int, 'seeds': int, 'n': int, **dict.fromkeys(
    ('value', 'before', 'change', 'low', 'high', 'tau', 'anchor', 'tail'),
    float)}


@dataclasses.dataclass
class Rows:
  """The rows of the three files, by what names them."""
  tables: dict  # {file: {key: row}}

  def add(self, name, **row):
    key = tuple(row[column] for column in _columns(name)[0])
    self.tables[name][key] = row

  def of(self, name):
    return list(self.tables[name].values())


def _columns(name):
  key, values = _FILES[name].split(':')
  return key.split(), values.split()


def read(folder) -> Rows:
  """The rows that stand in a folder; none where a file is missing."""
  rows = Rows({name: {} for name in _FILES})
  for name in _FILES:
    path = folder / name
    if path.is_file():
      with path.open(encoding='utf-8', newline='') as lines:
        for row in csv.DictReader(lines):
          rows.add(name, **{
              column: _NUMBERS.get(column, str)(text) if text else None
              for column, text in row.items()})
  return rows


def write(folder, rows):
  for name in _FILES:
    text, found = io.StringIO(), rows.tables[name]
    columns = [*_columns(name)[0], *_columns(name)[1]]
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    for key in sorted(found):
      writer.writerow({column: _short(found[key][column])
                       for column in columns})
    files.write_text(folder / name, text.getvalue())


def _short(value):
  return f'{value:.6g}' if isinstance(value, float) else value


def settings_hash(config, origin='') -> str:
  """8 hex digits of what a config changes, but for seed and local paths.

  `origin`: the hash of the run whose stage a it starts from, if any.
  """
  default = workdir_lib.as_dict(config_lib.default())
  changed = workdir_lib.flat(workdir_lib.as_dict(config))
  default = workdir_lib.flat(default)
  for name in ('seed', 'init_from', 'data.events', 'retention.questions'):
    del changed[name]
  different = {name: value for name, value in changed.items()
               if value != default.get(name)}
  text = (json.dumps(different, sort_keys=True) + origin
          + f'defaults {config_lib.DEFAULTS}')
  return hashlib.sha256(text.encode()).hexdigest()[:8]


class Finished:
  """The predictors of one finished run.

  Attributes:
    evaluations: {name: evaluation}.
    retention: {name: what score.retention measured}.
    arms: {name: compare.Arm}, of those that may be compared.
    log_p: {name: float [n, Y]}, of those that a curve is drawn of.
    priors: {name: log prior float [Y]} of the same.
    cost: {name: {metric: value}} of COST.
    few_targets: {name: value} of FEW_TARGETS.
  """

  def __init__(self, job):
    """`job`: what has log, seed, name, method, folder and config of a run."""
    run = run_files.load(job.folder)
    self.evaluations = dict(run.baselines)
    self.retention, self.arms = {}, {}
    self.log_p, self.priors, self.few_targets = {}, {}, {}
    self.anchor, self.cost = run.anchor, {}
    self.deciles = dict(zip(DECILES, np.array_split(run.by_frequency, 10),
                            strict=True))
    self.few_shot = samples_lib.few_shot_mask(run.counts, run.anchor)
    for stage in run.scored:
      name = _method(job, stage)
      if name:
        self._add(run, stage, name)
        self.cost[name] = _cost(job, stage)
        if stage.key in run_files.TRAINED and self.few_shot.any() and (
            job.config.plan.shots is not None):
          self.few_targets[name] = _few_targets(run, stage, self.few_shot)
    if run.sasrec:
      self._add(run, run.sasrec, 'sasrec')
    stage = run.scored[-1]
    self.true = run.encode(stage.column('behavior'))
    for name in ('markov', 'markov_adjusted'):
      scores = compare.counted(run, stage, name)
      self.arms[name] = compare.arm(run, stage, labels.best(scores, 1)[:, 0])
      if name == 'markov':
        self.log_p[name], self.priors[name] = scores, run.log_prior()

  def _add(self, run, stage, name):
    fitted = stage.evaluation.get('fitted', {})
    self.retention[name] = stage.retention
    columns = {name: 'predicted', **{f'{name}_{kind}': kind for kind in fitted}}
    self.evaluations |= {name: stage.evaluation, **{
        f'{name}_{kind}': scores for kind, scores in fitted.items()}}
    for called, column in columns.items():
      self.arms[called] = compare.arm(
          run, stage, run.encode(stage.column(column)))
    self.arms[name] = dataclasses.replace(
        self.arms[name], log_p=stage.column('log_prob'))
    log_p = stage.log_p('test')
    if log_p is not None:
      self.log_p[name], self.priors[name] = log_p, run.log_prior(stage)


def _few_targets(run, stage, few_shot):
  """Targets that a stage's plan has of each of these behaviors, the mean."""
  targets = run_files.plan_targets(stage.folder / 'plan.parquet')
  return few_shot[run.events.behavior[targets]].sum() / few_shot.sum()


def _cost(job, stage):
  """What the training of a stage, and of the one it began with, took.

  Steps that wait for a compilation are not timed and count as the mean step.
  """
  if stage.key == 'base':
    return {}
  folders = [stage.folder]
  if stage.key == 'b_tuning' and workdir_lib.needs_stage_a(job.config):
    origin = workdir_lib.stage_a_adapter(job.config, job.folder)
    folders.append(origin.parent)
  steps = [run_files.read_json_lines(folder / 'metrics.jsonl')
           for folder in folders]
  return {'seconds': sum(map(_seconds, steps)),
          'targets': sum(row['samples'] for stage in steps for row in stage)}


def _seconds(steps):
  timed = [row['seconds'] for row in steps if 'seconds' in row]
  return len(steps) * float(np.mean(timed)) if timed else 0.0


def _method(job, stage):
  """What a stage's predictor is called in the tables, or None: left out."""
  if stage.key == 'base':
    return 'untuned'
  if stage.key == 'a_tuning' and tuple(job.config.stages) != ('a',):
    return None
  return job.name


def collect(jobs, contrasts, rows):
  """Adds the rows of finished runs to `rows`.

  Args:
    jobs: finished runs.
    contrasts: [(method, control)].
    rows: Rows; those of the same name are replaced, but for a difference that
      stands over more seeds.
  """
  arms, curves, settings = {}, {}, {}
  for job in jobs:
    found, one = Finished(job), {'data': job.log, 'seed': job.seed}
    for name, measured in found.retention.items():
      for part, metric in RETENTION:
        if part in measured:
          rows.add('results.csv', **one, method=name, group=part, metric=metric,
                   value=measured[part][metric], n=measured[part]['n'],
                   settings=job.settings)
    for name, evaluation in found.evaluations.items():
      for group in ('all', 'anchor', 'tail'):
        for metric in METRICS:
          rows.add('results.csv', **one, method=name, group=group,
                   metric=metric, value=evaluation[group][metric],
                   n=evaluation[group]['n'], settings=job.settings)
    for name, cost in found.cost.items():
      for metric, value in cost.items():
        rows.add('results.csv', **one, method=name, group='training',
                 metric=metric, value=value, n=1, settings=job.settings)
    for name, arm in found.arms.items():
      for group, members in found.deciles.items():
        if len(members):
          rows.add('results.csv', **one, method=name, group=group,
                   metric='f1_macro', value=arm.macro_f1(members),
                   n=int(np.isin(arm.true, members).sum()),
                   settings=job.settings)
      if found.few_shot.any():
        group, metric = FEW_SHOT
        rows.add('results.csv', **one, method=name, group=group, metric=metric,
                 value=arm.macro_f1(found.few_shot), settings=job.settings,
                 n=int(found.few_shot[arm.true].sum()))
    for name, value in found.few_targets.items():
      group, metric = FEW_TARGETS
      rows.add('results.csv', **one, method=name, group=group, metric=metric,
               value=float(value), n=int(found.few_shot.sum()),
               settings=job.settings)
    for name, log_p in found.log_p.items():
      losses = difficulty.nll(log_p, found.true)
      everyone = np.ones_like(found.anchor)
      for group, chosen in (('all', everyone),
                            ('anchor', found.anchor), ('tail', ~found.anchor)):
        part = losses[chosen[found.true]]
        if len(part):
          rows.add('results.csv', **one, method=name, group=group, metric='nll',
                   value=float(part.mean()), n=len(part), settings=job.settings)
      points = adjust.trade_off(log_p, found.priors[name], found.true,
                                found.anchor)
      for tau, (anchor, tail) in zip(adjust.TAUS, points, strict=True):
        rows.add('trade_off.csv', **one, method=name, tau=tau,
                 anchor=float(anchor), tail=float(tail), settings=job.settings)
    for name, arm in found.arms.items():
      arms.setdefault((job.log, name), {})[job.seed] = arm
      settings[job.log, name] = job.settings
    for name, log_p in found.log_p.items():
      curves.setdefault((job.log, name), {})[job.seed] = (
          log_p, found.priors[name])
  for log in dict.fromkeys(job.log for job in jobs):
    for method, control in contrasts:
      before, after = (arms.get((log, name), {}) for name in (control, method))
      name = method.removesuffix(_MATCHED)
      if name != method:
        own = arms.get((log, name), {})
        after = {seed: compare.matched(before[seed], own[seed], *curve,
                                       adjust.TAUS)
                 for seed, curve in curves.get((log, name), {}).items()
                 if seed in before}
      _contrast(log, method, control, before, after,
                settings.get((log, name)), rows)


def _contrast(log, method, control, before, after, settings, rows):
  seeds = sorted(set(after) & set(before))
  pairs = [(before[seed], after[seed]) for seed in seeds]
  if not pairs:
    return
  for one, other in pairs:
    if not (np.array_equal(one.true, other.true)
            and np.array_equal(one.user, other.user)):
      logging.warning(
          '%s and %s were evaluated on different events of %s: no difference '
          'is shown.', method, control, log)
      return
  for score in (*compare.SCORES, *compare.LOG_P):
    if score in compare.LOG_P and not all(
        one.log_p is not None and other.log_p is not None
        and one.counted(score).any() for one, other in pairs):
      continue
    known = rows.tables['differences.csv'].get((log, method, control, score))
    if known and known['seeds'] > len(seeds):
      continue
    value, change, interval = compare.paired(pairs, score)
    low, high = interval or (None, None)
    rows.add('differences.csv', data=log, method=method, control=control,
             metric=score, seeds=len(seeds),
             n=sum(len(arm.true) for arm, _ in pairs), before=value,
             change=change, low=low, high=high, settings=settings)


def report(folder, methods, drawn):
  """Writes tables.md and its figures of the rows in a folder.

  Args:
    folder: pathlib.Path.
    methods: names in the order of the tables; others follow.
    drawn: names of those that have a curve in the figure.
  """
  rows = read(folder)
  if not rows.of('results.csv'):
    raise InputError(f'{folder} has no results.csv with rows; give the folder '
                     'of a sweep.')
  content = [blocks.Heading(1, 'Results of the runs so far')]
  for log in sorted({row['data'] for row in rows.of('results.csv')}):
    content += [
        blocks.Heading(2, log),
        _table(rows, log, methods, SCORES, 'Mean over the seeds and, where '
               'there are several, their standard deviation; other seeds have '
               'other test events, too. nll: mean -log p of what happened, in '
               'nats; lower is better.'),
        _shots(rows) and _table(
            rows, log, methods, (FEW_SHOT, FEW_TARGETS), 'Tail behaviors with '
            f'{samples_lib.FEW_SHOT_FROM} training events or more: mean F1, '
            'and targets of each that were taught, on average, again and again '
            'or not.'),
        _differences(rows, log),
        _table(rows, log, methods, RETENTION, 'What each model still knows, on '
               'held-out conversations and multiple-choice questions.'),
        _table(rows, log, methods, COST, 'What training took, both stages: '
               'seconds of its steps, and targets.')]
  content += _figures(folder, rows, methods, drawn)
  files.write_text(folder / 'tables.md', blocks.markdown(
      [block for block in content if block]))


def _figures(folder, rows, methods, drawn):
  content, panels = [], _curves(rows, drawn)
  if panels:
    plots.trade_off(folder / 'trade_off.png', panels, adjust.TAUS)
    content.append(blocks.Figure(
        'trade_off.png', 'Anchors against tail',
        'Each curve raises or lowers rare names, tau from '
        f'{adjust.TAUS[0]} to {adjust.TAUS[-1]}, on average over the seeds; '
        'the large mark is the predictor as it is. Further up and right is '
        'better at every balance.', 'Curves of tail against anchor macro-F1.'))
  panels = _shots(rows)
  if panels:
    plots.few_shot(folder / 'few_shot.png', panels)
    content.append(blocks.Figure(
        'few_shot.png', 'Learning from few samples',
        'Mean F1 of the tail behaviors with '
        f'{samples_lib.FEW_SHOT_FROM} training events or more, by how many '
        'samples of each there were to learn from; on average over the seeds.',
        'Lines of F1 against the number of samples.'))
  panels = _deciles(rows, drawn)
  if panels:
    plots.deciles(folder / 'deciles.png', panels)
    content.append(blocks.Figure(
        'deciles.png', 'F1 by frequency',
        'Mean F1 of each tenth of the behaviors, ordered by their training '
        'events; on average over the seeds.', 'Lines of F1 per decile.'))
  panels = _kept(rows, methods)
  if panels:
    plots.kept(folder / 'retention.png', panels,
               'perplexity, over that of the untuned model')
    content.append(blocks.Figure(
        'retention.png', 'Conversations held out of training',
        'Perplexity of each model over that of the untuned one, a mark per '
        'seed; right of 1 it has lost something.',
        'Marks of the ratio of perplexities per method.'))
  return content


def _table(rows, log, methods, columns, caption):
  """A row per method that has one of these (group, metric) columns."""
  values = {}
  for row in rows.of('results.csv'):
    if row['data'] == log:
      scores = values.setdefault(row['method'], {})
      scores.setdefault((row['group'], row['metric']), []).append(row)
  names = [name for name in sorted(values, key=lambda n: _place(n, methods))
           if values[name].keys() & set(columns)]
  shown = []
  for name in names:
    found = [values[name].get(column, []) for column in columns]
    first = next(filter(None, found))
    shown.append((name, len(first), sum(row['n'] for row in first), *(
        _spread([row['value'] for row in part]) for part in found)))
  head = [f'{group} {metric.replace("_", " ")}' for group, metric in columns]
  return blocks.Table(('method', 'seeds', 'n', *head), shown, caption)


def _spread(values):
  if not values:
    return None
  if len(values) == 1:
    return f'{values[0]:.3f}'
  return f'{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}'


def _place(name, methods):
  """Sorts a method's variants behind it."""
  found = [i for i, method in enumerate(methods)
           if name == method or name.startswith(f'{method}_')]
  longest = max(found, key=lambda i: len(methods[i]), default=len(methods))
  return longest, name


def _differences(rows, log):
  table = [
      (row['method'], row['control'], row['metric'], row['seeds'],
       row['before'], row['change'], row['low'], row['high'])
      for row in rows.of('differences.csv') if row['data'] == log]
  return blocks.Table(
      ('method', 'against', 'score', 'seeds', 'its score', 'change',
       '95 % from', '95 % to'), table,
      'Paired differences on the same test events; intervals from 1,000 '
      'redraws of the users. What is called matched is adjusted by the largest '
      'tau at which its anchor macro-F1 is that of what it stands against, or '
      'better; these very events choose it, once for all redraws.')


def _curves(rows, drawn):
  """{log: {method: float [T, 2]}}, means over the seeds."""
  found = {}
  for row in rows.of('trade_off.csv'):
    if row['method'] not in drawn:
      continue
    points = found.setdefault(row['data'], {}).setdefault(row['method'], {})
    points.setdefault(row['tau'], []).append((row['anchor'], row['tail']))
  return {
      log: {name: np.array([np.mean(curves[name][tau], axis=0)
                            for tau in sorted(curves[name])])
            for name in drawn if name in curves}
      for log, curves in sorted(found.items())}


def _deciles(rows, drawn):
  """{log: {method: {decile: mean F1}}}."""
  found = {}
  for row in rows.of('results.csv'):
    if row['group'] in DECILES and row['method'] in drawn:
      lines = found.setdefault(row['data'], {}).setdefault(row['method'], {})
      lines.setdefault(DECILES[row['group']], []).append(row['value'])
  return {log: {name: {i: float(np.mean(lines[name][i]))
                       for i in sorted(lines[name])}
                for name in drawn if name in lines}
          for log, lines in sorted(found.items())}


def _kept(rows, methods):
  """{log: {method: ratios of perplexity, a seed each}}."""
  found = {}
  for row in rows.of('results.csv'):
    if ((row['group'], row['metric']) == RETENTION[0]
        and row['method'] != 'untuned'):
      values = found.setdefault(row['data'], {})
      values.setdefault(row['method'], []).append(row['value'])
  return {log: {name: values[name] for name in sorted(
      values, key=lambda n: _place(n, methods))}
          for log, values in sorted(found.items())}


def _shots(rows):
  """{log: {method: {shots: mean F1}}} of methods called NAME_N_shots."""
  found = {}
  for row in rows.of('results.csv'):
    match = re.fullmatch(r'(.+)_(\d+)_shots(.*)', row['method'])
    if match and (row['group'], row['metric']) == FEW_SHOT:
      lines = found.setdefault(row['data'], {}).setdefault(
          match[1] + match[3], {})
      lines.setdefault(int(match[2]), []).append(row['value'])
  return {log: {name: {shots: float(np.mean(values[shots]))
                       for shots in sorted(values)}
                for name, values in lines.items()
                if 'mixed' not in name} for log, lines in found.items()}
