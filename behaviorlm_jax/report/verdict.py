"""The verdict: what a run came to, in a few plain sentences.

A pure function from numbers to text. A change counts as better or worse only
where its 95 % interval leaves zero out; every other change is said to lie
within its uncertainty, whatever its size.
"""

import dataclasses
from collections.abc import Sequence

FEW = 50  # test samples below which a group's scores are a hint only
FEW_USERS = 10  # below which redrawing users says little


@dataclasses.dataclass(frozen=True)
class Change:
  """What the final stage changed in one score, against one other predictor."""

  score: str
  other: str  # the other predictor
  before: float  # score of the other
  after: float  # score of the final stage
  interval: tuple[float, float] | None  # (low, high) of after - before; None: unknown

  @property
  def size(self) -> float:
    return self.after - self.before

  @property
  def outcome(self) -> str:
    """'better', 'worse', 'within' its uncertainty, or 'unknown'."""
    if self.interval is None:
      return 'unknown'
    low, high = self.interval
    # Strictly: an interval that ends at 0 leaves it open.
    return 'better' if low > 0 else 'worse' if high < 0 else 'within'


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The final stage's scores and what they mean beside others."""

  final: str
  scores: dict[str, tuple[float, tuple[float, float] | None]]  # name: value, interval
  samples: dict[str, int]  # group: test samples, for 'all', 'anchor', 'tail'
  users: int
  contrasts: dict[str, list[Change]]  # what it is compared with: not empty


def verdict(outcome: Outcome) -> str:
  """Three to six sentences; empty where nothing was scored."""
  if not outcome.samples['all']:
    return ''
  sentences = [_level(outcome)]
  sentences += [
    _contrast(against, changes) for against, changes in outcome.contrasts.items()
  ]
  if outcome.users > 1:
    sentences.append('Brackets hold 95 % intervals from redrawn users.')
  return ' '.join(sentences + _warnings(outcome))


def _level(outcome: Outcome) -> str:
  scores = _join(
    [
      f'{name} {value:.3f}' + (f' ({_range(interval)})' if interval else '')
      for name, (value, interval) in outcome.scores.items()
    ]
  )
  return (
    f'On {_count(outcome.samples["all"], "test event")} of '
    f'{_count(outcome.users, "user")}, {outcome.final} reaches {scores}.'
  )


def _contrast(against: str, changes: Sequence[Change]) -> str:
  # Else each change names its own: every score has another best baseline.
  same = len({change.other for change in changes}) == 1
  told = {
    outcome: [_change(c, same) for c in changes if c.outcome == outcome]
    for outcome in ('better', 'worse', 'within', 'unknown')
  }
  clear = [
    f'{outcome} in {_join(told[outcome])}'
    for outcome in ('better', 'worse')
    if told[outcome]
  ]
  if told['unknown']:
    # A single user: no intervals, so nothing can be called better.
    return f'Against {against} it differs by {_join(told["unknown"])}.'
  if all(c.size == 0 and c.interval == (0, 0) for c in changes):
    names = _join([change.score for change in changes])
    return f'Against {against}, nothing changed in {names}.'
  if not clear:
    return (
      f'Against {against}, no change is larger than its uncertainty: '
      f'{_join(told["within"])}.'
    )
  text = f'Against {against} it is {" and ".join(clear)}, larger than the uncertainty'
  if told['within']:
    text += f'; within it: {_join(told["within"])}'
  return text + '.'


def _change(change: Change, same: bool) -> str:
  text = f'{change.score} {change.size:+.3f}'
  if not same:
    text += f' against {change.other}'
  return text + (f' ({_range(change.interval)})' if change.interval else '')


def _warnings(outcome: Outcome) -> list[str]:
  """One sentence on what weakens the numbers, or none."""
  samples, text = outcome.samples, []
  few = [
    f'{samples[group]} {group}'
    for group in ('anchor', 'tail')
    if 0 < samples[group] < FEW
  ]
  if few:
    text.append(
      f'few test events ({", ".join(few)}; below {FEW}) make these '
      'scores a hint, not a result'
    )
  if not samples['tail']:
    text.append('no test event has a tail behavior, so nothing is known of the tail')
  if outcome.users == 1:
    text.append('all events are of one user, so no uncertainty can be given')
  elif outcome.users < FEW_USERS:
    text.append(f'with {outcome.users} users the intervals are rough')
  return ['Caution: ' + '; '.join(text) + '.'] if text else []


def _join(parts: list[str]) -> str:
  """'a', 'a and b', 'a, b and c'."""
  return ' and '.join(filter(None, [', '.join(parts[:-1]), parts[-1]]))


def _count(number: int, what: str) -> str:
  return f'{number:,} {what}' + ('' if number == 1 else 's')


def _range(interval: tuple[float, float]) -> str:
  low, high = interval
  return f'{low:.3f} to {high:.3f}'
