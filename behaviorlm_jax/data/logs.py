"""Any log -> the rows that DuckDB orders: a table in one vocabulary.

`read` leaves in the connection
  rows    line BIGINT, who, micros BIGINT (of the user's own clock since 1970),
          what, place, team, reason, text; a malformed row has a reason and its
          text, the others neither
  parsed  the rows without a reason

Text is cut into rows by Python's csv and json readers (`log_rows`): DuckDB's
own do not say on which line of the file an accepted row stood, and a complaint
about it has to. Parquet goes to DuckDB directly; its lines are row numbers.
Names are trimmed, and white space inside them becomes one blank.
"""

import functools
import gzip
import itertools
import pathlib
import re
import zlib

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behaviorlm_jax.data import log_rows
from behaviorlm_jax.data.log_rows import FIELDS
from behaviorlm_jax.errors import InputError

_ROW_NUMBER = 'file_row_number'  # DuckDB's column of a Parquet file
_REQUIRED = 3  # how many of FIELDS every log has
_LINES = 8192  # lines cut at a time; a bad one sends them all the slow way
_CHUNKS = 64  # chunks handed to DuckDB at a time

_DATE_TIME = (r'^(\d{4}-\d\d-\d\d[ T](?:[01]\d|2[0-3]):[0-5]\d'
              r'(?::[0-5]\d(?:\.\d+)?)?) ?(?:Z|[+-]\d\d:?(?:\d\d)?)?$')
_MACROS = fr"""
    CREATE MACRO clean(text) AS  -- Looking first is twice as fast.
      CASE WHEN regexp_matches(text, '[\p{{Z}}\p{{Cc}}]')
      THEN trim(regexp_replace(text, '[\p{{Z}}\p{{Cc}}]+', ' ', 'g'))
      ELSE text END;
    CREATE MACRO micros(text) AS coalesce(
      epoch_us(TRY_CAST(regexp_extract(text, '{_DATE_TIME}', 1) AS TIMESTAMP)),
      TRY_CAST(regexp_extract(text, '^-?\d{{1,11}}$') AS BIGINT) * 1000000,
      TRY_CAST(regexp_extract(text, '^-?\d{{13}}$') AS BIGINT) * 1000);
    CREATE TABLE rows (line BIGINT, who VARCHAR, micros BIGINT, what VARCHAR,
      place VARCHAR, team VARCHAR, reason VARCHAR, text VARCHAR);
    CREATE VIEW parsed AS FROM rows WHERE reason IS NULL;
"""
# $grouped: whether a row without a group is malformed.
_ABSORB = """
    INSERT INTO rows
    SELECT line, who, instant, what, place, team,
           coalesce(reason, CASE
             WHEN who IS NULL THEN 'no user'
             WHEN moment IS NULL THEN 'no time'
             WHEN instant IS NULL THEN
               'time ''' || left(clean(moment), 40) || ''' is not a date-time'
             WHEN team IS NULL AND $grouped THEN 'no group' END) AS why,
           CASE WHEN why IS NOT NULL THEN rtrim(text, chr(10) || chr(13)) END
    FROM (SELECT line, nullif(clean("user"), '') AS who,
                 nullif(trim("time"), '') AS moment, micros(moment) AS instant,
                 coalesce(clean(behavior), '') AS what,
                 nullif(clean(place), '') AS place,
                 nullif(clean("group"), '') AS team, reason, text
          FROM {source})"""


def read(con, data, path, shard=(0, 1)) -> tuple[bool, int]:
  """Fills the table `rows` with those of a shard; a user is in one.

  Returns whether the log is split by groups, and how many rows it has in all.
  """
  con.execute(_MACROS)
  columns = [data.columns.get(field) or (field if i < _REQUIRED else None)
             for i, field in enumerate(FIELDS)]
  grouped = columns[-1] is not None
  parameters = {'grouped': grouped}
  name = path.name.lower()
  if name.endswith('.parquet'):
    source = _parquet(path, columns, shard)
    try:
      con.execute(_ABSORB.format(source=f'({source})'), parameters)
    except duckdb.Error as error:
      reason = ' '.join(str(error).split())
      raise InputError(f'{path} cannot be read to its end: {reason}'
                       ) from error
    return grouped, pq.read_metadata(path).num_rows
  suffix = pathlib.Path(name.removesuffix('.gz')).suffix
  chunks, size = _batches(path, columns, suffix), 0
  mine = _mine('"user"', shard)
  query = _ABSORB.format(source=f'(FROM chunk WHERE {mine})')
  con.execute('BEGIN')
  while batches := list(itertools.islice(chunks, _CHUNKS)):
    con.register('chunk', pa.Table.from_batches(batches))
    con.execute(query, parameters)
    size += sum(map(len, batches))
  con.execute('COMMIT')
  return grouped, size


def _parquet(path, columns, shard) -> str:
  """A query for the mapped columns of a Parquet file, all as text."""
  try:
    schema = pq.read_schema(path)
  except (pa.ArrowInvalid, OSError) as error:
    raise InputError(f'{path} is not a readable Parquet file: {error}'
                     ) from error
  log_rows.check_columns(path, columns, schema.names)
  _check_schema(path, columns, schema.names)
  texts = []
  for column in columns:
    value = 'NULL' if column is None else '"' + column.replace('"', '""') + '"'
    zone = column and getattr(schema.field(column).type, 'tz', None)
    if zone:
      value = _wall_clock(value, zone)
    texts.append(f'CAST(({value}) AS VARCHAR)')
  # DuckDB takes the path for a glob pattern.
  literal = re.sub(r'([*?[])', r'[\1]', str(path)).replace("'", "''")
  named = ', '.join(f'{text} AS "{field}"'
                    for text, field in zip(texts, FIELDS, strict=True))
  return (
      'SELECT *, NULL AS reason, concat_ws(\',\', COLUMNS(* EXCLUDE line)) '
      f'AS text FROM (SELECT {_ROW_NUMBER} + 1 AS line, {named} '
      f"FROM read_parquet('{literal}', {_ROW_NUMBER} = true) "
      f'WHERE {_mine(texts[0], shard)})')


def _check_schema(path, columns, names):
  """Refuses names that DuckDB, which ignores case, would take for others."""
  for name in names:
    if name.casefold() == _ROW_NUMBER:
      raise InputError(f'{path} has a column {name!r}, which is what rows are '
                       'numbered by here; give it another name.')
  for column in filter(None, columns):
    same = [name for name in names if name.casefold() == column.casefold()]
    if len(same) > 1:
      raise InputError(f'{path} has columns {same[0]!r} and {same[1]!r}, which '
                       'differ in case alone; give one another name.')


def _mine(user: str, shard) -> str:
  """SQL for whether a row is in the shard, of its user as text.

  It stands next to the source and holds no parameters, so that of other shards'
  rows only the user is read. DuckDB's hash may change with its version, but is
  ten times as fast as MD5: whoever joins shards compares versions.
  """
  index, count = shard
  return 'true' if count == 1 else (
      f"hash(coalesce(clean({user}), '')) % {count} = {index}")


def _wall_clock(value: str, zone: str) -> str:
  """SQL for a Parquet time, stored as UTC, on the clock of its column."""
  offset = re.fullmatch(r'([+-])(\d\d):(\d\d)', zone)
  if not offset:
    return f"{value} AT TIME ZONE '{zone}'"
  sign, hours, minutes = offset.groups()
  return (f"{value} AT TIME ZONE 'UTC' "
          f"{sign} INTERVAL {int(hours) * 60 + int(minutes)} MINUTE")


def _batches(path, columns, suffix):
  """Yields Arrow batches (line, FIELDS, reason, text) of a text log."""
  openers = {
      '.csv': functools.partial(log_rows.open_csv, delimiter=','),
      '.tsv': functools.partial(log_rows.open_csv, delimiter='\t'),
      **dict.fromkeys(('.jsonl', '.ndjson', '.json'), log_rows.open_json)}
  if suffix not in openers:
    raise InputError(
        f'{path} has no known format: the name of data.events must end in '
        f'{", ".join(openers)} (each also with .gz) or .parquet')
  cut, number, lines = None, 1, []
  for more, last in _chunks(path):
    lines += more
    if cut is None:
      used, cut = openers[suffix](path, columns, lines)
      lines, number = lines[used:], number + used
    rows, used = cut(lines, last)
    if rows:
      yield _batch(number, rows, columns)
    lines, number = lines[used:], number + used


def _chunks(path):
  """Yields (lines with their ends, False), then ([], True)."""
  opener = gzip.open if path.suffix.lower() == '.gz' else open
  try:
    # Bad bytes become surrogates, which `log_rows` finds.
    with opener(path, 'rt', encoding='utf-8-sig', errors='surrogateescape',
                newline='') as file:
      while lines := list(itertools.islice(file, _LINES)):
        yield lines, False
  except (OSError, EOFError, zlib.error) as error:
    raise InputError(f'{path} cannot be read to its end: {error}') from error
  yield [], True


def _batch(number, rows, columns) -> pa.RecordBatch:
  """Rows are (offset, values of the mapped columns, reason, text)."""
  offsets, values, reasons, texts = zip(*rows, strict=True)
  mapped = iter(zip(*values, strict=True))
  arrays = {'line': pa.array(np.asarray(offsets, np.int64) + number)}
  for field, column in zip(FIELDS, columns, strict=True):
    arrays[field] = (pa.nulls(len(rows), pa.string()) if column is None
                     else pa.array(next(mapped), pa.string()))
  arrays['reason'] = pa.array(reasons, pa.string())
  arrays['text'] = pa.array(texts, pa.string())
  return pa.RecordBatch.from_pydict(arrays)
