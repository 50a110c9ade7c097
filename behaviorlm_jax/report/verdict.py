"""The verdict: what a run came to, in a few plain sentences.

A pure function from numbers to text. A change counts as better or worse only
where its 95 % interval leaves zero out; every other change is said to lie
within its uncertainty, whatever its size.
"""

import dataclasses
from collections.abc import Sequence

Interval = tuple[float, float]  # (low, high)
FEW = 50  # test samples below which a group's scores are a hint only
FEW_USERS = 10  # below which redrawing users says little


@dataclasses.dataclass(frozen=True)
class Change:
  """What the final stage changed in one score, against one other predictor."""

  score: str
  other: str  # the other predictor
  before: float  # score of the other
  after: float  # score of the final stage
  interval: Interval | None  # of after - before; None: unknown

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
  scores: dict[str, tuple[float, Interval | None]]  # name: value, interval
  samples: dict[str, int]  # group: test samples, for 'all', 'anchor', 'tail'
  users: int
  contrasts: dict[str, list[Change]]  # what it is compared with: not empty


def verdict(outcome: Outcome) -> str:
  """Three to six sentences."""
  scores = [
    f'{name} {value:.3f}{_brackets(interval)}'
    for name, (value, interval) in outcome.scores.items()
  ]
  sentences = [
    f'On {_count(outcome.samples["all"], "test event")} of '
    f'{_count(outcome.users, "user")}, {outcome.final} reaches {_join(scores)}.',
    *(_contrast(against, changes) for against, changes in outcome.contrasts.items()),
  ]
  if outcome.users > 1:
    sentences.append('Brackets hold 95 % intervals from redrawn users.')
  warnings = _warnings(outcome)
  if warnings:
    sentences.append(f'Caution: {"; ".join(warnings)}.')
  return ' '.join(sentences)


def headline(best: str, right: Sequence[float], samples: int, change: Change) -> str:
  """One sentence: what the best predictor achieves, and whether it beats counting.

  Args:
    best: what it is, in words.
    right: accuracy of it and of counting, fractions.
    samples: test events.
    change: of mean log p, from counting (`change.other`) to it.
  """
  first, second = (f'{100 * share:.1f} %' for share in right)
  means = {'better': 'it beats counting', 'worse': 'it is worse than counting'}
  means = f'so {means.get(change.outcome, "it is not shown to beat counting")}'
  around = ', without an interval, for there is a single user'
  if change.interval:
    low, high = change.interval
    around = f' (95 % interval {low:+.3f} to {high:+.3f}, by users)'
  return (
    f'By log p on {_count(samples, "test event")} the best predictor that does more '
    f'than count is {best}: it names the next behavior in {first} of them, counting '
    f'({change.other}) in {second}, and its mean log p is {abs(change.size):.3f} nats '
    f'{"lower" if change.size < 0 else "higher"}{around}, {means}.'
  )


def _contrast(against: str, changes: Sequence[Change]) -> str:
  # Else each change names its own: every score has another best baseline.
  same = len({change.other for change in changes}) == 1
  told = {
    outcome: _join([_change(c, same) for c in changes if c.outcome == outcome])
    for outcome in ('better', 'worse', 'within', 'unknown')
  }
  if told['unknown']:
    # A single user: no intervals, so nothing can be called better.
    return f'Against {against} it differs by {told["unknown"]}.'
  if all(c.size == 0 and c.interval == (0, 0) for c in changes):
    names = _join([change.score for change in changes])
    return f'Against {against}, nothing changed in {names}.'
  clear = [f'{word} in {told[word]}' for word in ('better', 'worse') if told[word]]
  if not clear:
    return (
      f'Against {against}, no change is larger than its uncertainty: {told["within"]}.'
    )
  rest = f'; within it: {told["within"]}' if told['within'] else ''
  return (
    f'Against {against} it is {" and ".join(clear)}, larger than the uncertainty{rest}.'
  )


def _change(change: Change, same: bool) -> str:
  other = '' if same else f' against {change.other}'
  return f'{change.score} {change.size:+.3f}{other}{_brackets(change.interval)}'


def _warnings(outcome: Outcome) -> list[str]:
  """What weakens the numbers."""
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
  return text


def _join(parts: list[str]) -> str:
  """'a', 'a and b', 'a, b and c'."""
  return ' and '.join(filter(None, [', '.join(parts[:-1]), *parts[-1:]]))


def _count(number: int, what: str) -> str:
  return f'{number:,} {what}' + ('' if number == 1 else 's')


def _brackets(interval: Interval | None) -> str:
  return f' ({interval[0]:.3f} to {interval[1]:.3f})' if interval else ''
