"""Raw behavior logs in, sorted memory-mapped event columns out.

`shards` does the heavy part, for an n-th of the users or all of them, and
`join` what takes all users.

Invariants of the folder that `prepare` leaves: events are sorted by user, then
instant (local clock, where the log tells no instants), then line of the file;
`user` counts 0, 1, ... without gaps; a column is one file; the folder exists
only when it is complete; the same log and config give the same fingerprint on
every machine, in any number of shards. Times are shown by the user's own clock,
which goes back by an hour once a year where events are ordered by instant.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from behaviorlm_jax.data.log import columns, join, shards, sources, splits
from behaviorlm_jax.data.log.splits import Behavior
from behaviorlm_jax.data.log.splits import SPLITS as SPLITS


@dataclasses.dataclass(frozen=True, eq=False)
class Events:
  """Sorted event columns of one length n, and the names they index."""

  user: np.ndarray  # int32[n], index into users
  time: np.ndarray  # int64[n], seconds since 1970-01-01 on the user's own clock
  behavior: np.ndarray  # int32[n], index into behaviors
  place: np.ndarray  # int32[n], index into places, -1 if none
  split: np.ndarray  # int8[n], index into SPLITS
  first: np.ndarray  # int64[n], position of the first event of the same user
  users: columns.MappedNames  # or any sequence of str
  places: columns.MappedNames
  behaviors: list[Behavior]
  fingerprint: str
  known: int  # how many behaviors are candidates: all before the unseen
  clock: bool = True  # whether times have a time of day, else dates alone

  @functools.cached_property
  def anchors(self) -> np.ndarray:
    """bool [known]: which candidate behaviors are anchors."""
    return np.array([b.group == 'anchor' for b in self.behaviors[: self.known]], bool)

  @functools.cached_property
  def train_counts(self) -> np.ndarray:
    """int64 [known]: training events of each behavior."""
    return np.array([b.train_count for b in self.behaviors[: self.known]])


def prepare(
  data: Mapping[str, Any],
  place: str | Path | sources.Log,
  folder: Path,
  seed: int,
  origin: dict | None = None,
) -> dict:
  """Reads the log at `place` into the new `folder`; returns its summary.

  `origin` is written beside the events as config.json.
  """
  folder = Path(folder)
  splits.cuts(data['split'])  # Refused now, not after the log is read.
  whole = folder.with_name(folder.name + '.whole')
  clean(folder)
  try:
    log = place if isinstance(place, sources.Log) else sources.open_log(place, data)
    shards.write_shard(log, whole)
    # A log prepared at once is one shard, joined: there is no second way.
    return join.join(log, [whole], folder, seed, origin)
  finally:
    clean(folder)


def clean(folder: Path) -> None:
  """Deletes what a run that was killed left beside `folder`."""
  for ending in ('.whole', '.whole.tmp'):
    shutil.rmtree(folder.with_name(folder.name + ending), ignore_errors=True)


def open_events(folder: str | Path) -> Events:
  """Memory-maps a prepared folder, without a copy."""
  folder = Path(folder)
  read = lambda name: json.loads((folder / name).read_text('utf-8'))
  behaviors = [Behavior(**item) for item in read('behaviors.json')]
  summary = read('summary.json')
  return Events(
    **{name: columns.read_column(folder, name) for name in columns.DTYPES},
    users=columns.MappedNames(folder / 'users.arrow'),
    places=columns.MappedNames(folder / 'places.arrow'),
    behaviors=behaviors,
    fingerprint=summary['fingerprint'],
    known=sum(item.group != 'unseen' for item in behaviors),
    clock=summary['clock'],
  )
