"""Shards of a log -> one event table, the same however many they were.

What takes all users is decided here: the numbers of users, places and
behaviors, which groups of users are tested on, which behaviors are anchors.
The events pass by twice, to be counted and to be written, in blocks of whole
users and in their order, so every file is read and written from its beginning
to its end. What is kept in memory grows with users, places and names, not with
events.
"""

import collections
import csv
import dataclasses
import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from absl import logging

from behaviorlm_jax.data.log import columns, shards, sources, splits, times
from behaviorlm_jax.data.log.splits import SPLITS
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import files

_BLOCK = 1 << 20  # events at a time, or those of one user who has more
# What the fingerprint consists of; `first` follows from `user`.
_HASHED = ('user', 'time', 'behavior', 'place', 'split')
_TABLES = ('users', 'places', 'names')


@dataclasses.dataclass
class _Shard:
  """A shard and, of each of its names, the number in the whole log."""

  folder: Path
  begins: np.ndarray  # int64 [users + 1], first event of each user
  columns: dict[str, np.ndarray]  # of shards.COLUMNS
  users: np.ndarray  # int32, ascending
  places: np.ndarray  # int32, and -1 at the end: no place
  names: np.ndarray  # int32
  ends: tuple[float, float]  # of splits.cuts
  splits: np.ndarray | None = None  # int8 [users], where groups are split

  def split(self, rows: slice) -> np.ndarray:
    """int8: splits of the events of a slice."""
    user = self.columns['user'][rows]
    if self.splits is not None:
      return self.splits[user]
    begin = self.begins[user]
    nth = np.arange(rows.start, rows.stop) - begin + 1
    return splits.by_time(nth, self.begins[user + 1] - begin, self.ends)


def join(
  log: sources.Log,
  folders: Sequence[Path],
  folder: Path,
  seed: int,
  origin: dict | None = None,
) -> dict:
  """Makes `folder` of the shards `folders` of a log; returns its summary.

  `origin` is written beside the events as config.json.
  """
  facts = [json.loads((one / 'shard.json').read_text('utf-8')) for one in folders]
  _check_rows(facts, folders, log)
  lost = _lost(facts)
  # Of all shards together: each has looked at its own malformed rows alone.
  shards.check_rejected(log, lost, next(_rejected(folders), None))
  with shards.new_folder(folder) as (half, con):
    parts = _open(con, folders, splits.cuts(log.settings.split))
    if facts[0]['grouped']:
      _split_groups(parts, seed)
    names = con.sql('SELECT name FROM names ORDER BY id').fetchall()
    counts = sum(_count(part, len(names)) for part in parts)
    behaviors, order = splits.group_behaviors(
      [name for (name,) in names], counts, log.settings.anchor_share
    )
    _check_training(behaviors, lost, log)
    for part in parts:  # From the order of code points to that of the list.
      part.names = order[part.names]
    for table in ('users', 'places'):
      columns.write_names(con, half, table)
    listed = [dataclasses.asdict(item) for item in behaviors]
    files.write_json(half / 'behaviors.json', listed)
    digests, span = _write_events(parts, half)
    _write_rejected(folders, half / 'rejected.csv', log)
    summary = lost | _summary(sum(len(part.users) for part in parts), counts, behaviors)
    summary |= _time_summary(facts, span, log)
    summary['warnings'] = _warnings(summary) + _case_warnings(behaviors)
    summary['warnings'] += _time_warnings(facts, log)
    # Of what was written, not of how: one process or many shards make the same.
    summary['fingerprint'] = _fingerprint(digests, half, behaviors)
    files.write_json(half / 'summary.json', summary)
    if origin is not None:
      files.write_json(half / 'config.json', origin)
  logging.info('%s: times: %s.', log.name, summary['times'])
  for warning in summary['warnings']:
    logging.warning('%s', warning)
  return summary


def _check_rows(facts: list[dict], folders: Sequence[Path], log: sources.Log) -> None:
  """Refuses shards that are not those of one log, each once."""
  # Each row is in one shard, and every shard has counted the rows of all.
  found = sum(fact['sound'] + fact['rejected'] for fact in facts)
  rows = facts[0]['rows']
  if found != rows or any(fact['form'] != facts[0]['form'] for fact in facts):
    raise InputError(
      f'the {len(folders)} shards in {folders[0].parent} hold {found} of the '
      f'{rows} rows of {log.name}: they do not belong together; delete them '
      'and prepare all of them again'
    )


def _lost(facts: list[dict]) -> dict:
  """How many rows there were, and how many of them are no events."""
  reasons = collections.Counter()
  for fact in facts:
    reasons.update(fact['reasons'])
  return {
    'rows': facts[0]['rows'],
    'rejected': reasons.total(),
    'reasons': dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
  } | {name: sum(fact[name] for fact in facts) for name in ('duplicates', 'repeats')}


def _rejected(folders: Sequence[Path]) -> Iterator[tuple[int, str, str]]:
  """Yields the malformed rows (line, reason, text) of all shards, by line."""

  def rows(source: Path) -> Iterator[tuple[int, str, str]]:
    for batch in columns.read_table(source / 'rejected.arrow').to_batches():
      yield from zip(*(c.to_pylist() for c in batch.columns), strict=True)

  # Each shard's are by line already, so nothing has to be held and sorted.
  return heapq.merge(*map(rows, folders))


def _write_rejected(folders: Sequence[Path], path: Path, log: sources.Log) -> None:
  """Writes the malformed rows; of several files, each with its name."""
  one = len(log.files) == 1
  with open(path, 'w', encoding='utf-8', newline='') as file:
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow([*([] if one else ['file']), 'line', 'reason', 'text'])
    for line, reason, text in _rejected(folders):
      where = [line] if one else log.place(line)
      writer.writerow([*where, reason, text])


def _open(
  con: duckdb.DuckDBPyConnection, folders: Sequence[Path], ends: tuple[float, float]
) -> list[_Shard]:
  """Opens the shards; leaves the tables users, places and names (id, name)."""
  users, places, names = (_number(con, table, folders) for table in _TABLES)
  parts = []
  for i, source in enumerate(folders):
    events = columns.read_table(source / 'users.arrow')['events'].to_numpy()
    begins = np.concatenate([[0], np.cumsum(events, dtype=np.int64)])
    mapped = {name: columns.read_column(source, name) for name in shards.COLUMNS}
    spots = np.append(places[i], np.int32(-1))  # So index -1 stays -1.
    parts.append(_Shard(source, begins, mapped, users[i], spots, names[i], ends))
  return parts


def _number(
  con: duckdb.DuckDBPyConnection, table: str, folders: Sequence[Path]
) -> list[np.ndarray]:
  """Numbers in the whole log, int32, of the names of each shard."""
  views = [f'{table}_{i}' for i in range(len(folders))]
  for view, source in zip(views, folders, strict=True):
    names = columns.read_table(source / f'{table}.arrow').select(['name'])
    # DuckDB keeps no order through a join: `place` brings it back.
    con.register(view, names.append_column('place', pa.array(np.arange(len(names)))))
  columns.number_names(
    con, table, ' UNION ALL '.join(f'SELECT name FROM {view}' for view in views)
  )
  return [
    con.sql(f'SELECT id FROM {view} JOIN {table} USING (name) ORDER BY place')
    .to_arrow_table()['id']
    .to_numpy()
    for view in views
  ]


def _split_groups(parts: list[_Shard], seed: int) -> None:
  """Whole groups of users to splits."""
  teams = [columns.read_table(part.folder / 'users.arrow')['group'] for part in parts]
  every = set().union(*(team.unique().to_pylist() for team in teams))
  chosen = splits.split_groups(every, seed, parts[0].ends)
  for part, team in zip(parts, teams, strict=True):
    coded = team.combine_chunks().dictionary_encode()
    split = np.array([chosen[name] for name in coded.dictionary.to_pylist()], np.int8)
    part.splits = split[coded.indices.to_numpy()]


def _count(part: _Shard, names: int) -> np.ndarray:
  """int64 [names, splits]: events of a shard."""
  counts = np.zeros((names, len(SPLITS)), np.int64)
  size = int(part.begins[-1])
  for start in range(0, size, _BLOCK):
    rows = slice(start, min(start + _BLOCK, size))
    code = part.names[part.columns['behavior'][rows]].astype(np.int64)
    code = code * len(SPLITS) + part.split(rows)
    counts += np.bincount(code, minlength=counts.size).reshape(counts.shape)
  return counts


def _check_training(
  behaviors: list[splits.Behavior], lost: dict, log: sources.Log
) -> None:
  """Refuses a log of which nothing can be learned."""
  said = (
    f' (of {lost["rows"]} rows {lost["rejected"]} were malformed, '
    f'{lost["duplicates"]} duplicates and {lost["repeats"]} immediate '
    'repeats, see data.collapse_repeats)'
  )
  taught = [item.name for item in behaviors if item.train_count]
  if len(behaviors) == 1:
    raise InputError(
      f'{log.name} holds one behavior alone, {behaviors[0].name!r}, and at '
      f'least 2 are needed{said}: check data.columns.behavior'
    )
  if not taught:
    raise InputError(
      f'{log.name}: none of its {sum(item.count for item in behaviors)} events falls '
      f'into the training split{said}: give longer histories (or more groups) or a '
      'larger first fraction of data.split'
    )
  if len(taught) == 1:
    raise InputError(
      f'{log.name}: the training split holds 1 behavior, {taught[0]!r}, and at least '
      f'2 are needed{said}: check data.columns.behavior and data.split'
    )


# Writing.


def _write_events(
  parts: list[_Shard], folder: Path
) -> tuple[dict[str, str], tuple[int, int]]:
  """Writes the columns; returns {name: SHA-256} and the span of times."""
  sizes = np.zeros(sum(len(part.users) for part in parts), np.int64)
  for part in parts:
    sizes[part.users] = np.diff(part.begins)
  begins = np.concatenate([[0], np.cumsum(sizes)])
  hashes = {name: hashlib.sha256() for name in _HASHED}
  low, span = 0, []
  with columns.Writer(folder, columns.DTYPES) as writer:
    while low < len(sizes):
      # The last user whose events still end inside, or one who alone has more.
      full = np.searchsorted(begins, begins[low] + _BLOCK, 'right') - 1
      high = max(low + 1, int(full))
      written = writer.add(**_block(parts, begins, low, high))
      for name, digest in hashes.items():
        digest.update(written[name])  # As written: DTYPES are little-endian.
      span += [written['time'].min(), written['time'].max()]
      low = high
  digests = {name: digest.hexdigest() for name, digest in hashes.items()}
  return digests, (min(span), max(span))


def _block(
  parts: list[_Shard], begins: np.ndarray, low: int, high: int
) -> dict[str, np.ndarray]:
  """Columns of the events of users [low, high), each from its shard."""
  size = begins[high] - begins[low]
  block = {name: np.empty(size, dtype) for name, dtype in columns.DTYPES.items()}
  for part in parts:
    # Of the dtype of users, of which numpy else makes a copy for every block.
    bounds = np.array([low, high], part.users.dtype)
    rows = slice(*part.begins[np.searchsorted(part.users, bounds)].tolist())
    mapped = {name: column[rows] for name, column in part.columns.items()}
    user = part.users[mapped['user']]
    first = begins[user]
    # Its user's first place, and how many events of that user come before it.
    nth = np.arange(rows.start, rows.stop) - part.begins[mapped['user']]
    at = first - begins[low] + nth
    block['user'][at] = user
    block['time'][at] = mapped['time']
    block['behavior'][at] = part.names[mapped['behavior']]
    block['place'][at] = part.places[mapped['place']]
    block['split'][at] = part.split(rows)
    block['first'][at] = first
  return block


def _fingerprint(
  digests: dict[str, str], folder: Path, behaviors: list[splits.Behavior]
) -> str:
  """SHA-256 of the columns, names and groups, as one JSON text."""
  digest = hashlib.sha256(f'[{json.dumps(digests)}, '.encode())
  for table in ('users', 'places'):
    # As one list would be written, but batch by batch: there may be millions.
    batches = columns.read_table(folder / f'{table}.arrow').to_batches()
    separator = '['
    for names in filter(None, (batch['name'].to_pylist() for batch in batches)):
      digest.update(f'{separator}{json.dumps(names)[1:-1]}'.encode())
      separator = ', '
    digest.update(b'], ' if separator == ', ' else b'[], ')
  listed = [[item.name, item.group] for item in behaviors]
  digest.update(f'{json.dumps(listed)}]'.encode())
  return digest.hexdigest()


# What is said of the log.


def _summary(users: int, counts: np.ndarray, behaviors: list[splits.Behavior]) -> dict:
  groups = collections.Counter(item.group for item in behaviors)
  unseen = [item.count for item in behaviors if item.group == 'unseen']
  return {
    'events': int(counts.sum()),
    'users': users,
    'behaviors': len(behaviors),
    'anchors': groups['anchor'],
    'tails': groups['tail'],
    'unseen': groups['unseen'],
    'unseen_test_events': sum(unseen),
    'splits': dict(zip(SPLITS, counts.sum(0).tolist(), strict=True)),
  }


def _time_summary(facts: list[dict], span: tuple[int, int], log: sources.Log) -> dict:
  """'ISO 8601, 2024-01-01 to 2024-03-09'; refuses a log of other years."""
  form = times.Form(**facts[0]['form'])
  first, last = (str(np.datetime64(int(t), 's'))[:10] for t in span)
  if not log.settings.time_format and (span[1] < times.FIRST or span[0] >= times.LAST):
    raise InputError(
      f'{log.name}: its times, read as {form.text}, lie from {first} to '
      f'{last}, outside of {times.YEARS}; set data.time_format to what they '
      f'are (one of {", ".join(times.WORDS)}, or a strptime pattern) or '
      'check data.columns.time'
    )
  said = f'{form.text}, {first} to {last}'
  return {'layout': facts[0]['layout'], 'clock': form.clock, 'times': said}


def _warnings(summary: dict) -> list[str]:
  warnings = []
  if not summary['tails']:
    warnings.append(
      f'no tail behavior: all {summary["anchors"]} behaviors are anchors; '
      'stage 2 has nothing rare to learn (data.anchor_share)'
    )
  if summary['unseen']:
    warnings.append(
      f'behaviors seen only in the test split: {summary["unseen"]}, with '
      f'{summary["unseen_test_events"]} events in all; they may stand in '
      'contexts and are never candidates'
    )
  return warnings


def _case_warnings(behaviors: list[splits.Behavior]) -> list[str]:
  spellings = collections.defaultdict(list)
  for item in behaviors:
    spellings[item.name.casefold()].append(item.name)
  alike = [sorted(names) for names in spellings.values() if len(names) > 1]
  if not alike:
    return []
  shown = '; '.join(' and '.join(map(repr, names)) for names in alike[:5])
  return [
    f'{len(alike)} names are written in several cases and stay apart: '
    f'{shown}{"; ..." * (len(alike) > 5)}'
  ]


def _time_warnings(facts: list[dict], log: sources.Log) -> list[str]:
  form, warnings = times.Form(**facts[0]['form']), []
  if not form.clock:
    warnings.append(
      'times are dates alone: lines of prompts show no clock, '
      'events of one day keep the order of the file, and one behavior twice on a '
      'day counts once'
    )
  # Whether the clock was chosen, or is another than UTC's anywhere.
  shifted = log.settings.time_zone or any(fact['shifted'] for fact in facts)
  if form.instants and not shifted:
    warnings.append(
      'all times are shown by the clock of UTC; if the users '
      'live by another one, set data.time_zone'
    )
  return warnings
