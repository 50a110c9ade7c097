"""The final stage beside the others: changes with intervals, for the verdict.

Intervals are 95 % percentiles of a bootstrap over users, moved so that their
draws average to the score itself. Redrawn users lack behaviors that few of all
users show, and a behavior that is missing counts as F1 of zero: the draws of a
macro-F1 lie below the score, all of them where many behaviors are rare.

Two predictors are compared on the same samples under the same redrawn users, so
the interval of a change is a paired one. Baselines leave scores alone behind;
what the best one predicted is counted again from the events.
"""

import dataclasses
import functools

import numpy as np

from behaviorlm_jax.score import baselines
from behaviorlm_jax.score import labels
from behaviorlm_jax.score import metrics
from behaviorlm_jax.score.verdict import Change
from behaviorlm_jax.score.verdict import Outcome

SCORES = {  # name: (group, key) in an evaluation
    'accuracy': ('all', 'accuracy@1'),
    'tail macro-F1': ('tail', 'f1_macro'),
    'anchor macro-F1': ('anchor', 'f1_macro')}


@dataclasses.dataclass(frozen=True)
class Arm:
  """First choices of one predictor for the samples of the final stage."""
  true: np.ndarray  # ids int64[n]
  predicted: np.ndarray  # ids int64[n]
  user: np.ndarray  # [n]
  anchor: np.ndarray  # bool[Y]

  def value(self, score) -> float:
    if score == 'accuracy':
      return float(np.mean(self.true == self.predicted))
    f1 = metrics.per_behavior(self.true, self.predicted, len(self.anchor))[2]
    return float(f1[self._members(score)].mean())

  def draws(self, score):
    """The score under redrawn users: float64[draws]."""
    if score == 'accuracy':
      return bootstrap_accuracy(self.true == self.predicted, self.user)
    return metrics.bootstrap_macro_f1(
        self.true, self.predicted, self._members(score), self.user)

  def _members(self, score):
    return ~self.anchor if score.startswith('tail') else self.anchor


def bootstrap_accuracy(right, user, draws=1000, seed=0):
  """Accuracy under redrawn users, as metrics.bootstrap_macro_f1 draws them."""
  rng = np.random.default_rng(seed)
  names, owner = np.unique(np.asarray(user), return_inverse=True)
  hits, count = np.bincount(owner, right), np.bincount(owner)
  result = np.zeros(draws)
  for draw in range(draws):
    drawn = rng.integers(len(names), size=len(names))
    result[draw] = hits[drawn].sum() / count[drawn].sum()
  return result


def outcome(run) -> Outcome | None:
  """What the verdict needs; None where no stage predicted anything."""
  if not run.predicting or not len(run.predicting[-1].right):
    return None
  *others, final = run.predicting
  arm = _arm(run, final, _predicted(run, final))
  known = {'all': np.ones_like(run.anchor), 'tail': ~run.anchor,
           'anchor': run.anchor}
  samples = {group: int(members[arm.true].sum())
             for group, members in known.items()}
  scores = [name for name, (group, _) in SCORES.items() if samples[group]]
  values = {name: arm.value(name) for name in scores}
  users = len(np.unique(arm.user))
  draws = {name: arm.draws(name) for name in scores} if users > 1 else {}
  change = functools.partial(_change, arm, draws)
  contrasts = {
      _called(stage): [
          change(name, stage.name, _arm(run, final, _predicted(run, stage)))
          for name in scores]
      for stage in others if _same_samples(stage, final)}
  contrasts |= _baseline_contrast(run, final, scores, change)
  return Outcome(
      final=_called(final),
      scores={name: (value, _interval(value, draws.get(name)))
              for name, value in values.items()},
      samples=samples, users=users, contrasts=contrasts)


def _baseline_contrast(run, final, scores, change):
  """{heading: changes} against the best baseline of each score, or {}."""
  best = {name: run.best_baseline(*SCORES[name]) for name in scores}
  if not run.baselines or 'data' not in final.config:
    return {}
  names = {name for _, name in best.values()}
  arms = {name: _arm(run, final, _counted(run, final, name)) for name in names}
  called = 'the best count baseline'
  called += f' ({names.pop()})' if len(names) == 1 else ' of each score'
  return {called: [
      change(score, name, arms[name]) for score, (_, name) in best.items()]}


def _counted(run, final, name):
  """What a baseline predicts for the final stage's samples: ids int64[n]."""
  samples = final.column('sample')
  scores = baselines.scores(
      name, run.events, samples, final.config['data']['history'],
      final.config['seed'])
  return labels.best(scores, 1)[:, 0]


def _change(arm, draws, score, name, other):
  before, after = other.value(score), arm.value(score)
  interval = None
  if score in draws:
    interval = _interval(after - before, draws[score] - other.draws(score))
  return Change(score, name, before, after, interval)


def _arm(run, final, predicted):
  return Arm(run.encode(final.column('behavior')), predicted,
             final.column('user'), run.anchor)


def _predicted(run, stage):
  return run.encode(stage.column('predicted'))


def _same_samples(stage, other):
  return np.array_equal(stage.column('sample'), other.column('sample'))


def _called(stage):
  return {'untuned': 'the untuned model', 'one stage': 'one-stage tuning'}.get(
      stage.name, stage.name)


def _interval(value, draws):
  if draws is None:
    return None
  low, high = value + np.quantile(draws - draws.mean(), [0.025, 0.975])
  return float(low), float(high)
