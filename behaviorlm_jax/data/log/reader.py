"""Any log -> the rows that DuckDB orders: a table in one vocabulary.

`read_rows` leaves in the connection
  rows    line BIGINT (sources.Log tells file and line), who, instant BIGINT
          (microseconds by which rows are ordered), shift BIGINT (seconds from
          there to the user's clock), what, place, team, reason, text; a
          malformed row has a reason and its text, the others neither
  parsed  the rows without a reason

Text is cut into rows by Python's csv and json readers (`text_rows`): DuckDB's
own do not say on which line of the file an accepted row stood, and a complaint
about it has to. Parquet goes to DuckDB directly; its lines are row numbers.

The form of the times follows from the whole column (`times`). Text is read with
the form that its first rows show; where the others disagree it is read again.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from ml_collections import ConfigDict

from behaviorlm_jax.data.log import names, sources, text_rows, times
from behaviorlm_jax.data.log.text_rows import Columns, FIELDS
from behaviorlm_jax.errors import InputError

LONGEST_NAME = 256  # characters
_ROW_NUMBER = 'file_row_number'  # DuckDB's column of a Parquet file
_REQUIRED = 3  # how many of FIELDS every log has
_LINES = 8192  # lines cut at a time; a bad one sends them all the slow way
_CHUNKS = 64  # chunks handed to DuckDB at a time

_TABLES = """
    SET TimeZone = 'UTC';
    CREATE TABLE rows (line BIGINT, who VARCHAR, instant BIGINT, shift BIGINT,
      what VARCHAR, place VARCHAR, team VARCHAR, reason VARCHAR, text VARCHAR);
    CREATE VIEW parsed AS FROM rows WHERE reason IS NULL;
"""
# Names are tidied once, and then looked at. {none}: why a text is no name.
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
_TIDY = (
  'SELECT line, tidy("user") AS "user", {moment} AS moment, '
  'tidy(behavior) AS behavior, tidy(place) AS place, '
  'tidy("group") AS "group", reason, text FROM {source}'
)


@dataclasses.dataclass(frozen=True)
class Found:
  """What was found out about a log while it was read."""

  rows: int  # of all shards
  grouped: bool  # whether it is split by groups instead of by time
  form: times.Form
  layout: str  # 'CSV, divided by ',', UTF-8 in gzip'


def read_rows(
  con: duckdb.DuckDBPyConnection,
  data: ConfigDict,
  log: sources.Log,
  shard: tuple[int, int] = (0, 1),
) -> Found:
  """Fills the table `rows` with those of a shard; a user is in one.

  `data`: the config's section.
  """
  times.check_settings(data.time_format, data.time_zone)
  con.execute(_TABLES + names.macros(data.nulls))
  columns = [
    data.columns.get(field) or (field if i < _REQUIRED else None)
    for i, field in enumerate(FIELDS)
  ]
  # By what they begin with, not by their names.
  kinds = {sources.is_parquet(file) for file in log.files}
  if len(kinds) > 1:
    raise InputError(
      f'{log.name} holds Parquet files and text files; give '
      'data.events those of one kind'
    )
  reader = _Parquet if kinds == {True} else _Texts
  return reader(con, data, log, columns, shard).read()


class _Reader:
  """What both kinds of files have in common."""

  def __init__(
    self,
    con: duckdb.DuckDBPyConnection,
    data: ConfigDict,
    log: sources.Log,
    columns: Columns,
    shard: tuple[int, int],
  ):
    self.con, self.data, self.log, self.shard = con, data, log, shard
    self.columns = columns
    self.grouped = columns[-1] is not None
    self.where = f'{log.name} (data.columns.time = {columns[1]!r})'
    self.given = times.given(data.time_format, data.time_zone)

  def choose(self, seen: times.Seen) -> times.Form | None:
    """The form of the times seen so far; None: they leave it open."""
    word = self.data.time_format
    if not seen.shapes:
      return None
    return times.choose_form(
      seen, word if word in times.ORDERS else '', self.data.time_zone, self.where
    )

  def settle(self, seen: times.Seen) -> times.Form:
    """The form of all times; refuses what is open to the end."""
    if self.given:
      return self.given
    if self.data.time_format == 'typed':
      raise InputError(
        "data.time_format is 'typed', but "
        f'{self.where} holds texts or numbers; name their form'
      )
    form = self.choose(seen)
    if form is None and seen.shapes:
      times.refuse_open(seen, self.where)
    return form or times.Form('iso', False, True)  # No row has a time.

  def absorb(self, form: times.Form, source: str) -> None:
    """Inserts the rows of a relation (line, FIELDS, reason, text)."""
    typed = form.word in times.TYPED  # Then "time" is a number already.
    tidy = _TIDY.format(moment='"time"' if typed else 'tidy("time")', source=source)

    def none(field: str) -> str:
      return f"""CASE WHEN "{field}" <> '' THEN '{field} ''' || "{field}" ||
              ''' means none (data.nulls)' ELSE 'no {field}' END"""

    self.con.execute(
      _ABSORB.format(
        timed=times.select_instants(form, f'({tidy})'),
        no_user=none('user'),
        no_behavior=none('behavior'),
        longest=LONGEST_NAME,
        shown='TRY(make_timestamp(moment))::VARCHAR' if typed else 'moment',
        first=times.FIRST,
        last=times.LAST,
        years=times.YEARS,
        no_time='moment IS NULL' if typed else 'named(moment) IS NULL',
      ),
      {'form': form.text, 'grouped': self.grouped, 'bounded': form.bounded},
    )


def _mine(user: str, shard: tuple[int, int]) -> str:
  """SQL for whether a row is in the shard, of its user as text.

  It stands next to the source and holds no parameters, so that of other shards'
  rows only the user is read.
  """
  index, count = shard
  # DuckDB's hash may change with its version, but is ten times as fast as MD5:
  # whoever joins shards compares versions. Of the clean name, which is the user's.
  return (
    'true' if count == 1 else (f"hash(coalesce(clean({user}), '')) % {count} = {index}")
  )


# Text.


class _Texts(_Reader):
  """CSV and JSON files."""

  def read(self) -> Found:
    try:
      return self._read()
    except duckdb.Error as error:
      raise _unreadable(self.log, error) from error

  def _read(self) -> Found:
    form = self.given  # None: that of the first chunks, until all are seen.
    mine = _mine('"user"', self.shard)
    source = f'(FROM chunk WHERE {mine})'
    while True:
      seen, rows, layouts, again = times.Seen(self.con), 0, {}, False
      # One transaction a pass: DuckDB commits an insert to disk each time else.
      self.con.execute('BEGIN; DELETE FROM rows')
      chunks = self._batches(layouts)
      while batches := list(itertools.islice(chunks, _CHUNKS)):
        self.con.register('chunk', pa.Table.from_batches(batches))
        rows += sum(map(len, batches))
        if not self.given:
          seen.add('(SELECT tidy("time") AS moment FROM chunk WHERE reason IS NULL)')
          form = form or self.choose(seen)
        if form:
          self.absorb(form, source)
        else:  # Day or month first? A later chunk may tell; these rows wait.
          again = True
      self.con.execute('COMMIT')
      settled = self.settle(seen)
      if settled == form and not again:
        return Found(rows, self.grouped, form, '; '.join(layouts))
      logging.info(
        '%s: its times are %s; it is read again.', self.log.name, settled.text
      )
      form = settled

  def _batches(self, layouts: dict[str, None]) -> Iterator[pa.RecordBatch]:
    """Yields Arrow batches (line, FIELDS, reason, text) of all files."""
    for i, file in enumerate(self.log.files):
      text = sources.open_text(file)
      first = self.log.first_line(i) + 1  # People count lines from 1.
      if text.start.startswith(('[', '{')) and (
        not text_rows.has_object_a_line(text.start)
      ):
        layouts[f'JSON, {text.described}'] = None
        batches = self._stream(text, first)
      else:
        batches = self._lines(text, first, layouts)
      try:
        yield from batches
      except sources.BROKEN as error:
        if isinstance(error, InputError):
          raise
        raise InputError(f'{file} cannot be read to its end: {error}') from error

  def _lines(
    self, text: sources.TextFile, number: int, layouts: dict[str, None]
  ) -> Iterator[pa.RecordBatch]:
    cut, lines = None, []
    with text.open() as file:
      more = True
      while more:
        chunk = list(itertools.islice(file, _LINES))
        more, lines = bool(chunk), lines + chunk
        if cut is None:
          used, cut = self._cutter(text, lines, layouts)
          lines, number = lines[used:], number + used
        table, used = cut(lines, not more)
        if table[0]:
          yield _batch(number, table, self.columns)
        # What a record that goes on has begun with stays for the next chunk.
        lines, number = lines[used:], number + used

  def _cutter(
    self, text: sources.TextFile, lines: list[str], layouts: dict[str, None]
  ) -> tuple[int, text_rows.Cut]:
    if text.start.startswith('{'):
      layout = 'JSON lines'
      used, cut = text_rows.open_json(text.path, self.columns, lines)
    else:
      used, cut, layout = text_rows.open_csv(
        text.path, self.columns, lines, self.data.csv
      )
    layouts[f'{layout}, {text.described}'] = None
    return used, cut

  def _stream(self, text: sources.TextFile, number: int) -> Iterator[pa.RecordBatch]:
    with text.open() as file:
      rows = text_rows.json_stream(text.path, file, self.columns)
      while some := list(itertools.islice(rows, _LINES)):
        yield _batch(number, text_rows.as_table(some), self.columns)


def _unreadable(log, error):
  reason = ' '.join(str(error).split())
  return InputError(f'{log.name} cannot be read to its end: {reason}')


def _batch(number: int, table: text_rows.Table, columns: Columns) -> pa.RecordBatch:
  offsets, values, reasons, texts = table
  mapped = iter(values)  # Of those fields that have a column.
  arrays = {'line': pa.array(np.asarray(offsets, np.int64) + number)}
  for field, column in zip(FIELDS, columns, strict=True):
    arrays[field] = (
      pa.nulls(len(offsets), pa.string())
      if column is None
      else pa.array(next(mapped), pa.string())
    )
  arrays['reason'] = pa.array(reasons, pa.string())
  arrays['text'] = pa.array(texts, pa.string())
  return pa.RecordBatch.from_pydict(arrays)


# Parquet.


class _Parquet(_Reader):
  """Parquet files, by DuckDB."""

  def read(self) -> Found:
    files = [_File(path, self.columns) for path in self.log.files]
    try:
      form = self._form(files)
      for i, file in enumerate(files):
        query = file.query(self.log.first_line(i), self.shard)
        self.absorb(form, f'({query})')
    except duckdb.Error as error:
      raise _unreadable(self.log, error) from error
    # From the footers: of other shards' rows no one has counted any.
    rows = sum(pq.read_metadata(path).num_rows for path in self.log.files)
    return Found(rows, self.grouped, form, 'Parquet')

  def _form(self, files: list['_File']) -> times.Form:
    typed = {file.form for file in files}
    if len(typed) > 1:
      texts = sorted(form.text if form else 'text' for form in typed)
      raise InputError(
        f'{self.where}: the files have times of several types: '
        f'{"; ".join(texts)}; write them alike'
      )
    (form,) = typed
    if form:
      if self.data.time_format not in ('', 'typed'):
        raise InputError(
          f'data.time_format is {self.data.time_format!r}, but {self.where} '
          f'holds {form.text}; leave it out'
        )
      if form.instants:
        times.check_settings('', form.zone)
      zone = self.data.time_zone or form.zone
      form = dataclasses.replace(form, zone=zone, bounded=not self.data.time_format)
      return times.check_zone(form, self.where)
    seen = times.Seen(self.con)
    if not self.given:
      for file in files:
        seen.add(f'(SELECT tidy({file.texts[1]}) AS moment FROM {file.table})')
    return self.settle(seen)


class _File:
  """The mapped columns of a Parquet file: SQL for each, as text.

  `form` is that of its times where their type tells; their SQL then gives
  microseconds.
  """

  def __init__(self, path: Path, columns: Columns):
    try:
      schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
      raise InputError(f'{path} is not a readable Parquet file: {error}') from error
    # DuckDB takes the path for a glob pattern.
    literal = re.sub(r'([*?[])', r'[\1]', str(path)).replace("'", "''")
    # Folders named like columns would take the place of the file's own.
    options = f'{_ROW_NUMBER} = true, hive_partitioning = false'
    self.table = f"read_parquet('{literal}', {options})"
    fields = [None if column is None else _field(schema, column) for column in columns]
    inside = dict.fromkeys(_paths(schema)).keys() - set(schema.names)
    text_rows.check_columns(path, columns, [*schema.names, *sorted(inside)])
    _check_case(path, columns, schema.names)
    self.form, self.texts = None, []
    for name, column, field in zip(FIELDS, columns, fields, strict=True):
      text = 'NULL::VARCHAR'
      if field is not None:
        value = _value(column, schema.names)
        text = _as_text(path, column, field.type, value)
        if name == 'time' and pa.types.is_temporal(field.type):
          self.form, text = _typed(path, column, field.type, value)
      self.texts.append(text)

  def query(self, number: int, shard: tuple[int, int]) -> str:
    """A query (line, FIELDS, reason, text) of a shard; lines from `number`."""
    named = ', '.join(
      f'{text} AS "{field}"' for text, field in zip(self.texts, FIELDS, strict=True)
    )
    return (
      "SELECT *, NULL::VARCHAR AS reason, concat_ws(',', COLUMNS(* EXCLUDE "
      f'line)) AS text FROM (SELECT {number} + {_ROW_NUMBER} + 1 AS line, '
      f'{named} FROM {self.table} WHERE {_mine(self.texts[0], shard)})'
    )


def _paths(schema: pa.Schema) -> Iterator[str]:
  """Column names, and with dots those inside of structs."""

  def inside(fields: Iterable[pa.Field], prefix: str) -> Iterator[str]:
    for field in fields:
      yield prefix + field.name
      if pa.types.is_struct(field.type):
        yield from inside(
          [field.type.field(i) for i in range(field.type.num_fields)],
          f'{prefix}{field.name}.',
        )

  return inside(schema, '')


def _field(schema: pa.Schema, column: str) -> pa.Field | None:
  """The Arrow field of a column or of a path into structs; None: none."""
  found = schema.get_all_field_indices(column)
  if found:
    return schema.field(found[0])
  first, *rest = column.split('.')
  if len(schema.get_all_field_indices(first)) != 1:
    return None
  field = schema.field(first)
  for key in rest:
    if not pa.types.is_struct(field.type) or (field.type.get_field_index(key) < 0):
      return None
    field = field.type.field(field.type.get_field_index(key))
  return field


def _value(column: str, present: Sequence[str]) -> str:
  """SQL of a column, or of a path into structs."""
  parts = [column] if column in present else column.split('.')
  quoted = ['"' + part.replace('"', '""') + '"' for part in parts]
  return '.'.join(quoted)


def _as_text(path: Path, column: str, kind: pa.DataType, value: str) -> str:
  """SQL of a value as text; refuses what is none."""
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  if pa.types.is_nested(kind):
    raise InputError(
      f'{path}: the column {column!r} holds objects ({kind}), '
      'not texts or numbers; set data.columns to another'
    )
  if (
    pa.types.is_binary(kind)
    or pa.types.is_large_binary(kind)
    or pa.types.is_fixed_size_binary(kind)
  ):
    # Texts of writers that leave out the UTF-8 mark.
    return f'TRY(decode({value}))'  # NULL where it is no UTF-8.
  if pa.types.is_floating(kind):  # In full: not 1.7e+18.
    return (
      f'CASE WHEN abs({value}) < 9e18 AND {value} = floor({value}) THEN '
      f'CAST(TRY_CAST({value} AS BIGINT) AS VARCHAR) '
      f'ELSE CAST({value} AS VARCHAR) END'
    )
  return f'CAST({value} AS VARCHAR)'


def _typed(
  path: Path, column: str, kind: pa.DataType, value: str
) -> tuple[times.Form, str]:
  """The form of a column of times, and SQL for its microseconds."""
  if pa.types.is_date(kind):
    return times.Form('date', False, False), f'epoch_us({value})'
  if not pa.types.is_timestamp(kind):
    raise InputError(
      f'{path}: the column {column!r} (data.columns.time) holds '
      f'{kind}, which is no date'
    )
  micros = f'epoch_us({value})'
  if kind.unit == 'ns':
    # Cut, not rounded into the next second. What has a zone is an instant in UTC,
    # and DuckDB has functions for those without one alone.
    plain = f'CAST({value} AS TIMESTAMP_NS)' if kind.tz else value
    micros = f'epoch_ns({plain}) // 1000'
  return times.Form('timestamp', bool(kind.tz), True, times.zone_name(kind.tz)), micros


def _check_case(path: Path, columns: Columns, present: Sequence[str]) -> None:
  """Refuses names that DuckDB, which ignores case, would take for others."""
  for name in present:
    if name.casefold() == _ROW_NUMBER:
      raise InputError(
        f'{path} has a column {name!r}, which is what rows are '
        'numbered by here; give it another name.'
      )
  for column in filter(None, columns):
    same = [name for name in present if name.casefold() == column.casefold()]
    if len(same) > 1:
      raise InputError(
        f'{path} has columns {same[0]!r} and {same[1]!r}, which '
        'differ in case alone; give one another name.'
      )
