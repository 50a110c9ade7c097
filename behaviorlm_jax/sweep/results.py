"""What finished runs say, as rows (sweep.rows): scores of each run, and paired
differences of predictors over all of them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.cluster import ownership
from behaviorlm_jax.evaluate import adjust
from behaviorlm_jax.report import compare, run_files
from behaviorlm_jax.score import difficulty, label_tree
from behaviorlm_jax.sweep import choices, few_shot
from behaviorlm_jax.sweep import rows as rows_lib

if TYPE_CHECKING:  # It imports this module.
  from behaviorlm_jax.sweep import jobs as jobs_lib

METRICS = ('accuracy@1', 'precision_weighted', 'f1_weighted', 'f1_macro', 'ndcg@5')
# Ends the name of a method at the anchor macro-F1 of its control.
_MATCHED = '_matched'


def settings_hash(
  config: ConfigDict, origin: str = '', shots: int | None = None
) -> str:
  """8 hex digits of what a config changes, but for seed and local paths.

  `origin`: the hash of the run whose stage a it starts from, if any; `shots`: of
  a thinned log.
  """
  default, changed = _as_hashed(config_lib.default()), _as_hashed(config)
  # Rows tell seeds and logs apart themselves; where another stage a lies says
  # less of it than `origin`.
  for name in ('seed', 'init_from', 'data.events'):
    del changed[name]
  # Not the whole config: a field that is new leaves the rows of old runs valid.
  different = {
    name: value for name, value in changed.items() if value != default.get(name)
  }
  if shots is not None:
    different['plan.shots'] = shots
  text = (
    json.dumps(different, sort_keys=True) + origin + f'defaults {config_lib.DEFAULTS}'
  )
  return hashlib.sha256(text.encode()).hexdigest()[:8]


# What a prior within names was called, beside `answers`, over the vocabulary.
_LOSSES = {'drawn': 'names', 'natural': 'natural', 'uniform': 'balanced'}


def _as_hashed(config):
  """{name: value} under the names of when committed rows were hashed."""
  values = ownership.flat(ownership.as_dict(config))
  for old, new in config_lib.RENAMED.items():
    values[old] = values.pop(new)
  for stage, old in (('a', 'train.loss'), ('b', 'train.balanced_loss')):
    softmax, prior = values.pop(f'{stage}.softmax'), values.pop(f'{stage}.prior')
    values[old] = 'answers' if softmax == 'vocabulary' else _LOSSES[prior]
  alone = values['plan.content'] == 'anchors' and values['train.loss'] != 'answers'
  if alone and 'a' in config.stages:
    values['plan.content'] = 'anchors among anchors'  # Once, among all names.
  return values


class Finished:
  """The predictors of one finished run.

  Attributes:
    evaluations: {name: evaluation}.
    retention: {name: what evaluate.retention measured}.
    arms: {name: compare.Arm}, of those that may be compared.
    log_p: {name: float [n, Y]}, of those that a curve is drawn of.
    by_tau: {name: ids int64 [T, n]} of the same, adjust.first_choices.
    digest: of its test events, choices.digest.
    own: names of the predictors that other runs do not bring along.
    cost: {name: {metric: value}} of rows_lib.COST.
    few_targets: {name: value} of rows_lib.FEW_TARGETS.
  """

  def __init__(self, job: 'jobs_lib.Job'):
    """`job`: what has log, seed, name, method, folder and config of a run."""
    run, whole = run_files.read_run(job.folder), job.method.shots is None
    # What any run brings along is told of the whole log alone.
    self.evaluations = dict(run.baselines) if whole else {}
    self.retention, self.arms = {}, {}
    self.log_p, self.by_tau, self.few_targets = {}, {}, {}
    self.anchor, self.cost, self.own = run.anchor, {}, set()
    self.deciles = dict(
      zip(rows_lib.DECILES, np.array_split(run.by_frequency, 10), strict=True)
    )
    self.few_shot = np.isin(
      [b['name'] for b in run.behaviors], few_shot.thinned_names(run)
    )
    last = run.scored[-1]
    self.true = run.encode(last.column('behavior'))
    self.digest = choices.digest(run.ids, run.anchor, last.column('sample'), self.true)
    counted = compare.counted(run, last, 'markov')
    for stage in run.scored:
      name = _method(job, stage)
      if name:
        names = self._add(run, stage, name, counted)
        if name == job.name:
          self.own |= names
        self.cost[name] = _cost(job, stage)
        if not whole and self.few_shot.any():
          self.few_targets[name] = _few_targets(run, stage, self.few_shot)
    if run.sasrec:
      names = self._add(run, run.sasrec, 'sasrec', counted)
      if not job.config.stages:  # Else it comes along, as counts do.
        self.own |= names
    if whole:
      self._curve('markov', counted, run.log_prior)
      for name, scores in (
        ('markov', counted),
        ('markov_adjusted', compare.counted(run, last, 'markov_adjusted')),
      ):
        self.arms[name] = compare.arm(run, last, label_tree.best(scores, 1)[:, 0])

  def _add(
    self,
    run: run_files.RunFiles,
    stage: run_files.Stage,
    name: str,
    counted: np.ndarray,
  ) -> set[str]:
    """A stage's predictor and those fitted on top of it; returns all names."""
    fitted = stage.evaluation.get('fitted', {})
    self.retention[name] = stage.retention
    columns = {name: 'predicted', **{f'{name}_{kind}': kind for kind in fitted}}
    self.evaluations |= {
      name: stage.evaluation,
      **{f'{name}_{kind}': scores for kind, scores in fitted.items()},
    }
    for called, column in columns.items():
      self.arms[called] = compare.arm(run, stage, run.encode(stage.column(column)))
    # The predictor's own log p alone stands in its predictions; `mixed` follows
    # from it below, and what is adjusted is no distribution.
    self.arms[name] = dataclasses.replace(
      self.arms[name], log_p=stage.column('log_prob')
    )
    log_p = stage.log_p('test')
    if log_p is not None:
      self._curve(name, log_p, run.log_prior)
      mixed, weights = f'{name}_mixed', fitted['mixed']
      self._curve(
        mixed,
        adjust.mix_log_p(log_p, counted, weights['a'], weights['b']),
        run.log_prior,
      )
      self.arms[mixed] = dataclasses.replace(
        self.arms[mixed], log_p=self.log_p[mixed][np.arange(len(self.true)), self.true]
      )
    return set(columns)

  def _curve(self, name: str, log_p: np.ndarray, prior: np.ndarray) -> None:
    self.log_p[name] = log_p
    self.by_tau[name] = adjust.first_choices(log_p, prior)


def _few_targets(
  run: run_files.RunFiles, stage: run_files.Stage, few_shot: np.ndarray
) -> float:
  """Targets that a stage's plan has of each of these behaviors, the mean."""
  targets = run_files.plan_targets(stage.folder / 'plan.parquet')
  return few_shot[run.events.behavior[targets]].sum() / few_shot.sum()


def _cost(job: 'jobs_lib.Job', stage: run_files.Stage) -> dict[str, float]:
  """What the training of a stage, and of the one it began with, took."""
  if stage.key == 'base':
    return {}
  folders = [stage.folder]
  if stage.key == 'b_tuning' and ownership.needs_stage_a(job.config):
    origin = ownership.stage_a_adapter(job.config, job.folder)
    folders.append(origin.parent)
  steps = [run_files.read_json_lines(folder / 'metrics.jsonl') for folder in folders]
  return {
    'seconds': sum(map(_seconds, steps)),
    'targets': sum(row['samples'] for stage in steps for row in stage),
  }


def _seconds(steps: Sequence[Mapping]) -> float:
  # Steps that wait for a compilation are not timed and count as the mean step.
  timed = [row['seconds'] for row in steps if 'seconds' in row]
  return len(steps) * float(np.mean(timed)) if timed else 0.0


def _method(job: 'jobs_lib.Job', stage: run_files.Stage) -> str | None:
  """What a stage's predictor is called in the tables, or None: left out."""
  if stage.key == 'base':
    return 'untuned' if job.method.shots is None else None
  # On the way to stage b it is no method: another job may stop there.
  if stage.key == 'a_tuning' and tuple(job.config.stages) != ('a',):
    return None
  return job.name


def add_rows(
  jobs: Sequence['jobs_lib.Job'],
  contrasts: Iterable[tuple[str, str]],
  rows: rows_lib.Rows,
  folder: Path,
) -> None:
  """Adds the rows of finished runs to `rows`.

  Args:
    jobs: runs, finished or not.
    contrasts: [(method, control)].
    rows: Rows; those of the same name are replaced. Of a difference the rows
      that have one of its seeds or other settings go; one of the same settings
      over all of its seeds and more stays instead.
    folder: where the choices of finished runs are written; those of others are
      read there, and stand for them in differences.
  """
  arms, curves, settings, at_hand = {}, {}, {}, {}

  def add(
    job: 'jobs_lib.Job',
    names: Iterable[str],
    found_arms: Mapping[str, compare.Arm],
    by_tau: Mapping[str, np.ndarray],
  ) -> None:
    for name, arm in found_arms.items():
      arms.setdefault((job.log, name), {})[job.seed] = arm
    for name, chosen in by_tau.items():
      curves.setdefault((job.log, name), {})[job.seed] = chosen
    settings.update({(job.log, name): job.settings for name in names})

  # Finished ones first: what others chose is read by their test events.
  for job in jobs:
    if job.finished:
      found = Finished(job)
      _add_scores(job, found, rows)
      add(job, found.own, found.arms, found.by_tau)
      choices.write_choices(folder, job, found)
      # Any predictor will do: samples, users and anchors are the same for all.
      at_hand[found.digest] = next(iter(found.arms.values()))
  for job in jobs:
    if not job.finished:
      kept, by_tau = choices.read_choices(folder, job, at_hand)
      add(job, kept, kept, by_tau)
  for log in dict.fromkeys(job.log for job in jobs):
    for method, control in contrasts:
      before, after = (arms.get((log, name), {}) for name in (control, method))
      name = method.removesuffix(_MATCHED)
      if name != method:  # Anchors as good as the control's, seed by seed.
        own = arms.get((log, name), {})
        after = {
          seed: compare.matched(before[seed], own[seed], by_tau)
          for seed, by_tau in curves.get((log, name), {}).items()
          if seed in before
        }
      used = '/'.join(settings.get((log, found), '') for found in (name, control))
      _contrast(_Difference(log, method, control, used), before, after, rows)


@dataclasses.dataclass(frozen=True)
class _Difference:
  """What names the rows of a difference."""

  log: str
  method: str
  control: str
  settings: str  # Of both.


def _add_scores(job: 'jobs_lib.Job', found: Finished, rows: rows_lib.Rows) -> None:
  """Adds what one run says by itself."""
  run = {'data': job.log, 'seed': job.seed, 'settings': job.settings}

  def add(method: str, group: str, metric: str, value: float, n: int) -> None:
    rows.add(
      'results.csv', **run, method=method, group=group, metric=metric, value=value, n=n
    )

  for name, measured in found.retention.items():
    for part, metric in rows_lib.RETENTION:
      if part in measured:
        add(name, part, metric, measured[part][metric], measured[part]['n'])
  for name, evaluation in found.evaluations.items():
    for group in ('all', 'anchor', 'tail'):
      for metric in METRICS:
        add(name, group, metric, evaluation[group][metric], evaluation[group]['n'])
  for name, cost in found.cost.items():
    for metric, value in cost.items():
      add(name, 'training', metric, value, 1)
  for name, arm in found.arms.items():
    for group, members in found.deciles.items():
      if len(members):  # Fewer than ten behaviors leave some tenths empty.
        add(
          name,
          group,
          'f1_macro',
          arm.macro_f1(members),
          int(np.isin(arm.true, members).sum()),
        )
    if found.few_shot.any():
      add(
        name,
        *rows_lib.FEW_SHOT,
        arm.macro_f1(found.few_shot),
        int(found.few_shot[arm.true].sum()),
      )
  for name, value in found.few_targets.items():
    add(name, *rows_lib.FEW_TARGETS, float(value), int(found.few_shot.sum()))
  for name, log_p in found.log_p.items():
    losses = difficulty.nll(log_p, found.true)
    for group, chosen in (
      ('all', np.ones_like(found.anchor)),
      ('anchor', found.anchor),
      ('tail', ~found.anchor),
    ):
      part = losses[chosen[found.true]]
      if len(part):
        add(name, group, 'nll', float(part.mean()), len(part))
    points = adjust.trade_off(found.by_tau[name], found.true, found.anchor)
    for tau, (anchor, tail) in zip(adjust.TAUS, points, strict=True):
      rows.add(
        'trade_off.csv',
        **run,
        method=name,
        tau=tau,
        anchor=float(anchor),
        tail=float(tail),
      )


def _contrast(
  what: _Difference,
  before: Mapping[int, compare.Arm],
  after: Mapping[int, compare.Arm],
  rows: rows_lib.Rows,
) -> None:
  """Adds the differences of {seed: Arm}."""
  seeds = sorted(set(after) & set(before))
  pairs = [(before[seed], after[seed]) for seed in seeds]
  if not pairs:
    return
  for one, other in pairs:
    if not all(
      np.array_equal(getattr(one, name), getattr(other, name))
      for name in ('true', 'user', 'anchor')
    ):
      logging.warning(
        '%s and %s were evaluated on different events of %s: no difference is shown.',
        what.method,
        what.control,
        what.log,
      )
      return
  for score in (*compare.SCORES, *compare.LOG_P):
    if score in compare.LOG_P and not all(
      one.log_p is not None and other.log_p is not None and one.counted(score).any()
      for one, other in pairs
    ):
      continue
    known = rows.seeds_of(
      what.log, what.method, what.control, score, settings=what.settings
    )
    # A committed row over these seeds and more says more than these alone.
    if any(found > set(seeds) for found in known.values()):
      continue
    for key, found in known.items():
      if not found or found & set(seeds):  # A seed counts once.
        del rows.tables['differences.csv'][key]
    value, change, interval = compare.paired(pairs, score)
    low, high = interval or (None, None)
    rows.add(
      'differences.csv',
      data=what.log,
      method=what.method,
      control=what.control,
      metric=score,
      seeds=' '.join(map(str, seeds)),
      n=sum(len(arm.true) for arm, _ in pairs),
      before=value,
      change=change,
      low=low,
      high=high,
      settings=what.settings,
    )
