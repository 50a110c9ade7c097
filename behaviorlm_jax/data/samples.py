"""Samples: positions in the event table that may be asked for, or learned.

A sample is an event with enough past of the same user and a behavior that the
training split knows. Nothing is copied; everything later holds positions.

A log may have more samples than fit in memory. So it is passed over in blocks,
and what is drawn is ranks (numbers from 0, among all samples or among those of
a behavior), which another pass turns into positions.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sized

import numpy as np

from behaviorlm_jax.data.events import Events, SPLITS
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


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
  """The samples of a split, found anew in every pass over the events."""

  events: Events
  split: str
  min_context: int  # Events of the user before a sample, of any split.
  anchors_only: bool = False

  def among(self, where: slice | np.ndarray) -> np.ndarray:
    """Positions int64 of the samples among `where`, a slice or positions."""
    events, positions = self.events, where
    if isinstance(where, slice):
      positions = np.arange(where.start, where.stop)
    behavior = events.behavior[where]
    kept = events.split[where] == SPLITS.index(self.split)
    kept &= behavior < events.known
    kept &= positions - events.first[where] >= self.min_context
    positions, behavior = positions[kept], behavior[kept]
    return positions[events.anchors[behavior]] if self.anchors_only else positions

  def __iter__(self) -> Iterator[np.ndarray]:
    """Yields positions int64, sorted, those of a user together."""
    for span in spans(self.events):
      positions = self.among(span)
      if len(positions):
        yield positions

  def all(self) -> np.ndarray:
    """Positions int64, sorted: all in memory."""
    return np.concatenate([np.zeros(0, np.int64), *self])

  @functools.cached_property
  def counts(self) -> np.ndarray:
    """int64 [known], samples of each behavior."""
    total = np.zeros(self.events.known, np.int64)
    for positions in self:
      total += np.bincount(self.events.behavior[positions], minlength=len(total))
    total.flags.writeable = False  # Kept, and the same array for all who ask.
    return total

  def run(self, first: int, count: int, reach: int) -> np.ndarray:
    """The `count` samples from position `first` on, within `reach` events."""
    stop = min(first + reach, len(self.events.user))
    return self.among(slice(first, stop))[:count]

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
    begun = np.zeros(self.events.known, np.int64)  # Of each, in earlier blocks.
    for positions in self:
      behavior = self.events.behavior[positions]
      positions = positions[_grouping(behavior)]
      sizes = np.bincount(behavior, minlength=len(begun))
      first = np.cumsum(sizes) - sizes  # Where each behavior's run begins.
      for b in ranks.keys() & set(np.flatnonzero(sizes).tolist()):
        inside = _within(ranks[b], begun[b], sizes[b])
        found[b].append(positions[first[b] + inside])
      begun += sizes
    return {b: np.concatenate(parts) for b, parts in found.items()}

  def by_behavior(self) -> dict[int, np.ndarray]:
    """{behavior: its positions}, of those that have any: all in memory."""
    return self.at_of_behaviors(
      {b: np.arange(size) for b, size in enumerate(self.counts) if size}
    )


@functools.lru_cache(maxsize=8)
def of_split(
  events: Events, split: str, min_context: int, anchors_only: bool = False
) -> Samples:
  """Samples of a split, one object for all who ask: they are counted once."""
  return Samples(events, split, min_context, anchors_only)


def draw_ranks(rng: np.random.Generator, size: int, most: int) -> np.ndarray:
  """At most `most` of the ranks below `size`, drawn and sorted."""
  # Those of rng.permutation(positions)[:most], in half the memory.
  ranks = np.arange(size, dtype=np.uint32 if size < 1 << 32 else np.int64)
  rng.shuffle(ranks)
  return np.sort(ranks[:most])


def spans(events: Events) -> Iterator[slice]:
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
