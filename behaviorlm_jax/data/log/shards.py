"""The heavy part of preparing a log, for all of its users or one n-th of them.

What can be said of a user alone is done here: rows are parsed, checked, sorted and
freed of duplicates and repeats. What takes all users is done by `join.join`, which is
cheap. So n tasks prepare a log that one machine would take long for, and the outcome
is the same, bit for bit, whatever n is: a log prepared at once is one shard, joined.

A shard holds the users whose name has a hash that is `index` modulo `count`,
and their malformed rows (those without a user have the hash of no name). Every
task reads the whole log, because a log is in the order of time, but looks at no
more than the user of a row that is not its own.

DuckDB sorts and spills to disk, so a log larger than memory goes the same way as a
small one. In the folder, events are sorted by user (names in code point order), then
instant (or local clock, of a log without instants), then line of the file:

    user, time, behavior, place .npy   of columns.DTYPES; numbers are those of
                                       the next three files
    users.arrow                        name, events, group
    names.arrow, places.arrow          name
    rejected.arrow                     line, reason, text of malformed rows
    shard.json                         counts of rows, the form of the times
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from behaviorlm_jax.data.log import columns, reader, sources
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import files

MEMORY = '4GB'  # leaves room on an 8 GB machine; beyond it DuckDB spills
_BATCH = 1 << 20  # events at a time
COLUMNS = ('user', 'time', 'behavior', 'place')
_TABLES = {'users': 'who', 'places': 'place', 'names': 'what'}


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[tuple[Path, duckdb.DuckDBPyConnection]]:
  """Yields a folder that takes its place at the end, and a connection."""
  half = folder.with_name(folder.name + '.tmp')
  shutil.rmtree(half, ignore_errors=True)  # of a run that was killed
  spill = half / 'spill'
  spill.mkdir(parents=True)
  try:
    with duckdb.connect(
      spill / 'log.duckdb',
      config={'temp_directory': str(spill), 'memory_limit': MEMORY},
    ) as con:
      yield half, con
    shutil.rmtree(spill)
    half.rename(folder)  # Last: who sees the folder sees all of it.
  finally:  # Of a failure nothing is left; after the rename there is nothing.
    shutil.rmtree(half, ignore_errors=True)


def write_shard(
  log: sources.Log,
  folder: Path,
  shard: tuple[int, int] = (0, 1),
  origin: dict | None = None,
) -> None:
  """Reads a log into the new `folder`, the users of a shard.

  `origin` is written beside the events as config.json.
  """
  grouped = 'group' in log.settings.columns
  with new_folder(folder) as (half, con):
    found = reader.read_rows(con, log, shard)
    facts = _reject(con, log, half, found.rows)
    for table, column in _TABLES.items():
      columns.number_names(con, table, f'SELECT {column} AS name FROM parsed')
    if grouped:
      _check_groups(con, log)
    facts |= _write_events(con, half, log.settings.collapse_repeats, grouped)
    for table in ('names', 'places'):
      columns.write_names(con, half, table)
    facts |= {
      'grouped': grouped,
      'layout': found.layout,
      'form': dataclasses.asdict(found.form),
    }
    if origin is not None:
      files.write_json(half / 'config.json', origin)
    files.write_json(half / 'shard.json', facts)


# Checking: what stops the run.


def _reject(
  con: duckdb.DuckDBPyConnection, log: sources.Log, folder: Path, rows: int
) -> dict:
  """Writes rejected.arrow; refuses an empty log and too many malformed rows.

  `rows`: of the whole log. Those of other shards may be malformed, too, which
  is left to `join`.
  """
  if not rows:
    raise InputError(f'{log.name} holds no rows: give data.events a log with rows')
  # Reasons of one kind: without what they quote.
  reasons = dict(
    con.execute(r"""
      SELECT regexp_replace(regexp_replace(reason, ' ''.*?''', ''), ':.*', '')
             AS kind, count(*) FROM rows WHERE reason IS NOT NULL
      GROUP BY kind ORDER BY count(*) DESC, kind""").fetchall()
  )
  facts = {'rows': rows, 'rejected': sum(reasons.values()), 'reasons': reasons}
  query = 'SELECT line, reason, text FROM rows WHERE reason IS NOT NULL ORDER BY line'
  check_rejected(log, facts, *con.execute(f'{query} LIMIT 1').fetchall())
  columns.write_table(folder / 'rejected.arrow', con.sql(query))
  return facts


def check_rejected(
  log: sources.Log, facts: dict, first: tuple[int, str, str] | None = None
) -> None:
  """Refuses too many malformed rows; `first`: the first of them."""
  rows, rejected, reasons = facts['rows'], facts['rejected'], facts['reasons']
  most = log.settings.max_rejected
  # Where all are malformed nothing is left, whatever max_rejected allows.
  if rejected <= most * rows and rejected < rows:
    return
  counts = ', '.join(f'{n} {kind}' for kind, n in list(reasons.items())[:5])
  hints = ''.join(
    dict.fromkeys(
      f', {hint}'
      for words, hint in _HINTS.items()
      if any(words in kind for kind in reasons)
    )
  )
  if rejected <= most * rows:
    raise InputError(
      f'{log.name}: all {rows} rows are malformed ({counts}): check data.columns{hints}'
    )
  line, reason, _ = first
  raise InputError(
    f'{log.at(line)}: {reason}; {rejected} of {rows} rows are malformed '
    f'({rejected / rows:.2%}: {counts}) and data.max_rejected = {most} '
    f'allows {most:.2%}: mend the rows, check data.columns{hints}, or raise '
    'data.max_rejected'
  )


# Settings that such malformed rows may come from.
_HINTS = {
  'fields instead of': 'data.csv (delimiter, quote, escape)',
  'broken row': 'data.csv (delimiter, quote, escape)',
  'is not of the form': 'data.time_format',
  'lies outside of': 'data.time_format',
  'means none': 'data.nulls',
  'not UTF-8': 'the encoding, which must be UTF-8 or UTF-16',
}


def _check_groups(con: duckdb.DuckDBPyConnection, log: sources.Log) -> None:
  torn = con.execute("""
      SELECT who, min(team), max(team), arg_max(line, (team, -line))
      FROM parsed GROUP BY who HAVING min(team) <> max(team)
      ORDER BY who LIMIT 1""").fetchone()
  if torn:
    raise InputError(
      f'{log.at(torn[3])}: user {torn[0]!r} stands in two groups, '
      f'{torn[1]!r} and {torn[2]!r}; a user belongs to one group of '
      'data.columns.group'
    )


# Writing.


def _write_events(
  con: duckdb.DuckDBPyConnection, folder: Path, collapse: bool, grouped: bool
) -> dict:
  """Writes the columns and users.arrow; returns counts of rows."""
  # DuckDB streams only where nothing is left to fetch.
  ((users, parsed),) = con.execute(
    'SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM parsed)'
  ).fetchall()
  reader = con.sql("""
      SELECT users.id AS uid, instant, shift, names.id AS bid,
             coalesce(places.id, -1) AS pid
      FROM parsed JOIN users ON who = users.name JOIN names ON what = names.name
      LEFT JOIN places ON place = places.name
      ORDER BY uid, instant, line""").to_arrow_reader(_BATCH)
  sizes = np.zeros(users, np.int64)
  single, last, shifted = 0, (-1, -1), False
  with columns.Writer(folder, COLUMNS) as writer:
    for user, instant, shift, behavior, place in _without_duplicates(reader):
      single += len(user)
      shifted |= bool(shift.any())
      # `last` is the event before the batch: repeats may straddle two.
      kept = np.ones(len(user), bool)
      if collapse:  # Of immediate repeats the first one stays.
        kept[1:] = (np.diff(user) != 0) | (np.diff(behavior) != 0)
        kept[0] = (user[0], behavior[0]) != last
        last = user[-1], behavior[-1]
      # A batch holds whole runs of users, the first and last perhaps in part.
      sizes[user[0] : user[-1] + 1] += np.bincount(
        user[kept] - user[0], minlength=user[-1] - user[0] + 1
      )
      writer.add(
        user=user[kept],
        behavior=behavior[kept],
        place=place[kept],
        # The user's clock; floor, also before 1970.
        time=instant[kept] // 1_000_000 + shift[kept],
      )
  con.register('sizes', pa.table({'id': np.arange(users), 'events': sizes}))
  # A group is an event's in the log and a user's here.
  groups = (
    f'SELECT who, any_value(team) AS team FROM parsed WHERE {grouped} GROUP BY who'
  )
  listed = con.sql(f"""
      SELECT name, events, team AS "group" FROM users JOIN sizes USING (id)
      LEFT JOIN ({groups}) ON who = name ORDER BY id""")
  columns.write_table(folder / 'users.arrow', listed)
  return {
    'sound': parsed,
    'shifted': shifted,
    'duplicates': parsed - single,
    'repeats': single - int(sizes.sum()),
  }


def _without_duplicates(reader: pa.RecordBatchReader) -> Iterator[list[np.ndarray]]:
  """Yields (user, instant, shift, behavior, place) in their order, each once.

  Exact duplicates are rows equal in every mapped column; the first one stays.
  """
  # Looked for here, among the few rows of one user and instant, because DuckDB
  # would have to group all rows before it sorts them.
  held = [np.zeros(0, np.int64)] * 5  # Rows of an instant that may go on.
  for batch in reader:
    rows = [
      np.concatenate([old, batch.column(i).to_numpy()]) for i, old in enumerate(held)
    ]
    user, instant = rows[:2]
    others = np.flatnonzero((user != user[-1:]) | (instant != instant[-1:]))
    cut = others[-1] + 1 if len(others) else 0  # Behind it is the last instant.
    held = [column[cut:] for column in rows]
    if cut:
      yield _first_of_equals([column[:cut] for column in rows])
  if len(held[0]):
    yield _first_of_equals(held)


def _first_of_equals(rows: list[np.ndarray]) -> list[np.ndarray]:
  user, instant, _, behavior, place = rows
  same = (np.diff(user) == 0) & (np.diff(instant) == 0)
  # Either one of two neighbors: most rows are alone at their instant.
  tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
  # Without the shift: one instant on any clock.
  keys = np.stack([column[tied] for column in (place, behavior, instant, user)])
  order = np.lexsort(keys)  # Stable: equal rows keep their order.
  equal = (np.diff(keys[:, order]) == 0).all(axis=0)
  kept = np.ones(len(user), bool)
  kept[tied[order][1:][equal]] = False
  return [column[kept] for column in rows]
