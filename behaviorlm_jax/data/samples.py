"""Samples: positions in the event table that may be asked for, or learned.

A sample is an event with enough past of the same user and a behavior that the
training split knows. Nothing is copied; everything later holds positions. A log
is passed over in blocks, so memory does not grow with it (but for `eligible`).
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sized

import numpy as np
from ml_collections import ConfigDict

from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.errors import InputError

_BLOCK = 1 << 20  # Events at a time.


class NoSamples(InputError):
  """A split has nothing that a stage could learn from."""


def require(samples: Sized, stage: str) -> None:
  """Refuses to go on without samples."""
  if not len(samples):
    raise NoSamples(
      f'data.events: no sample is left for {stage}; '
      'give users more events or lower plan.min_context.'
    )


@dataclasses.dataclass(frozen=True)
class Rule:
  """What makes an event a sample, of one split."""

  split: str
  min_context: int
  anchors_only: bool = False

  def among(self, events: events_lib.Events, where: slice | np.ndarray) -> np.ndarray:
    """Positions int64 of the samples among `where`, a slice or positions."""
    positions = where
    if isinstance(where, slice):
      positions = np.arange(where.start, where.stop)
    behavior = events.behavior[where]
    kept = events.split[where] == events_lib.SPLITS.index(self.split)
    kept &= behavior < events.known
    kept &= positions - events.first[where] >= self.min_context  # Of any split.
    positions, behavior = positions[kept], behavior[kept]
    if self.anchors_only:
      return positions[anchor_mask(events)[behavior]]
    return positions


def rule(split: str, config: ConfigDict, anchors_only: bool = False) -> Rule:
  return Rule(split, config.plan.min_context, anchors_only)


class Samples:
  """The samples of a split, found anew in every pass over the events.

  A log may have more of them than fit in memory. So what is drawn is ranks
  (numbers from 0, among all or those of a behavior), and a pass finds those.
  """

  def __init__(self, events: events_lib.Events, rule: Rule):
    self._events, self._rule = events, rule

  def __iter__(self) -> Iterator[np.ndarray]:
    """Yields positions int64, sorted, those of a user together."""
    for span in spans(self._events):
      positions = self._rule.among(self._events, span)
      if len(positions):
        yield positions

  def run(self, first: int, count: int, reach: int) -> np.ndarray:
    """The `count` samples from position `first` on, within `reach` events."""
    stop = min(first + reach, len(self._events.user))
    return self._rule.among(self._events, slice(first, stop))[:count]

  def at(self, ranks: np.ndarray) -> np.ndarray:
    """Positions int64 of the samples of these ranks, both sorted."""
    found, begun = [np.zeros(0, np.int64)], 0
    for positions in self:
      found.append(positions[_within(ranks, begun, len(positions))])
      begun += len(positions)
    return np.concatenate(found)

  def at_of_behaviors(self, ranks: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """{behavior: positions}, of {behavior: ranks among its samples}."""
    found = {b: [np.zeros(0, np.int64)] for b in ranks}
    begun = np.zeros(self._events.known, np.int64)  # Of each, in earlier blocks.
    for positions in self:
      behavior = self._events.behavior[positions]
      positions = positions[_grouping(behavior)]
      sizes = np.bincount(behavior, minlength=len(begun))
      first = np.cumsum(sizes) - sizes  # Where each behavior's run begins.
      for b in ranks.keys() & set(np.flatnonzero(sizes).tolist()):
        inside = _within(ranks[b], begun[b], sizes[b])
        found[b].append(positions[first[b] + inside])
      begun += sizes
    return {b: np.concatenate(parts) for b, parts in found.items()}


def of_split(
  events: events_lib.Events, split: str, config: ConfigDict, anchors_only: bool = False
) -> Samples:
  """Samples of a split."""
  return Samples(events, rule(split, config, anchors_only))


def eligible(
  events: events_lib.Events, split: str, config: ConfigDict, anchors_only: bool = False
) -> np.ndarray:
  """Positions int64, sorted, of the samples of a split: all in memory."""
  found = list(of_split(events, split, config, anchors_only))
  return np.concatenate(found) if found else np.zeros(0, np.int64)


def behavior_counts(
  events: events_lib.Events, split: str, config: ConfigDict
) -> np.ndarray:
  """int64 [known], samples of each behavior of a split."""
  return _counts(events, rule(split, config))


@functools.lru_cache(maxsize=8)
def _counts(events: events_lib.Events, rule: Rule) -> np.ndarray:
  total = np.zeros(events.known, np.int64)
  for positions in Samples(events, rule):
    total += np.bincount(events.behavior[positions], minlength=len(total))
  total.flags.writeable = False  # Kept, and the same array for all who ask.
  return total


def draw_ranks(rng: np.random.Generator, size: int, most: int) -> np.ndarray:
  """At most `most` of the ranks below `size`, drawn and sorted."""
  # Those of rng.permutation(positions)[:most], in half the memory.
  ranks = np.arange(size, dtype=np.uint32 if size < 1 << 32 else np.int64)
  rng.shuffle(ranks)
  return np.sort(ranks[:most])


def spans(events: events_lib.Events) -> Iterator[slice]:
  """Yields slices of whole users, of about _BLOCK events or one user's."""
  start, end = 0, len(events.user)
  while start < end:
    stop = min(start + _BLOCK, end)
    if stop < end:
      stop = int(events.first[stop])  # Back to where the user in its middle begins.
      if stop <= start:  # The user is longer than a block.
        stop = int(np.searchsorted(events.user, events.user[start], 'right'))
    yield slice(start, stop)
    start = stop


def _within(ranks: np.ndarray, begun: int, size: int) -> np.ndarray:
  """Which of `size` samples from rank `begun` on have these ranks."""
  # Bounds of the ranks' own dtype, or numpy would copy all ranks to a wider one.
  low, high = np.searchsorted(ranks, np.array([begun, begun + size], ranks.dtype))
  return ranks[low:high].astype(np.int64) - begun


def _grouping(behavior: np.ndarray) -> np.ndarray:
  """The order that puts equal behaviors side by side, each in theirs."""
  if behavior.max(initial=0) < 1 << 16:
    behavior = behavior.astype(np.uint16)  # numpy's radix sort is for these.
  return np.argsort(behavior, kind='stable')


@functools.lru_cache(maxsize=8)  # Asked for with every window of a plan.
def anchor_mask(events: events_lib.Events) -> np.ndarray:
  """bool [known]: which candidate behaviors are anchors."""
  return np.array([b.group == 'anchor' for b in events.behaviors[: events.known]], bool)


def train_counts(events: events_lib.Events) -> np.ndarray:
  """int64 [known]: training events of each behavior."""
  return np.array([b.train_count for b in events.behaviors[: events.known]])


def by_behavior(
  events: events_lib.Events, positions: np.ndarray
) -> dict[int, np.ndarray]:
  """{behavior: its positions}, of those that have any."""
  behavior = events.behavior[positions]
  order, sizes = _grouping(behavior), np.bincount(behavior)
  parts = np.split(positions[order], np.cumsum(sizes)[:-1])
  return {b: part for b, part in enumerate(parts) if len(part)}
