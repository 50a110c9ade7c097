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
from collections.abc import Callable, Sequence

import numpy as np

from behaviorlm_jax.evaluate import metrics
from behaviorlm_jax.report import run_files
from behaviorlm_jax.report.verdict import Change, Outcome
from behaviorlm_jax.score import label_tree

SCORES = {  # name: (group, key) in an evaluation
  'accuracy': ('all', 'accuracy@1'),
  'tail macro-F1': ('tail', 'f1_macro'),
  'anchor macro-F1': ('anchor', 'f1_macro'),
}
# Mean log p of the true behavior, of samples of a group: tells predictors apart
# where both name the same behavior first.
LOG_P = {'log p': 'all', 'tail log p': 'tail', 'anchor log p': 'anchor'}


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
    return self.macro_f1(self._members(score), weight)

  def macro_f1(self, members: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Of the behaviors bool[Y], of which there is one at least."""
    f1 = metrics.per_behavior(self.true, self.predicted, len(self.anchor), weight)[2]
    return float(f1[members].mean())

  def draws(self, score: str) -> np.ndarray:
    """The score under redrawn users: float64[draws]."""
    if score == 'accuracy':
      return bootstrap_accuracy(self.true == self.predicted, self.user)
    return metrics.bootstrap_macro_f1(
      self.true, self.predicted, self._members(score), self.user
    )

  def counted(self, score: str) -> np.ndarray:
    """Samples bool[n] without which there is no such score."""
    group = LOG_P.get(score, 'all')
    every = np.ones(len(self.true), bool)
    return every if group == 'all' else (self.anchor[self.true] == (group == 'anchor'))

  def _members(self, score: str) -> np.ndarray:
    return ~self.anchor if score.startswith('tail') else self.anchor


def matched(control: Arm, own: Arm, by_tau: np.ndarray) -> Arm:
  """`own`, a predictor, as far towards the tail as anchors stay as good.

  Of its first choices at ever larger tau, int64 [T, n] (adjust.first_choices),
  the last ones whose anchor macro-F1 on these very samples is that of `control`
  or better; where none is, those of the best anchors. No predictor to use, but
  what two are to be compared at.
  """
  arms = [dataclasses.replace(own, predicted=best, log_p=None) for best in by_tau]
  anchors = [arm.value('anchor macro-F1') for arm in arms]
  goal = min(control.value('anchor macro-F1'), max(anchors))  # One arm reaches it.
  return max(
    zip(anchors, range(len(arms)), arms, strict=True),
    key=lambda found: (found[0] >= goal, found[1]),  # Of those, the largest tau.
  )[2]


def bootstrap_accuracy(
  right: np.ndarray, user: np.ndarray, draws: int = 1000, seed: int = 0
) -> np.ndarray:
  """Accuracy under redrawn users, as metrics.bootstrap_macro_f1 draws them."""
  # The same calls of the same generator, so that both scores of a draw are of the
  # same users.
  rng = np.random.default_rng(seed)
  names, owner = np.unique(np.asarray(user), return_inverse=True)
  hits, count = np.bincount(owner, right), np.bincount(owner)
  result = np.zeros(draws)
  for draw in range(draws):
    drawn = rng.integers(len(names), size=len(names))
    # Of samples, not of users' means: a user with many of them weighs as many.
    result[draw] = hits[drawn].sum() / count[drawn].sum()
  return result


def paired(
  pairs: Sequence[tuple[Arm, Arm]], score: str, draws: int = 1000, seed: int = 0
) -> tuple[float, float, tuple[float, float] | None]:
  """What changed from one predictor to another, on average over seeds.

  Args:
    pairs: [(Arm before, Arm after)], a pair per seed of a run, both of the
      same samples. A redrawn user counts alike in all of them.
    score: key of SCORES or LOG_P, of which every pair has samples.

  Returns:
    (mean before, mean change, interval or None: a single user).
  """
  sizes = [len(before.user) for before, _ in pairs]
  names, owner = np.unique(
    # Over all pairs: a user who is in several comes as often in each of them.
    np.concatenate([before.user for before, _ in pairs]),
    return_inverse=True,
  )
  owners = np.split(owner, np.cumsum(sizes)[:-1])

  def means(times: np.ndarray) -> np.ndarray:
    """Before and after, float64[2], with each user counting so many times."""
    return np.mean(
      [
        [one.value(score, times[owner]) for one in pair]
        for pair, owner in zip(pairs, owners, strict=True)
      ],
      axis=0,
    )

  before, after = means(np.ones(len(names)))
  if len(names) < 2:
    return float(before), float(after - before), None
  rng, changes = np.random.default_rng(seed), []
  while len(changes) < draws:
    times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
    if all(
      times[owner][one.counted(score)].any()
      for (one, _), owner in zip(pairs, owners, strict=True)
    ):  # No pair stays empty: the mean of nothing is no number.
      changes.append(np.diff(means(times))[0])
  change = float(after - before)
  return float(before), change, _interval(change, np.array(changes))


def outcome(run: run_files.RunFiles) -> Outcome | None:
  """What the verdict needs; None where no stage predicted anything."""
  if not run.predicting or not len(run.predicting[-1].right):
    return None
  *others, final = run.predicting
  last = arm(run, final, _predicted(run, final))
  known = {'all': np.ones_like(run.anchor), 'tail': ~run.anchor, 'anchor': run.anchor}
  samples = {group: int(members[last.true].sum()) for group, members in known.items()}
  scores = [name for name, (group, _) in SCORES.items() if samples[group]]
  values = {name: last.value(name) for name in scores}
  users = len(np.unique(last.user))
  draws = {name: last.draws(name) for name in scores} if users > 1 else {}
  change = functools.partial(_change, last, draws)
  contrasts = {
    _called(stage): [
      change(name, stage.name, arm(run, final, _predicted(run, stage)))
      for name in scores
    ]
    for stage in others
    if _same_samples(stage, final)
  }
  contrasts |= _baseline_contrast(run, final, scores, change)
  return Outcome(
    final=_called(final),
    scores={
      name: (value, _interval(value, draws.get(name))) for name, value in values.items()
    },
    samples=samples,
    users=users,
    contrasts=contrasts,
  )


def _baseline_contrast(
  run: run_files.RunFiles,
  final: run_files.Stage,
  scores: list[str],
  change: Callable[[str, str, Arm], Change],
) -> dict[str, list[Change]]:
  """{heading: changes} against the best baseline of each score, or {}."""
  best = {name: run.best_baseline(*SCORES[name]) for name in scores}
  # Their choices are counted again, for which history and seed are needed.
  if not run.baselines or 'data' not in final.config:
    return {}
  names = {name for _, name in best.values()}
  first = lambda scores: label_tree.best(scores, 1)[:, 0]
  arms = {name: arm(run, final, first(counted(run, final, name))) for name in names}
  called = 'the best count baseline'
  called += f' ({names.pop()})' if len(names) == 1 else ' of each score'
  return {
    called: [change(score, name, arms[name]) for score, (_, name) in best.items()]
  }


def counted(run: run_files.RunFiles, stage: run_files.Stage, name: str) -> np.ndarray:
  """A baseline's scores for the samples of a stage: float32[n, Y]."""
  return run.baseline_counts.scores(name, stage.column('sample'))


def _change(
  last: Arm, draws: dict[str, np.ndarray], score: str, name: str, other: Arm
) -> Change:
  before, after = other.value(score), last.value(score)
  interval = None
  if score in draws:
    # Draw by draw: both were redrawn with the same users, see the module.
    interval = _interval(after - before, draws[score] - other.draws(score))
  return Change(score, name, before, after, interval)


def arm(run: run_files.RunFiles, stage: run_files.Stage, predicted: np.ndarray) -> Arm:
  """First choices int64[n] for the samples of a stage."""
  return Arm(
    run.encode(stage.column('behavior')), predicted, stage.column('user'), run.anchor
  )


def _predicted(run: run_files.RunFiles, stage: run_files.Stage) -> np.ndarray:
  return run.encode(stage.column('predicted'))


def _same_samples(stage: run_files.Stage, other: run_files.Stage) -> bool:
  return np.array_equal(stage.column('sample'), other.column('sample'))


def _called(stage: run_files.Stage) -> str:
  return {'untuned': 'the untuned model', 'one stage': 'one-stage tuning'}.get(
    stage.name, stage.name
  )


def _interval(value: float, draws: np.ndarray | None) -> tuple[float, float] | None:
  if draws is None:
    return None
  # Moved to average to the value: redrawn users lack rare behaviors, see the
  # module. Its width is kept.
  low, high = value + np.quantile(draws - draws.mean(), [0.025, 0.975])
  return float(low), float(high)
