"""From parsed rows to ordered events with splits, and the behavior groups.

Works inside a DuckDB connection that holds the table `parsed` (line, who,
micros, what, place, team) with sound rows only. Exact duplicates (equal in
every mapped column) are dropped, immediate repeats collapsed, and only then is
each user's history cut into splits, so that repeats cannot straddle a cut.

Invariants: ties in time keep the order of the file; the order and the groups of
the known behaviors come from the training and validation events alone, so no
event of the test split can move an index or a group. What it can move is a cut:
a last event that repeats its predecessor is collapsed, and the user's history
is one event shorter.
"""

import dataclasses
import hashlib
import math

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


def cuts(split) -> tuple[float, float]:
  """Ends of train and validation, as fractions of a history or of groups."""
  parts = tuple(split)
  if (len(parts) != 3 or not all(0 <= part <= 1 for part in parts)
      or abs(sum(parts) - 1) > 1e-6):
    raise InputError(
        f'data.split is {parts}: give three fractions (train, validation, '
        'test) that sum to 1')
  return parts[0], parts[0] + parts[1]


def split_groups(groups, seed: int, ends) -> dict[str, int]:
  """Whole groups to splits: ranked by a seeded hash, then cut by rank.

  hashlib rather than `hash`, so the ranking is the same in every process.
  """
  ranked = sorted(groups, key=lambda group: (
      hashlib.sha256(f'{seed}:{group}'.encode()).digest(), group))
  sizes = [math.floor(end * len(ranked) + _ROUNDING) for end in ends]
  return {group: sum(rank >= size for size in sizes)
          for rank, group in enumerate(ranked)}


def _number_names(con, table: str, column: str):
  """Makes `table` (id, name): the distinct values in code point order."""
  con.execute(
      f'CREATE TABLE {table} AS SELECT '
      f'(row_number() OVER (ORDER BY {column}) - 1)::INT AS id, '
      f'{column} AS name FROM (SELECT DISTINCT {column} FROM parsed '
      f'WHERE {column} IS NOT NULL)')


def _count(con, table: str) -> int:
  return con.execute(f'SELECT count(*) FROM {table}').fetchone()[0]


def order_events(con, collapse: bool) -> dict[str, int]:
  """Makes `users`, `places`, `names` and `kept`; returns what was dropped."""
  for table, column in (
      ('users', 'who'), ('places', 'place'), ('names', 'what')):
    _number_names(con, table, column)
  con.execute("""
      CREATE TABLE single AS
      SELECT users.id AS uid, micros, names.id AS bid,
             coalesce(places.id, -1) AS pid, min(line) AS line
      FROM parsed JOIN users ON who = users.name JOIN names ON what = names.name
      LEFT JOIN places ON place = places.name
      GROUP BY ALL""")
  con.execute("""
      CREATE TABLE kept AS
      SELECT uid, micros, bid, pid, line FROM single
      QUALIFY NOT $collapse OR bid IS DISTINCT FROM lag(bid) OVER
        (PARTITION BY uid ORDER BY micros, line)""", {'collapse': collapse})
  counts = [_count(con, table) for table in ('parsed', 'single', 'kept')]
  con.execute('DROP TABLE single')
  return {'duplicates': counts[0] - counts[1], 'repeats': counts[1] - counts[2]}


def split_by_time(con, ends):
  """Makes `events`: of a user's n events the first floor(end * n) train, ..."""
  con.execute(f"""
      CREATE TABLE events AS
      SELECT uid, micros, bid, pid, line,
             ((nth > floor($first * n + {_ROUNDING}))::TINYINT
              + (nth > floor($second * n + {_ROUNDING}))::TINYINT)::TINYINT
             AS split
      FROM (SELECT *, row_number() OVER
                      (PARTITION BY uid ORDER BY micros, line) AS nth,
                   count(*) OVER (PARTITION BY uid) AS n FROM kept)""",
              {'first': float(ends[0]), 'second': float(ends[1])})


def split_by_group(con, path, seed: int, ends):
  """Makes `events` with whole groups in one split; refuses a torn user."""
  torn = con.execute("""
      SELECT who, min(team), max(team), arg_max(line, (team, -line))
      FROM parsed GROUP BY who HAVING min(team) <> max(team)
      ORDER BY who LIMIT 1""").fetchone()
  if torn:
    raise InputError(
        f'{path} line {torn[3]}: user {torn[0]!r} stands in two groups, '
        f'{torn[1]!r} and {torn[2]!r}; a user belongs to one group of '
        'data.columns.group')
  teams = con.execute('SELECT DISTINCT team FROM parsed').fetchall()
  chosen = split_groups([team for team, in teams], seed, ends)
  con.execute('CREATE TABLE team_splits AS SELECT unnest($teams) AS team, '
              'unnest($splits)::TINYINT AS split',
              {'teams': list(chosen), 'splits': list(chosen.values())})
  con.execute("""
      CREATE TABLE events AS
      SELECT uid, micros, bid, pid, line, split FROM kept
      JOIN users ON uid = users.id
      JOIN (SELECT DISTINCT who, team FROM parsed) ON who = users.name
      JOIN team_splits USING (team)""")


def group_behaviors(con, anchor_share: float):
  """The behavior list and, for every id of `names`, its place in the list."""
  rows = con.execute("""
      SELECT names.id, name, count(*), count(*) FILTER (split = 0),
             count(*) FILTER (split = 1)
      FROM events JOIN names ON bid = names.id GROUP BY ALL""").fetchall()
  total = sum(row[3] for row in rows)
  # Unseen last; among the known by training count. Test counts never enter.
  rows.sort(key=lambda row: (row[3] + row[4] == 0, -row[3], row[1]))
  behaviors, position = [], {}
  for index, name, count, train, validation in rows:
    position[index] = len(behaviors)
    share = train / total if total else 0.
    group = ('unseen' if train + validation == 0
             else 'anchor' if share > anchor_share else 'tail')
    behaviors.append(Behavior(name, count, train, share, group))
  return behaviors, position
