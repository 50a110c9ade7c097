"""Which split an event belongs to, and which group a behavior.

Events are those that are left once duplicates are dropped and immediate repeats
collapsed, so that repeats cannot straddle a cut. The order and the groups of the
known behaviors come from the training and validation events alone: no event of the
test split can move an index or a group. What it can move is a cut: a last event that
repeats its predecessor is collapsed, and the user's history is one event shorter.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np

from behaviorlm_jax.errors import InputError

SPLITS = ('train', 'validation', 'test')
# 0.29 * 100 is 28.999999999999996: a cut must not lose an event to rounding.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Behavior:
  """A name of the behavior list; `share` is of the training events."""

  name: str
  count: int  # events of all splits
  train_count: int
  share: float
  group: str  # 'anchor', 'tail', or 'unseen': only in the test split


def cuts(split: Iterable[float]) -> tuple[float, float]:
  """Ends of train and validation, as fractions of a history or of groups."""
  parts = tuple(split)
  shares = all(0 <= part <= 1 for part in parts)
  if len(parts) != 3 or not shares or abs(sum(parts) - 1) > 1e-6:
    raise InputError(
      f'data.split is {parts}: give three fractions (train, validation, '
      'test) that sum to 1'
    )
  return parts[0], parts[0] + parts[1]


def split_groups(
  groups: Iterable[str], seed: int, ends: tuple[float, float]
) -> dict[str, int]:
  """Whole groups to splits: ranked by a seeded hash, then cut by rank."""
  # hashlib rather than `hash`, so the ranking is the same in every process; by rank
  # and not by the hash's value, so that few groups are cut at the right shares, too.
  ranked = sorted(
    groups,
    key=lambda group: (hashlib.sha256(f'{seed}:{group}'.encode()).digest(), group),
  )
  sizes = [math.floor(end * len(ranked) + _ROUNDING) for end in ends]
  # How many cuts lie before it: 0, 1 or 2, an index into SPLITS.
  return {
    group: sum(rank >= size for size in sizes) for rank, group in enumerate(ranked)
  }


def by_time(nth: np.ndarray, size: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
  """int8 [n]: split of the nth (from 1) of a user's `size` events.

  The first floor(end * size) are training events, and so on.
  """
  return sum(
    (nth > np.floor(end * size + _ROUNDING)).astype(np.int8) for end in map(float, ends)
  )


def group_behaviors(
  names: Sequence[str], counts: np.ndarray, anchor_share: float
) -> tuple[list[Behavior], np.ndarray]:
  """The behavior list and, for every name, its place there (int32 [names]).

  `counts`, int [names, splits], are events. Anchors have more than `anchor_share`
  of those for training.
  """
  total = counts[:, 0].sum()
  # Unseen last; among the known by training count. Test counts never enter.
  order = sorted(
    range(len(names)), key=lambda i: (not counts[i, :2].any(), -counts[i, 0], names[i])
  )
  behaviors, place = [], np.zeros(len(names), np.int32)
  place[order] = np.arange(len(names))
  for i in order:
    train, validation, test = counts[i].tolist()
    share = train / int(total) if total else 0.0  # `join` refuses a log without any.
    group = 'anchor' if share > anchor_share else 'tail'
    if not train + validation:
      group = 'unseen'
    behaviors.append(Behavior(names[i], train + validation + test, train, share, group))
  return behaviors, place
