"""Lines of a text log -> rows: CSV, TSV and JSON lines.

`open_csv` and `open_json` take the first lines and return (lines used, cut).
`cut(lines, last)` returns (rows, lines used); a row is (offset of its first
line in `lines`, values of the mapped columns, reason or None, text). What is
not used stands at the start of the next call's lines; with `last` all is used.

A malformed row carries a reason and never stops the reading. A chunk without
one goes the fast way; any doubt sends it record by record.
"""

import csv
import difflib
import functools
import itertools
import json
import operator

from behaviorlm_jax.errors import InputError

FIELDS = ('user', 'time', 'behavior', 'place', 'group')
_RECORD_LINES = 256  # a stray quote may swallow no more lines than this


def check_columns(path, columns, present):
  """Refuses a mapped column that the log lacks; names the nearest it has."""
  for field, column in zip(FIELDS, columns, strict=True):
    if column is not None and column not in present:
      near = difflib.get_close_matches(column, present, n=3, cutoff=.4)
      raise InputError(
          f'{path} has no column {column!r}; set data.columns.{field} to one '
          f'of its columns, {"nearest" if near else "which are"}: '
          + ', '.join(map(repr, near or list(present)[:20])))


def open_csv(path, columns, lines, delimiter):
  """Reads the header: lines used, and the function that cuts the others."""
  options = {'delimiter': delimiter, 'strict': True}
  reader = csv.reader(lines, **options)
  try:
    header = next(filter(None, reader), None)
  except csv.Error as error:
    raise InputError(f'{path} line {reader.line_num}: the header is broken: '
                     f'{error}') from error
  if header is None:
    raise InputError(f'{path} is empty: give data.events a log with a header')
  names = [name.strip() for name in header]
  check_columns(path, columns, names)
  pick = operator.itemgetter(
      *(names.index(column) for column in columns if column is not None))
  return reader.line_num, functools.partial(
      _cut_csv, width=len(names), pick=pick, options=options)


def _cut_csv(lines, last, width, pick, options):
  """Cuts lines into rows; returns them and how many lines they took."""
  try:
    table = list(csv.reader(lines, **options))
  except csv.Error:
    table = []
  if (len(table) == len(lines) and set(map(len, table)) == {width}
      and _is_text(''.join(lines))):
    return list(zip(range(len(lines)), map(pick, table),
                    itertools.repeat(None), lines, strict=False)), len(lines)
  rows, start = [], 0
  while start < len(lines):  # record by record
    record = lines[start:start + _RECORD_LINES]
    fields, reason, used = _cut_record(record, width, options)
    if fields is None and not last and len(record) < _RECORD_LINES:
      break  # its end may stand in the next chunk
    text = ''.join(record[:used])
    if text.strip():
      values = pick([''] * width if reason else fields)
      rows.append((start, values, reason, _mend(text)))
    start += used
  return rows, start


def _cut_record(lines, width, options):
  """The first record of `lines`: fields, why it is malformed, lines used.

  A record that never ends gives up its first line only: the lines that a stray
  quote swallowed are tried again.
  """
  reader = csv.reader(lines, **options)
  try:
    fields = next(reader)
  except csv.Error as error:
    return None, f'broken row: {error}', 1
  reason = None
  if len(fields) != width:
    reason = f'{len(fields)} fields instead of {width}'
  elif not _is_text(''.join(fields)):
    reason = 'not UTF-8 text'
  return fields, reason, reader.line_num


def open_json(path, columns, lines):
  """Like `open_csv`; columns are the keys of the first chunk's objects."""
  keys = {}
  for line in lines:
    keys |= dict.fromkeys(_parse_json(line)[0] or ())
  if not ''.join(lines).strip():
    raise InputError(f'{path} is empty: give data.events a log with rows')
  if keys:  # else every line is malformed, and is reported as such
    check_columns(path, columns, list(keys))
  return 0, functools.partial(
      _cut_json, columns=[column for column in columns if column is not None])


def _cut_json(lines, last, columns):
  """Like `_cut_csv`; a line is a row."""
  rows = []
  for offset, line in enumerate(lines):
    if not line.strip():
      continue
    row, reason = _parse_json(line)
    values = [_as_text((row or {}).get(column)) for column in columns]
    if not _is_text(''.join(filter(None, values))):
      values, reason = [None] * len(columns), 'not UTF-8 text'
    rows.append((offset, values, reason, _mend(line)))
  return rows, len(lines)


def _parse_json(line):
  """The object of a line and None, or None and the reason."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    return None, f'broken JSON: {error}'
  return (row, None) if isinstance(row, dict) else (None, 'not a JSON object')


def _as_text(value) -> str | None:
  if value is None or isinstance(value, str):
    return value
  return json.dumps(value, ensure_ascii=False)


def _is_text(text: str) -> bool:
  """Whether `text` is free of the surrogates that bad bytes became."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _mend(text: str) -> str:
  return text.encode(errors='replace').decode()
