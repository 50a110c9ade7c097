"""Any log -> the rows that DuckDB orders: a table in one vocabulary.

`read_rows` leaves in the connection
  rows    line BIGINT (sources.Log tells file and line), who, instant BIGINT
          (microseconds by which rows are ordered), shift BIGINT (seconds from
          there to the user's clock), what, place, team, reason, text; a
          malformed row has a reason and its text, the others neither
  parsed  the rows without a reason

Text is cut into rows by Python's csv and json readers: DuckDB's own do not say on
which line of the file an accepted row stood, and a complaint about it has to.
Parquet goes to DuckDB directly; its lines are row numbers.

The form of the times follows from the whole column (`times`). Text is read with
the form that its first rows show; where the others disagree it is read again.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from behaviorlm_jax.data.log import (
  csv_rows,
  instants,
  json_rows,
  names,
  parquet,
  sources,
  times,
)
from behaviorlm_jax.errors import InputError

LONGEST_NAME = 256  # characters
_CHUNKS = 64  # batches handed to DuckDB at a time

_TABLES = """
    SET TimeZone = 'UTC';
    CREATE TABLE rows (line BIGINT, who VARCHAR, instant BIGINT, shift BIGINT,
      what VARCHAR, place VARCHAR, team VARCHAR, reason VARCHAR, text VARCHAR);
    CREATE VIEW parsed AS FROM rows WHERE reason IS NULL;
"""
# Names are tidied once, and then looked at.
_TIDIED = """(
    SELECT line, tidy("user") AS "user", {moment} AS moment,
           tidy(behavior) AS behavior, tidy(place) AS place,
           tidy("group") AS "group", reason, text FROM {source})"""
_ABSORB = """
    INSERT INTO rows
    SELECT line, named("user") AS who, instant, shift, named(behavior) AS what,
           named(place) AS place, named("group") AS team,
           coalesce(reason, CASE
             WHEN who IS NULL THEN {no_user}
             WHEN {no_time} THEN 'no time'
             WHEN instant IS NULL OR shift IS NULL THEN 'time ''' ||
               left({shown}, 40) || ''' is not of the form ' || $form
             WHEN $bounded AND instant NOT BETWEEN {first}000000 AND {last}000000 - 1
               THEN 'time ''' || left({shown}, 40) ||
               ''' lies outside of {years}'
             WHEN what IS NULL THEN {no_behavior}
             WHEN length(what) > {longest} THEN
               'behavior of ' || length(what) || ' characters (at most {longest})'
             WHEN team IS NULL AND $grouped THEN 'no group' END) AS why,
           CASE WHEN why IS NOT NULL THEN rtrim(text, chr(10) || chr(13)) END
    FROM ({timed})"""
# Why a text is no name.
_NONE = """CASE WHEN "{0}" <> '' THEN '{0} ''' || "{0}" ||
               ''' means none (data.nulls)' ELSE 'no {0}' END"""


@dataclasses.dataclass(frozen=True)
class Found:
  """What was found out about a log while it was read."""

  rows: int  # of all shards
  form: times.Form
  layout: str  # 'CSV, divided by ',', UTF-8 in gzip'


def read_rows(
  con: duckdb.DuckDBPyConnection, log: sources.Log, shard: tuple[int, int] = (0, 1)
) -> Found:
  """Fills the table `rows` with those of a shard; a user is in one."""
  times.check_settings(log.settings.time_format, log.settings.time_zone)
  con.execute(_TABLES + instants.MACROS + names.macros(log.settings.nulls))
  # By what they begin with, not by their names.
  kinds = {sources.is_parquet(file) for file in log.files}
  if len(kinds) > 1:
    raise InputError(
      f'{log.name} holds Parquet files and text files; give data.events those of '
      'one kind'
    )
  read = _read_parquet if kinds == {True} else _read_texts
  try:
    return read(con, log, shard)
  except duckdb.Error as error:
    reason = ' '.join(str(error).split())
    raise InputError(f'{log.name} cannot be read to its end: {reason}') from error


def _read_texts(
  con: duckdb.DuckDBPyConnection, log: sources.Log, shard: tuple[int, int]
) -> Found:
  form = None  # That of the first chunks, until all are seen.
  mine = _mine('"user"', shard)
  while True:
    column, rows, layouts, again = times.Column(con, log), 0, {}, False
    # One transaction a pass: DuckDB commits an insert to disk each time else.
    con.execute('BEGIN; DELETE FROM rows')
    chunks = _batches(log, layouts)
    while batches := list(itertools.islice(chunks, _CHUNKS)):
      con.register('chunk', pa.Table.from_batches(batches))
      rows += sum(map(len, batches))
      column.add('(SELECT tidy("time") AS moment FROM chunk WHERE reason IS NULL)')
      form = form or column.choose()
      if form:
        _absorb(con, log, form, f'(FROM chunk WHERE {mine})')
      else:  # Day or month first? A later chunk may tell; these rows wait.
        again = True
    con.execute('COMMIT')
    settled = column.settle()
    if settled == form and not again:
      return Found(rows, form, '; '.join(layouts))
    logging.info('%s: its times are %s; it is read again.', log.name, settled.text)
    form = settled


def _batches(log: sources.Log, layouts: dict[str, None]) -> Iterator[pa.RecordBatch]:
  """Yields Arrow batches (line, FIELDS, reason, text); adds to `layouts`."""
  for i, path in enumerate(log.files):
    text = sources.open_text(path)
    is_json = text.start.startswith(('[', '{'))
    read = json_rows.json_batches if is_json else csv_rows.csv_batches
    try:
      with text.open() as file:
        # People count lines from 1.
        layout, batches = read(text, file, log.settings, log.first_line(i) + 1)
        layouts[f'{layout}, {text.described}'] = None
        yield from batches
    except sources.BROKEN as error:
      raise InputError(f'{path} cannot be read to its end: {error}') from error


def _read_parquet(
  con: duckdb.DuckDBPyConnection, log: sources.Log, shard: tuple[int, int]
) -> Found:
  files = [parquet.ParquetFile(path, log.settings.columns) for path in log.files]
  column = times.Column(con, log)
  forms = {file.form for file in files}
  if len(forms) > 1:
    texts = sorted(form.text if form else 'text' for form in forms)
    raise InputError(
      f'{column.where}: the files have times of several types: '
      f'{"; ".join(texts)}; write them alike'
    )
  (form,) = forms
  if form:
    form = column.take_typed(form)
  else:
    for file in files:
      column.add(f'(SELECT tidy({file.texts["time"]}) AS moment FROM {file.table})')
    form = column.settle()
  for i, file in enumerate(files):
    query = file.query(log.first_line(i), _mine(file.texts['user'], shard))
    _absorb(con, log, form, f'({query})')
  # From the footers: of other shards' rows no one has counted any.
  rows = sum(pq.read_metadata(path).num_rows for path in log.files)
  return Found(rows, form, 'Parquet')


def _mine(user: str, shard: tuple[int, int]) -> str:
  """SQL for whether a row is in the shard, of its user as text.

  It stands next to the source and holds no parameters, so that of other shards'
  rows only the user is read.
  """
  index, count = shard
  if count == 1:
    return 'true'
  # DuckDB's hash may change with its version, but is ten times as fast as MD5:
  # whoever joins shards compares versions. Of the clean name, which is the user's.
  return f"hash(coalesce(clean({user}), '')) % {count} = {index}"


def _absorb(
  con: duckdb.DuckDBPyConnection, log: sources.Log, form: times.Form, source: str
) -> None:
  """Inserts the rows of a relation (line, FIELDS, reason, text)."""
  typed = form.word in times.TYPED  # Then "time" is a number already.
  moment = '"time"' if typed else 'tidy("time")'
  tidied = _TIDIED.format(moment=moment, source=source)
  sql = _ABSORB.format(
    timed=instants.select_instants(form, tidied),
    no_user=_NONE.format('user'),
    no_behavior=_NONE.format('behavior'),
    longest=LONGEST_NAME,
    shown='TRY(make_timestamp(moment))::VARCHAR' if typed else 'moment',
    first=times.FIRST,
    last=times.LAST,
    years=times.YEARS,
    no_time='moment IS NULL' if typed else 'named(moment) IS NULL',
  )
  grouped = 'group' in log.settings.columns
  con.execute(sql, {'form': form.text, 'grouped': grouped, 'bounded': form.bounded})
