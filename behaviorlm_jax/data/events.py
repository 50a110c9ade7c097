"""Raw behavior logs in, sorted memory-mapped event columns out.

Why DuckDB: sorting, dropping duplicates and numbering each user's events are
SQL with window functions, and its operators spill to disk, so a log larger than
memory goes the same way as a small one, without a server. `logs` fills its
table of rows, `splits` orders and splits them, this module checks and writes.

Invariants of the folder that `prepare` leaves: events are sorted by user, then
local time, then line of the file; `user` counts 0, 1, ... without gaps; the
folder exists only when it is complete; the same log and config give the same
fingerprint on every machine. Times are the user's own clock: an offset in the
log is dropped, not applied. Exact duplicates are rows equal in every *mapped*
column.
"""

import csv
import dataclasses
import hashlib
import json
import pathlib
import shutil

import duckdb
import numpy as np
import pyarrow as pa
from absl import logging

from behaviorlm_jax import files
from behaviorlm_jax.data import logs
from behaviorlm_jax.data import splits
from behaviorlm_jax.data.splits import Behavior
from behaviorlm_jax.data.splits import SPLITS
from behaviorlm_jax.errors import InputError

_LONGEST_NAME = 256  # characters
_FETCHED = 8192  # rejected rows at a time
_SHARD = 4_000_000  # events
_MEMORY = '4GB'  # leaves room on an 8 GB machine; beyond it DuckDB spills
_DTYPES = {'user': '<i4', 'time': '<i8', 'behavior': '<i4', 'place': '<i4',
           'split': '<i1'}


@dataclasses.dataclass(frozen=True, eq=False)
class Events:
  """Sorted event columns of one length n, and the names they index."""

  user: np.ndarray  # int32[n], index into users
  time: np.ndarray  # int64[n], seconds since 1970-01-01 on the user's own clock
  behavior: np.ndarray  # int32[n], index into behaviors
  place: np.ndarray  # int32[n], index into places, -1 if none
  split: np.ndarray  # int8[n], index into SPLITS
  first: np.ndarray  # int64[n], position of the first event of the same user
  users: list[str]
  places: list[str]
  behaviors: list[Behavior]
  fingerprint: str
  known: int  # how many behaviors are candidates: all before the unseen


def prepare(data, path, folder: pathlib.Path, seed: int,
            origin: dict | None = None) -> dict:
  """Reads the log at `path` into the new `folder`; returns its summary.

  `origin` is written beside the events as config.json.
  """
  path, folder = pathlib.Path(path), pathlib.Path(folder)
  ends = splits.cuts(data.split)
  if not path.is_file():
    raise InputError(f'{path} does not exist or is no file: set data.events')
  half = folder.with_name(folder.name + '.tmp')
  shutil.rmtree(half, ignore_errors=True)  # of a run that was killed
  spill = half / 'spill'
  spill.mkdir(parents=True)
  try:
    with duckdb.connect(spill / 'log.duckdb', config={
        'temp_directory': str(spill), 'memory_limit': _MEMORY}) as con:
      summary = _prepare(con, data, path, half, seed, ends)
    shutil.rmtree(spill)
    if origin is not None:
      files.write_json(half / 'config.json', origin)
    half.rename(folder)
  finally:
    shutil.rmtree(half, ignore_errors=True)
  return summary


def _prepare(con, data, path, folder, seed, ends) -> dict:
  grouped = logs.read(con, data, path)
  counts = _reject(con, data.max_rejected, path, folder)
  _check_names(con, path)
  counts |= splits.order_events(con, data.collapse_repeats)
  if grouped:
    splits.split_by_group(con, path, seed, ends)
  else:
    splits.split_by_time(con, ends)
  behaviors, position = splits.group_behaviors(con, data.anchor_share)
  _check_training(behaviors, path)
  digests = _write_events(con, folder, position)
  users, places = (
      _write_names(con, table, folder) for table in ('users', 'places'))
  files.write_json(folder / 'behaviors.json',
                   [dataclasses.asdict(item) for item in behaviors])
  summary = counts | _summary(con, users, behaviors)
  summary['warnings'] = _warnings(summary)
  summary['fingerprint'] = _fingerprint(digests, users, places, behaviors)
  files.write_json(folder / 'summary.json', summary)
  for warning in summary['warnings']:
    logging.warning('%s', warning)
  return summary


# Checking: what stops the run.


def _reject(con, most: float, path, folder) -> dict[str, int]:
  """Writes rejected.csv; refuses an empty log and too many malformed rows."""
  rows, rejected = con.execute(
      'SELECT count(*), count(reason) FROM rows').fetchone()
  if not rows:
    raise InputError(f'{path} holds no rows: give data.events a log with rows')
  cursor = con.execute('SELECT line, reason, text FROM rows '
                       'WHERE reason IS NOT NULL ORDER BY line')
  first = cursor.fetchmany(_FETCHED)
  if rejected > most * rows:
    line, reason, _ = first[0]
    raise InputError(
        f'{path} line {line}: {reason}; {rejected} of {rows} rows are '
        f'malformed ({rejected / rows:.2%}) and data.max_rejected = {most} '
        f'allows {most:.2%}: mend the rows, check data.columns, or raise '
        'data.max_rejected')
  with open(folder / 'rejected.csv', 'w', encoding='utf-8', newline='') as file:
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['line', 'reason', 'text'])
    while first:
      writer.writerows(first)
      first = cursor.fetchmany(_FETCHED)
  if rejected == rows:
    raise InputError(f'{path}: all {rows} rows are malformed: check '
                     'data.columns')
  return {'rows': rows, 'rejected': rejected}


def _check_names(con, path):
  """An unusable behavior name is a wrong log, not a malformed row."""
  bad = con.execute(
      'SELECT line, length(what) FROM parsed WHERE length(what) NOT BETWEEN 1 '
      f'AND {_LONGEST_NAME} ORDER BY line LIMIT 1').fetchone()
  if bad:
    line, length = bad
    what = f'has {length} characters' if length else 'is empty'
    raise InputError(
        f'{path} line {line}: the behavior name {what}; give every row a name '
        f'of 1 to {_LONGEST_NAME} characters (data.columns.behavior)')


def _check_training(behaviors, path):
  if not any(item.train_count for item in behaviors):
    raise InputError(
        f'{path}: none of its {sum(item.count for item in behaviors)} events '
        'falls into the training split: give longer histories (or more groups) '
        'or a larger first fraction of data.split')
  taught = [item.name for item in behaviors if item.train_count]
  if len(taught) < 2:
    raise InputError(
        f'{path}: the training split holds 1 behavior, {taught[0]!r}, and at '
        'least 2 are needed: check data.columns.behavior and data.split')


# Writing: DuckDB tables -> the folder.


def _write_events(con, folder, position) -> dict[str, str]:
  """Writes the shards; returns the SHA-256 of every whole column."""
  table = np.full(max(position) + 1, -1, '<i4')
  table[list(position)] = list(position.values())
  hashes = {name: hashlib.sha256() for name in _DTYPES}
  reader = con.sql('SELECT uid, micros, bid, pid, split FROM events '
                   'ORDER BY uid, micros, line').to_arrow_reader(_SHARD)
  for number, shard in enumerate(_shards(reader)):
    user, micros, behavior, place, split = (
        column.to_numpy() for column in shard.columns)
    # Floor, also before 1970.
    values = user, micros // 1_000_000, table[behavior], place, split
    columns = {
        name: np.ascontiguousarray(value, dtype) for (name, dtype), value in
        zip(_DTYPES.items(), values, strict=True)}
    for name, value in columns.items():
      hashes[name].update(value)
    _write_arrow(folder / f'part-{number:05d}.arrow', columns)
  return {name: digest.hexdigest() for name, digest in hashes.items()}


def _shards(reader):
  """Re-cuts record batches into tables of _SHARD events; the last is rest."""
  held, size = [], 0
  for batch in reader:
    held.append(batch)
    size += len(batch)
    while size >= _SHARD:
      whole = pa.Table.from_batches(held)
      yield whole.slice(0, _SHARD)
      held = whole.slice(_SHARD).to_batches()
      size -= _SHARD
  if size:
    yield pa.Table.from_batches(held)


def _write_arrow(path, columns):
  """One record batch a file, so that every column maps as one array."""
  batch = pa.RecordBatch.from_pydict(
      {name: pa.array(value) for name, value in columns.items()})
  with pa.ipc.new_file(str(path), batch.schema) as writer:
    writer.write_batch(batch)


def _write_names(con, table, folder) -> list[str]:
  rows = con.execute(f'SELECT name FROM {table} ORDER BY id').fetchall()
  names = [name for name, in rows]
  _write_arrow(folder / f'{table}.arrow',
               {'name': pa.array(names, pa.string())})
  return names


def _summary(con, users, behaviors) -> dict:
  sizes = dict(con.execute(
      'SELECT split, count(*) FROM events GROUP BY split').fetchall())
  groups = [item.group for item in behaviors]
  return {
      'events': sum(sizes.values()),
      'users': len(users),
      'behaviors': len(behaviors),
      'anchors': groups.count('anchor'),
      'tails': groups.count('tail'),
      'unseen': groups.count('unseen'),
      'unseen_test_events': sum(
          item.count for item in behaviors if item.group == 'unseen'),
      'splits': {name: sizes.get(i, 0) for i, name in enumerate(SPLITS)},
  }


def _warnings(summary) -> list[str]:
  warnings = []
  if not summary['tails']:
    warnings.append(
        f'no tail behavior: all {summary["anchors"]} behaviors are anchors; '
        'stage 2 has nothing rare to learn (data.anchor_share)')
  if summary['unseen']:
    warnings.append(
        f'behaviors seen only in the test split: {summary["unseen"]}, with '
        f'{summary["unseen_test_events"]} events in all; they may stand in '
        'contexts and are never candidates')
  return warnings


def _fingerprint(digests, users, places, behaviors) -> str:
  """SHA-256 of the columns, names and groups; the shard size is not in it."""
  listed = [[item.name, item.group] for item in behaviors]
  text = json.dumps([digests, users, places, listed])
  return hashlib.sha256(text.encode()).hexdigest()


# Opening.


def open_events(folder) -> Events:
  """Memory-maps a prepared folder; zero copy where it has one shard."""
  folder = pathlib.Path(folder)
  shards = [_map(path) for path in sorted(folder.glob('part-*.arrow'))]
  assert shards, f'{folder} holds no events'
  columns = {}
  for name in _DTYPES:
    parts = [shard[name].to_numpy(zero_copy_only=True) for shard in shards]
    columns[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
  starts = np.flatnonzero(np.diff(columns['user'], prepend=-1))
  behaviors = [Behavior(**item) for item in json.loads(
      (folder / 'behaviors.json').read_text('utf-8'))]
  users, places = (_map(folder / f'{name}.arrow')['name'].to_pylist()
                   for name in ('users', 'places'))
  summary = json.loads((folder / 'summary.json').read_text('utf-8'))
  return Events(
      **columns, first=starts[columns['user']], users=users, places=places,
      behaviors=behaviors, fingerprint=summary['fingerprint'],
      known=sum(item.group != 'unseen' for item in behaviors))


def _map(path) -> pa.RecordBatch:
  return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
