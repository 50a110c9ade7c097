"""Parquet files, which DuckDB reads by itself: SQL for the mapped columns."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from behaviorlm_jax.data.log import text_rows, times
from behaviorlm_jax.data.log.sources import FIELDS
from behaviorlm_jax.errors import InputError

_ROW_NUMBER = 'file_row_number'  # DuckDB's column of a Parquet file


class ParquetFile:
  """The mapped columns of a file.

  `form` is that of its times where their type tells; their SQL then gives
  microseconds.
  """

  def __init__(self, path: Path, columns: Mapping[str, str]):
    try:
      schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
      raise InputError(f'{path} is not a readable Parquet file: {error}') from error
    # DuckDB takes the path for a glob pattern.
    literal = re.sub(r'([*?[])', r'[\1]', str(path)).replace("'", "''")
    # Folders named like columns would take the place of the file's own.
    options = f'{_ROW_NUMBER} = true, hive_partitioning = false'
    self.table = f"read_parquet('{literal}', {options})"
    found = list(_columns(schema))
    inside = sorted(name for name, _ in found if name not in schema.names)
    text_rows.check_columns(path, columns, [*schema.names, *inside])
    _check_case(path, columns.values(), schema.names)
    self.form, self.texts = None, dict.fromkeys(FIELDS, 'NULL::VARCHAR')
    for field, column in columns.items():
      kind, value = dict(found)[column]
      if field == 'time' and pa.types.is_temporal(kind):
        self.form, self.texts[field] = _typed(path, column, kind, value)
      else:
        self.texts[field] = _as_text(path, column, kind, value)

  def query(self, number: int, mine: str) -> str:
    """A query (line, FIELDS, reason, text) of some rows; lines from `number`.

    `mine`: SQL for which rows.
    """
    named = ', '.join(f'{text} AS "{field}"' for field, text in self.texts.items())
    return (
      "SELECT *, NULL::VARCHAR AS reason, concat_ws(',', COLUMNS(* EXCLUDE "
      f'line)) AS text FROM (SELECT {number} + {_ROW_NUMBER} + 1 AS line, '
      f'{named} FROM {self.table} WHERE {mine})'
    )


def _columns(fields: Iterable[pa.Field]) -> Iterator[tuple[str, tuple]]:
  """Yields (name, (type, SQL)) of columns, and with dots of those inside of structs."""
  quote = lambda field: '"' + field.name.replace('"', '""') + '"'
  for field in fields:
    if pa.types.is_struct(field.type):
      for name, (kind, value) in _columns(field.type):
        yield f'{field.name}.{name}', (kind, f'{quote(field)}.{value}')
  # Last: in a dict, a column whose name has dots goes before a path.
  for field in fields:
    yield field.name, (field.type, quote(field))


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


def _check_case(path: Path, columns: Iterable[str], present: list[str]) -> None:
  """Refuses names that DuckDB, which ignores case, would take for others."""
  for name in present:
    if name.casefold() == _ROW_NUMBER:
      raise InputError(
        f'{path} has a column {name!r}, which is what rows are '
        'numbered by here; give it another name.'
      )
  for column in columns:
    same = [name for name in present if name.casefold() == column.casefold()]
    if len(same) > 1:
      raise InputError(
        f'{path} has columns {same[0]!r} and {same[1]!r}, which '
        'differ in case alone; give one another name.'
      )
