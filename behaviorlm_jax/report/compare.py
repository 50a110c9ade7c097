"""The final stage beside the others: changes with intervals, for the verdict.

Intervals are 95 % percentiles of a bootstrap over users, moved so that their
draws average to the score itself. Redrawn users lack behaviors that few of all
users show, and a behavior that is missing counts as F1 of zero: the draws of a
macro-F1 lie below the score, all of them where many behaviors are rare.

Two predictors are compared on the same samples under the same redrawn users, so
the interval of a change is a paired one. What a baseline ranks first, before it is
calibrated, is counted again from the events.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from behaviorlm_jax.evaluate import metrics
from behaviorlm_jax.report.run_files import RunFiles, StageFiles
from behaviorlm_jax.report.verdict import Change, Interval, Outcome
from behaviorlm_jax.score import label_tree

DRAWS = 1000
SCORES = {  # name: (group, key) in an evaluation
  'accuracy': ('all', 'accuracy@1'),
  'tail macro-F1': ('tail', 'f1_macro'),
  'anchor macro-F1': ('anchor', 'f1_macro'),
}
# Mean log p of the true behavior, of samples of a group: tells predictors apart
# where both name the same behavior first.
LOG_P = {'log p': 'all', 'tail log p': 'tail', 'anchor log p': 'anchor'}
_CALLED = {'untuned': 'the untuned model', 'one stage': 'one-stage tuning'}


@dataclasses.dataclass(frozen=True)
class Arm:
  """First choices of one predictor for the samples of the final stage."""

  true: np.ndarray  # ids int64[n]
  predicted: np.ndarray  # ids int64[n]
  user: np.ndarray  # [n]
  anchor: np.ndarray  # bool[Y]
  log_p: np.ndarray | None = None  # Of the true behavior, float[n].

  def value(self, score: str, weight: np.ndarray | None = None) -> float:
    """The score; `weight` float[n] says how often each sample counts."""
    if score == 'accuracy':
      return float(np.average(self.true == self.predicted, weights=weight))
    if score in LOG_P:
      part = self.counted(score)
      weight = weight if weight is None else weight[part]
      return float(np.average(self.log_p[part], weights=weight))
    members = ~self.anchor if score.startswith('tail') else self.anchor
    return self.macro_f1(members, weight)

  def has(self, score: str) -> bool:
    """Whether there is a behavior of the score's group."""
    anchor = score.startswith('anchor')
    return not score.endswith('macro-F1') or bool((self.anchor == anchor).any())

  def macro_f1(self, members: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Of the behaviors bool[Y], of which there is one at least."""
    f1 = metrics.per_behavior(self.true, self.predicted, len(self.anchor), weight)[2]
    return float(f1[members].mean())

  def counted(self, score: str) -> np.ndarray:
    """Samples bool[n] without which there is no such score."""
    group = LOG_P.get(score, 'all')
    every = np.ones(len(self.true), bool)
    return every if group == 'all' else (self.anchor[self.true] == (group == 'anchor'))


def paired(
  pairs: Sequence[tuple[Arm, Arm]], score: str, draws: int = DRAWS
) -> tuple[float, float, Interval | None]:
  """What changed from one predictor to another, on average over seeds.

  Args:
    pairs: [(Arm before, Arm after)], a pair per seed of a run, both of the
      same samples. A user who is in several comes as often in each of them.
    score: key of SCORES or LOG_P, of which every pair has samples.

  Returns:
    (mean before, mean change, interval or None: a single user).
  """
  bounds = np.cumsum([len(before.user) for before, _ in pairs])[:-1]
  user = np.concatenate([before.user for before, _ in pairs])

  def means(weight: np.ndarray) -> np.ndarray:
    """Before and after, float64[2]; `weight` is of the samples of all pairs."""
    parts = zip(pairs, np.split(weight, bounds), strict=True)
    values = [[arm.value(score, part) for arm in pair] for pair, part in parts]
    return np.mean(values, axis=0)

  def stays(weight: np.ndarray) -> bool:
    """Whether no pair is left empty: the mean of nothing is no number."""
    parts = zip(pairs, np.split(weight, bounds), strict=True)
    return all(part[before.counted(score)].any() for (before, _), part in parts)

  before, after = means(np.ones(len(user)))
  drawn = itertools.islice(filter(stays, _redrawn(user)), draws)
  changes = [np.diff(means(weight))[0] for weight in drawn]
  change = float(after - before)
  return float(before), change, _interval(change, changes)


def _redrawn(user: np.ndarray) -> Iterator[np.ndarray]:
  """How often each sample counts, int64[n], in one draw of users after another.

  Without end; of a single user nothing: there is no other to draw.
  """
  names, owner = np.unique(user, return_inverse=True)
  rng = np.random.default_rng(0)
  while len(names) > 1:
    # Whole users, with replacement: the events of one are not independent. Of
    # samples, not of users' means: a user with many of them weighs as many.
    drawn = rng.integers(len(names), size=len(names))
    yield np.bincount(drawn, minlength=len(names))[owner]


def _interval(value: float, draws: Sequence[float]) -> Interval | None:
  """Around a value; None where nothing could be drawn."""
  if not draws:
    return None
  # Moved to average to the value: redrawn users lack rare behaviors, see the
  # module. Its width is kept.
  low, high = value + np.quantile(draws - np.mean(draws), [0.025, 0.975])
  return float(low), float(high)


def outcome(run: RunFiles) -> Outcome | None:
  """What the verdict needs; None where no stage predicted anything."""
  if not run.predicting or not len(run.predicting[-1].right):
    return None
  final = run.predicting[-1]
  last = _stage_arm(run, final)
  anchors = int(run.anchor[last.true].sum())
  samples = {'all': len(last.true), 'tail': len(last.true) - anchors, 'anchor': anchors}
  scores = [name for name, (group, _) in SCORES.items() if samples[group]]
  return Outcome(
    final=_CALLED.get(final.name, final.name),
    scores={score: level(last, score) for score in scores},
    samples=samples,
    users=len(np.unique(last.user)),
    contrasts=_contrasts(run, last, scores),
  )


def level(arm: Arm, score: str) -> tuple[float, Interval | None]:
  """A score, key of SCORES or LOG_P, and its interval."""
  value, drawn = arm.value(score), itertools.islice(_redrawn(arm.user), DRAWS)
  return value, _interval(value, [arm.value(score, weight) for weight in drawn])


def _contrasts(run: RunFiles, last: Arm, scores: list[str]) -> dict[str, list[Change]]:
  """{what the final stage stands against: changes}; see Outcome."""
  *others, final = run.predicting

  def change(score: str, name: str, other: Arm) -> Change:
    before, _, interval = paired([(other, last)], score)
    return Change(score, name, before, last.value(score), interval)

  contrasts = {
    _CALLED.get(stage.name, stage.name): [
      change(score, stage.name, _stage_arm(run, stage)) for score in scores
    ]
    for stage in others
    # Of other samples there is no paired interval.
    if np.array_equal(stage.column('sample'), final.column('sample'))
  }
  # History and seed are needed to count what baselines rank first.
  if run.baselines and final.config:
    best = {score: run.best_baseline(*SCORES[score])[1] for score in scores}
    names = sorted(set(best.values()))
    first = lambda name: label_tree.best(counted(run, final, name), 1)[:, 0]
    arms = {name: arm(run, final, first(name)) for name in names}
    which = f'({names[0]})' if len(names) == 1 else 'of each score'
    contrasts[f'the best count baseline {which}'] = [
      change(score, name, arms[name]) for score, name in best.items()
    ]
  return contrasts


def arm(run: RunFiles, stage: StageFiles, predicted: np.ndarray) -> Arm:
  """First choices int64[n] for the samples of a stage."""
  true, user = run.encode(stage.column('behavior')), stage.column('user')
  return Arm(true, predicted, user, run.anchor)


def _stage_arm(run: RunFiles, stage: StageFiles) -> Arm:
  return arm(run, stage, run.encode(stage.column('predicted')))


def counted(run: RunFiles, stage: StageFiles, name: str) -> np.ndarray:
  """A baseline's scores for the samples of a stage: float32[n, Y]."""
  return run.baseline_counts.scores(name, stage.column('sample'))
