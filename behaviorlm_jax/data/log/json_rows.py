"""JSON -> rows: an object on every line, or arrays and objects of many lines.

Columns are keys, or paths of keys with dots between.
"""

import collections
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

import pyarrow as pa

from behaviorlm_jax.data.log import text_rows
from behaviorlm_jax.data.log.sources import Settings, TextFile
from behaviorlm_jax.errors import InputError

_FIRST = 8192  # objects of an array that tell its columns
_BLOCK = 1 << 20  # characters of an array at a time
_NO_OBJECT = 'not a JSON object'


class _Doubled(dict):
  """An object of which json would keep the last of two keys without a word."""

  twice: frozenset[str]


def _object(pairs: list[tuple[str, object]]) -> dict:
  row = dict(pairs)
  if len(row) < len(pairs):
    row = _Doubled(row)
    counts = collections.Counter(key for key, _ in pairs)
    row.twice = frozenset(key for key, count in counts.items() if count > 1)
  return row


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def json_batches(
  text: TextFile, file: TextIO, settings: Settings, number: int
) -> tuple[str, Iterator[pa.RecordBatch]]:
  """The layout of a file and its rows in batches.

  Its first line has a number; objects that are no lines are counted from there.
  """
  if _has_object_a_line(text.start):
    layout = 'JSON lines'
    lines = enumerate(file, number)
    found = ((at, _parse(line), line) for at, line in lines if line.strip())
  else:
    layout, found = 'JSON', _objects(text.path, file, number)
  rows = _rows(text.path, settings.columns, found)
  return layout, text_rows.batch_rows(settings.columns, rows)


def _has_object_a_line(start: str) -> bool:
  if start.startswith('['):
    return False
  lines = [line for line in start.splitlines() if line.strip()]
  # The last one may be cut off; a first one that is broken is a malformed row.
  return len(lines) < 2 or any(isinstance(_parse(line), dict) for line in lines[:-1])


def _rows(
  path: Path, columns: Mapping[str, str], found: Iterator[tuple[int, dict | str, str]]
) -> Iterator[text_rows.Row]:
  first = list(itertools.islice(found, _FIRST))
  if not first:
    raise InputError(f'{path} is empty: give data.events a log with rows')
  _check_keys(path, columns, [row for _, row, _ in first])
  for number, row, text in itertools.chain(first, found):
    values, reason = _pick(row, columns)
    yield number, values, reason, text_rows.mend(text)


def _objects(
  path: Path, file: TextIO, number: int
) -> Iterator[tuple[int, dict | str, str]]:
  """Yields what stands in a file and its arrays: (number, object or fault, text)."""
  # The file may be larger than memory: a block at a time, of which what is used is
  # dropped.
  buffer, at, count, inside, more = '', 0, 0, False, True
  blank = re.compile(r'[\s,]*')
  while True:
    at = blank.match(buffer, at).end()
    start = buffer[at : at + 1]
    if start == (']' if inside else '['):
      at, inside = at + 1, not inside
      continue
    found, fault = None, 'its array does not end' if inside else ''
    if start and not inside and start != '{':
      fault, more = f'{buffer[at : at + 20]!r} follows', False
    elif start:
      try:
        found = _DECODER.raw_decode(buffer, at)  # Breaks off, or is broken: both fail.
      except (ValueError, RecursionError) as error:
        fault = getattr(error, 'msg', str(error))
    # A value that ends with the buffer may go on: numbers do.
    if found and not (more and found[1] == len(buffer)):
      value, end = found
      row = value if isinstance(value, dict) else _NO_OBJECT
      yield number + count, row, buffer[at:end]
      at, count = end, count + 1
    elif more:
      block = file.read(_BLOCK)
      buffer, at, more = buffer[at:] + block, 0, bool(block)
    elif fault:
      raise InputError(
        f'{path} breaks off or is no JSON after {count} objects: {fault}'
      )
    else:
      return


def _parse(line: str) -> dict | str:
  """The object of a line, or why it is none."""
  try:
    value = _DECODER.decode(line)
  except (ValueError, RecursionError) as error:
    return f'broken JSON: {error}'
  return value if isinstance(value, dict) else _NO_OBJECT


def _pick(
  row: dict | str, columns: Mapping[str, str]
) -> tuple[list[str | None], str | None]:
  """The values of columns, as texts, and why they are none."""
  missing = [None] * len(columns)
  if isinstance(row, str):
    return missing, row
  values, reasons = [], []
  for column in columns.values():
    found = _find(row, column)
    value = found[-1] if found else None
    if len(found) > 1:
      reasons.append(f'two keys {column!r}')
    if isinstance(value, dict | list):
      kind = 'an object' if isinstance(value, dict) else 'an array'
      reasons.append(f'{column} is {kind}, not a text or a number')
      value = None
    values.append(_as_text(value))
  if not text_rows.is_text(''.join(filter(None, values))):
    return missing, 'not UTF-8 text'
  return values, reasons[0] if reasons else None


def _find(row: dict, column: str) -> list[object]:
  """The values of a key, or of a path of keys with dots between; one if all is well."""
  if '.' not in column and type(row) is dict:
    return [row[column]] if column in row else []
  found = []
  # A key may itself have dots.
  for end in [i for i, c in enumerate(column) if c == '.'] + [len(column)]:
    key = column[:end]
    if key not in row:
      continue
    values = [row[key]]
    if end < len(column):
      inside = isinstance(row[key], dict)
      values = _find(row[key], column[end + 1 :]) if inside else []
    if isinstance(row, _Doubled) and key in row.twice:
      values = 2 * (values or [None])
    found += values
  return found


def _as_text(value: object) -> str | None:
  if value is None or isinstance(value, str):
    return value
  if isinstance(value, float) and value.is_integer():
    value = int(value)  # 7.0 is 7.
  return json.dumps(value, ensure_ascii=False)


def _check_keys(
  path: Path, columns: Mapping[str, str], rows: Iterable[dict | str]
) -> None:
  """Like `check_columns`, of the keys of a log's first objects."""
  deep = max(3, *(column.count('.') for column in columns.values()))
  objects = (row for row in rows if isinstance(row, dict))
  paths = dict.fromkeys(keys for row in objects for keys in _paths(row, deep))
  if paths:  # Else every row is malformed, and is reported as such.
    text_rows.check_columns(path, columns, list(map('.'.join, paths)))


def _paths(
  row: dict, deep: int, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
  """Yields the keys of an object and the paths to those inside."""
  for key, value in row.items():
    yield (*prefix, key)
    if isinstance(value, dict) and len(prefix) < deep:
      yield from _paths(value, deep, (*prefix, key))
