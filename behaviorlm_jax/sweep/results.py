"""What finished runs say, as rows (sweep.rows): scores of each run, and paired
differences of predictors over all of them."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.cluster import ownership
from behaviorlm_jax.evaluate import adjust, metrics
from behaviorlm_jax.report import compare, run_files
from behaviorlm_jax.score import difficulty, label_tree
from behaviorlm_jax.sweep import choices, few_shot
from behaviorlm_jax.sweep import rows as rows_lib
from behaviorlm_jax.sweep.job import Job

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
  flat = lambda config: ownership.flat(ownership.as_dict(config))
  default, changed = flat(config_lib.default()), flat(config)
  # Rows tell seeds and logs apart themselves; where another stage a lies says
  # less of it than `origin`.
  for name in ('seed', 'init_from', 'data.events'):
    del changed[name]
  # Not the whole config: a field that is new leaves the rows of old runs valid.
  different = {name: value for name, value in changed.items() if value != default[name]}
  if shots is not None:
    different['plan.shots'] = shots
  text = json.dumps(different, sort_keys=True) + origin
  text += f'defaults {config_lib.DEFAULTS}'
  return hashlib.sha256(text.encode()).hexdigest()[:8]


class Finished:
  """The predictors of one finished run."""

  def __init__(self, job: Job):
    self._run = run = run_files.read_run(job.folder)
    last = run.scored[-1]
    self._counted = compare.counted(run, last, 'markov')
    self.true = run.encode(last.column('behavior'))  # ids int64 [n].
    self.digest = choices.digest(run.ids, run.anchor, last.column('sample'), self.true)
    self.groups = _groups(run)
    self.predictors: dict[str, choices.Predictor] = {}
    self.own = set()  # Names of those that other runs do not bring along.
    # What any run brings along is told of the whole log alone.
    if job.method.shots is None:
      self._add_baselines(last)
    own = job.name if job.config.stages else 'sasrec'
    for stage in (*run.scored, run.sasrec):
      if stage and (name := _method(job, stage)):
        names = self._add_stage(stage, name)
        if name == own:
          self.own = names
        if stage.key in ('a_tuning', 'b_tuning'):
          self.predictors[name].scores += self._training(job, stage)

  def _add_baselines(self, last: run_files.StageFiles) -> None:
    adjusted = compare.counted(self._run, last, 'markov_adjusted')
    compared = {'markov': self._counted, 'markov_adjusted': adjusted}
    for name, evaluation in self._run.baselines.items():
      arm = None
      if name in compared:
        predicted = label_tree.best(compared[name], 1)[:, 0]
        arm = compare.arm(self._run, last, predicted)
      self._add(name, evaluation, arm, self._counted if name == 'markov' else None)

  def _add_stage(self, stage: run_files.StageFiles, name: str) -> set[str]:
    """A stage's predictor and those that are fitted on top of it; their names."""
    run, fitted = self._run, stage.evaluation.get('fitted', {})

    def arm(column: str, log_p: np.ndarray | None) -> compare.Arm:
      found = compare.arm(run, stage, run.encode(stage.column(column)))
      return dataclasses.replace(found, log_p=log_p)

    log_p = stage.log_p('test')
    self._add(name, stage.evaluation, arm('predicted', stage.column('log_prob')), log_p)
    self.predictors[name].scores += [
      (part, metric, stage.retention[part][metric], stage.retention[part]['n'])
      for part, metric in rows_lib.RETENTION
      if part in stage.retention
    ]
    for kind, evaluation in fitted.items():
      mixed = of_true = None  # What is adjusted is no distribution.
      if kind == 'mixed' and log_p is not None:
        mixed = adjust.mix_log_p(log_p, self._counted, evaluation['a'], evaluation['b'])
        of_true = mixed[np.arange(len(self.true)), self.true]
      self._add(f'{name}_{kind}', evaluation, arm(kind, of_true), mixed)
    return {name, *(f'{name}_{kind}' for kind in fitted)}

  def _add(
    self,
    name: str,
    evaluation: Mapping,
    arm: compare.Arm | None,
    log_p: np.ndarray | None,
  ) -> None:
    """Adds a predictor; `log_p`: float [n, Y], of those that have a curve."""
    scores = [
      (group, metric, evaluation[group][metric], evaluation[group]['n'])
      for group in metrics.GROUPS
      for metric in METRICS
    ]
    by_tau = None
    if arm:
      scores += self._f1(arm)
    if log_p is not None:
      scores += self._losses(log_p)
      by_tau = adjust.first_choices(log_p, self._run.log_prior)
    self.predictors[name] = choices.Predictor(arm, by_tau, scores)

  def _f1(self, arm: compare.Arm) -> Iterator[choices.Score]:
    for group in (*rows_lib.DECILES, 'few_shot'):
      members = self.groups[group]
      if members.any():  # Fewer than ten behaviors leave some tenths empty.
        yield group, 'f1_macro', arm.macro_f1(members), int(members[arm.true].sum())

  def _losses(self, log_p: np.ndarray) -> Iterator[choices.Score]:
    losses = difficulty.nll(log_p, self.true)
    for group in metrics.GROUPS:
      part = losses[self.groups[group][self.true]]
      if len(part):
        yield group, 'nll', float(part.mean()), len(part)

  def _training(self, job: Job, stage: run_files.StageFiles) -> Iterator[choices.Score]:
    """What a stage took, and of a thinned log what it taught."""
    for metric, value in _cost(job, stage).items():
      yield 'training', metric, value, 1
    thinned = self.groups['few_shot']
    if job.method.shots is not None and thinned.any():
      targets = run_files.plan_targets(stage.folder / 'plan.parquet')
      count = int(thinned.sum())
      taught = thinned[self._run.events.behavior[targets]].sum()
      yield *rows_lib.FEW_TARGETS, float(taught / count), count


def _groups(run: run_files.RunFiles) -> dict[str, np.ndarray]:
  """Behaviors bool [Y] of which there are scores."""
  ids, names = np.arange(len(run.behaviors)), [b['name'] for b in run.behaviors]
  tenths = zip(rows_lib.DECILES, np.array_split(run.by_frequency, 10), strict=True)
  return {
    'all': np.ones_like(run.anchor),
    'anchor': run.anchor,
    'tail': ~run.anchor,
    'few_shot': np.isin(names, few_shot.thinned_names(run)),
    **{name: np.isin(ids, members) for name, members in tenths},
  }


def _cost(job: Job, stage: run_files.StageFiles) -> dict[str, float]:
  """What the training of a stage, and of the one it began with, took."""
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


def _method(job: Job, stage: run_files.StageFiles) -> str | None:
  """What a stage's predictor is called in the tables, or None: left out."""
  if stage.key == 'sasrec':
    return 'sasrec'
  if stage.key == 'base':
    return 'untuned' if job.method.shots is None else None
  # On the way to stage b it is no method: another job may stop there.
  if stage.key == 'a_tuning' and tuple(job.config.stages) != ('a',):
    return None
  return job.name


def add_rows(
  jobs: Sequence[Job],
  contrasts: Iterable[tuple[str, str]],
  rows: rows_lib.Rows,
  folder: Path,
) -> None:
  """Adds the rows of finished runs to `rows`; those of the same name are replaced.

  Of a difference the rows that have one of its seeds or other settings go; one
  of the same settings over all of its seeds and more stays instead.

  Args:
    jobs: runs, finished or not.
    contrasts: [(method, control)].
    folder: where the choices of finished runs are written; those of others are
      read there, and stand for them in differences.
  """
  predictors, settings, at_hand = collections.defaultdict(dict), {}, {}
  # Finished ones first: what others chose is read by their test events.
  for job in sorted(jobs, key=lambda job: not job.finished):
    if job.finished:
      run = Finished(job)
      _add_scores(job, run, rows)
      found = {name: one for name, one in run.predictors.items() if one.arm}
      own = {name: found[name] for name in run.own}
      choices.write_choices(folder, job, own, run.digest)
      # Any predictor will do: samples, users and anchors are the same for all.
      at_hand[run.digest] = next(iter(found.values())).arm
    else:
      found = own = choices.read_choices(folder, job, at_hand)
    settings.update({(job.log, name): job.settings for name in own})
    for name, predictor in found.items():
      predictors[job.log, name][job.seed] = predictor
  for log in dict.fromkeys(job.log for job in jobs):
    for method, control in contrasts:
      name = method.removesuffix(_MATCHED)
      used = '/'.join(settings.get((log, one), '') for one in (name, control))
      named = {'data': log, 'method': method, 'control': control, 'settings': used}
      pairs = _pairs(predictors[log, control], predictors[log, name], name != method)
      if pairs and _of_same_events(named, pairs.values()):
        _add_differences(named, pairs, rows)


def _pairs(
  before: Mapping[int, choices.Predictor],
  after: Mapping[int, choices.Predictor],
  matched: bool,
) -> dict[int, tuple[compare.Arm, compare.Arm]]:
  """{seed: arms of both}; `matched`: anchors as good as the control's."""
  pairs = {}
  for seed in sorted(before.keys() & after.keys()):
    one, other, by_tau = before[seed].arm, after[seed].arm, after[seed].by_tau
    if not matched:
      pairs[seed] = one, other
    elif by_tau is not None and one.anchor.any():
      pairs[seed] = one, choices.matched(one, other, by_tau)
  return pairs


def _of_same_events(
  named: Mapping[str, str], pairs: Iterable[tuple[compare.Arm, compare.Arm]]
) -> bool:
  same = all(
    np.array_equal(getattr(one, name), getattr(other, name))
    for one, other in pairs
    for name in ('true', 'user', 'anchor')
  )
  if not same:
    logging.warning(
      '%(method)s and %(control)s were evaluated on different events of %(data)s: '
      'no difference is shown.',
      named,
    )
  return same


def _add_scores(job: Job, run: Finished, rows: rows_lib.Rows) -> None:
  """Adds what one run says by itself."""
  common = {'data': job.log, 'seed': job.seed, 'settings': job.settings}
  for name, predictor in run.predictors.items():
    named = {**common, 'method': name}
    for group, metric, value, n in predictor.scores:
      rows.add('results.csv', **named, group=group, metric=metric, value=value, n=n)
    if predictor.by_tau is None:
      continue
    points = adjust.trade_off(predictor.by_tau, run.true, run.groups['anchor'])
    for tau, (anchor, tail) in zip(adjust.TAUS, points, strict=True):
      rows.add('trade_off.csv', **named, tau=tau, anchor=anchor, tail=tail)


def _add_differences(
  named: Mapping[str, str],
  pairs: Mapping[int, tuple[compare.Arm, compare.Arm]],
  rows: rows_lib.Rows,
) -> None:
  """Adds what differs in {seed: (before, after)}; `named`: what names its rows."""
  seeds, arms = set(pairs), list(pairs.values())
  for score in (*compare.SCORES, *compare.LOG_P):
    if not all(one.has(score) for one, _ in arms):
      continue
    if score in compare.LOG_P and not all(
      one.log_p is not None and other.log_p is not None and one.counted(score).any()
      for one, other in arms
    ):
      continue
    known = rows.differences(**named, metric=score)
    # A committed row over these seeds and more says more than these alone.
    if any(found > seeds for found in known.values()):
      continue
    for key, found in known.items():
      if not found or found & seeds:  # A seed counts once.
        del rows.tables['differences.csv'][key]
    before, change, interval = compare.paired(arms, score)
    low, high = interval or (None, None)
    rows.add(
      'differences.csv',
      **named,
      metric=score,
      seeds=' '.join(map(str, pairs)),
      n=sum(len(arm.true) for arm, _ in arms),
      before=before,
      change=change,
      low=low,
      high=high,
    )
