"""Text of a log -> rows: CSV in any dialect, and JSON.

`open_csv` and `open_json` take the first lines and return (lines used, cut).
`cut(lines, last)` returns (rows, lines used); a row is (offset of its first
line in `lines`, values of the mapped columns, reason or None, text). What is
not used stands at the start of the next call's lines; with `last` all is used.
`json_stream` is for JSON whose objects are not one to a line.

A malformed row carries a reason and never stops the reading. A chunk without
one goes the fast way; any doubt sends it record by record.
"""

import csv
import difflib
import functools
import itertools
import json
import operator
import pathlib
import re
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import TextIO

from ml_collections import config_dict

from behaviorlm_jax.errors import InputError

FIELDS = ('user', 'time', 'behavior', 'place', 'group')
Columns = Sequence[str | None]  # Of the log, one for each of FIELDS; None: not mapped.
# Offset of its first line, values of the mapped columns, reason or None, text.
Row = tuple[int, Sequence[str | None], str | None, str]
Cut = Callable[[list[str], bool], tuple[list[Row], int]]  # See the module.
_RECORD_LINES = 256  # a stray quote may swallow no more lines than this
_DELIMITERS = (',', '\t', ';', '|', '\x01')
_TRIED = 512  # lines that choose a delimiter
# (quote, escape, blanks before a quote): the first that reads most rows.
_QUOTINGS = (
  ('"', None, False),
  ('"', '\\', False),
  ('"', None, True),
  ("'", None, False),
  ("'", '\\', False),
)
_WORDS = {'tab': '\t', '\\t': '\t', 'none': None}
_BLOCK = 1 << 20  # characters of a JSON array at a time


def check_columns(path: pathlib.Path, columns: Columns, present: Sequence[str]) -> None:
  """Refuses a mapped column that the log lacks, or has twice."""
  for field, column in zip(FIELDS, columns, strict=True):
    if column is None:
      continue
    if column not in present:
      near = difflib.get_close_matches(column, present, n=3, cutoff=0.4)
      raise InputError(
        f'{path} has no column {column!r}; set data.columns.{field} to one '
        f'of its columns, {"nearest" if near else "which are"}: '
        + ', '.join(map(repr, near or list(present)[:20]))
      )
    if list(present).count(column) > 1:
      raise InputError(
        f'{path} has {list(present).count(column)} columns named {column!r}; '
        f'rename all but the one that data.columns.{field} means'
      )


# CSV.


def open_csv(
  path: pathlib.Path, columns: Columns, lines: list[str], given: config_dict.ConfigDict
) -> tuple[int, Cut, str]:
  """Reads the header: lines used, the function that cuts the others, dialect.

  `given`: the section data.csv, of which '' is found from `lines`.
  """
  options = _dialect(columns, lines, given)
  reader = csv.reader(lines, **options)
  try:
    header = next(filter(None, reader), None)
  except csv.Error as error:
    raise InputError(
      f'{path} line {reader.line_num}: the header is broken: {error}'
    ) from error
  if header is None:
    raise InputError(f'{path} is empty: give data.events a log with a header')
  names = _names(header)
  check_columns(path, columns, names)
  pick = operator.itemgetter(
    *(names.index(column) for column in columns if column is not None)
  )
  return (
    reader.line_num,
    functools.partial(_cut_csv, width=len(names), pick=pick, options=options),
    _said(options),
  )


def _names(header: list[str]) -> list[str]:
  return [name.strip('\u200b\ufeff \t') for name in header]


def _said(options: dict) -> str:
  shown = {'\t': 'tabs', '\x01': r'\x01'}
  delimiter = shown.get(options['delimiter'], repr(options['delimiter']))
  text = f'CSV, divided by {delimiter}'
  if options.get('quotechar', '"') != '"':
    text += f', quoted by {options["quotechar"]}'
  if options.get('escapechar'):
    text += f', escaped by {options["escapechar"]}'
  return text


def _dialect(columns: Columns, lines: list[str], given: config_dict.ConfigDict) -> dict:
  """Options of csv.reader."""
  word = lambda text: _WORDS.get(text, text)
  delimiters = [word(given.delimiter)] if given.delimiter else _DELIMITERS
  quotings = [
    (
      word(given.quote) if given.quote else quote,
      word(given.escape) if given.escape else escape,
      blanks,
    )
    for quote, escape, blanks in _QUOTINGS
  ]
  found = []
  for quoting in dict.fromkeys(quotings):
    for delimiter in delimiters:
      options = _options(delimiter, *quoting)
      header = _header(lines[:_TRIED], options)
      fits = sum(column in header for column in columns if column is not None)
      found.append((fits, len(header), options))
  # The most mapped columns, then the most columns at all: a header that a wrong
  # delimiter cuts has few. Of equals the first one: commas and double quotes.
  best = max(found, key=lambda item: item[:2])
  fitting = [
    options
    for fits, _, options in found
    if fits == best[0] and (options['delimiter'] == best[2]['delimiter'])
  ]
  # A header rarely tells how rows are quoted; the rows do.
  if len(fitting) == 1 or not _malformed(lines, fitting[0]):
    return fitting[0]
  return min(fitting, key=lambda options: _malformed(lines, options))


def _options(
  delimiter: str, quote: str | None, escape: str | None, blanks: bool
) -> dict:
  # Strict: a quote in the wrong place is an error, and not part of a field.
  options = {'delimiter': delimiter, 'strict': True}
  if quote is None:
    options['quoting'] = csv.QUOTE_NONE
  elif quote != '"':
    options['quotechar'] = quote
  if escape is not None:
    options['escapechar'] = escape
  if blanks:
    options['skipinitialspace'] = True
  return options


def _header(lines: list[str], options: dict) -> list[str]:
  try:
    return _names(next(filter(None, csv.reader(lines, **options)), []))
  except csv.Error:
    return []


def _malformed(lines: list[str], options: dict) -> int:
  """How many of the rows are malformed under a dialect."""
  width = len(_header(lines, options))
  rows, _ = _cut_csv(lines, True, width, lambda fields: (), options)
  return sum(reason is not None for _, _, reason, _ in rows)


def _cut_csv(
  lines: list[str],
  last: bool,
  width: int,
  pick: Callable[[list[str]], tuple[str, ...]],
  options: dict,
) -> tuple[list[Row], int]:
  """Cuts lines into rows; returns them and how many lines they took."""
  try:
    table = list(csv.reader(lines, **options))
  except csv.Error:
    table = []
  # The fast way: a line is a row, so a row's number follows from its place.
  if (
    len(table) == len(lines)
    and set(map(len, table)) == {width}
    and _is_text(''.join(lines))
  ):
    return list(
      zip(
        range(len(lines)), map(pick, table), itertools.repeat(None), lines, strict=False
      )
    ), len(lines)
  rows, start = [], 0
  while start < len(lines):  # record by record
    record = lines[start : start + _RECORD_LINES]
    fields, reason, used = _cut_record(record, width, options)
    if fields is None and not last and len(record) < _RECORD_LINES:
      break  # its end may stand in the next chunk
    text = ''.join(record[:used])
    if text.strip():
      values = pick([''] * width if reason else fields)
      rows.append((start, values, reason, mend(text)))
    start += used
  return rows, start


def _cut_record(
  lines: list[str], width: int, options: dict
) -> tuple[list[str] | None, str | None, int]:
  """The first record of `lines`: fields, why it is malformed, lines used."""
  reader = csv.reader(lines, **options)
  try:
    fields = next(reader)
  except csv.Error as error:
    # One line: those that a stray quote has swallowed are tried again.
    return None, f'broken row: {error}', 1
  reason = None
  if len(fields) != width:
    reason = f'{len(fields)} fields instead of {width}'
  elif not _is_text(''.join(fields)):
    reason = 'not UTF-8 text'
  return fields, reason, reader.line_num


# JSON.


def has_object_a_line(start: str) -> bool:
  """Whether JSON that begins like this has one object on every line."""
  if start.startswith('['):
    return False
  lines = [line for line in start.splitlines() if line.strip()]
  # The last one may be cut off; a first one that is broken is a malformed row.
  return len(lines) < 2 or any(_parse_json(line)[0] for line in lines[:-1])


def open_json(
  path: pathlib.Path, columns: Columns, lines: list[str]
) -> tuple[int, Cut]:
  """Like `open_csv`; columns are the keys of the first chunk's objects."""
  keys = {}
  for line in lines:
    keys |= dict.fromkeys(_paths(_parse_json(line)[0] or {}))
  if not ''.join(lines).strip():
    raise InputError(f'{path} is empty: give data.events a log with rows')
  if keys:  # else every line is malformed, and is reported as such
    check_columns(path, columns, list(keys))
  return 0, functools.partial(
    _cut_json, columns=[column for column in columns if column is not None]
  )


def json_stream(path: pathlib.Path, file: TextIO, columns: Columns) -> Iterator[Row]:
  """Yields rows of an array, or of objects of many lines; offsets are counts.

  Columns are those of the first object.
  """
  used = [column for column in columns if column is not None]
  # The file may be larger than memory: a block at a time, of which what is used is
  # dropped.
  decoder, buffer, at, count, more = json.JSONDecoder(), '', 0, 0, True
  while True:
    at = re.compile(r'[\s,\[]*' if not count else r'[\s,]*').match(buffer, at).end()
    if at == len(buffer) or buffer[at] == ']':
      found = None
    else:
      try:
        found = decoder.raw_decode(buffer, at)  # Breaks off, or is broken: both fail.
      except (ValueError, RecursionError) as error:
        found, fault = None, error
        if not more:
          raise InputError(
            f'{path} breaks off or is no JSON after {count} objects: {fault}'
          ) from error
    # A value that ends with the buffer may go on: numbers do.
    if found is None or (more and found[1] == len(buffer)):
      if not more:
        if not count:
          raise InputError(f'{path} is empty: give data.events a log with rows')
        return
      block = file.read(_BLOCK)
      buffer, at, more = buffer[at:] + block, 0, bool(block)
      continue
    value, end = found
    row = value if isinstance(value, dict) else None
    if not count and row:
      check_columns(path, columns, list(_paths(row)))
    values, reason = _pick(row, used)
    if row is None:
      reason = 'not a JSON object'
    yield count, values, reason, mend(buffer[at:end])
    at, count = end, count + 1


def _cut_json(
  lines: list[str], last: bool, columns: list[str]
) -> tuple[list[Row], int]:
  """Like `_cut_csv`; a line is a row."""
  del last
  rows = []
  for offset, line in enumerate(lines):
    if not line.strip():
      continue
    row, reason = _parse_json(line)
    values, fault = _pick(row, columns)
    reason = reason or fault
    for column in columns:  # json keeps the last of two, without a word.
      if line.count(f'"{column}"') > 1 and _twice(line, column):
        reason = reason or f'two keys {column!r}'
    rows.append((offset, values, reason, mend(line)))
  return rows, len(lines)


def _pick(row: dict | None, columns: list[str]) -> tuple[list[str | None], str | None]:
  """The values of columns, as texts, and why they are none."""
  values, reason = [], None
  for column in columns:
    value = _get(row, column) if row else None
    if isinstance(value, dict | list):
      kind = 'an object' if isinstance(value, dict) else 'an array'
      value, reason = None, reason or (f'{column} is {kind}, not a text or a number')
    values.append(_as_text(value))
  if not _is_text(''.join(filter(None, values))):
    return [None] * len(columns), 'not UTF-8 text'
  return values, reason


def _get(row: dict, column: str) -> object:
  """The value of a key, or of a path of keys with dots between."""
  if column in row or '.' not in column:  # A key may itself have dots.
    return row.get(column)
  for key in column.split('.'):
    row = row.get(key) if isinstance(row, dict) else None
  return row


def _paths(row: dict, prefix: str = '') -> Iterator[str]:
  """Yields the keys of an object and, with dots, of those inside."""
  for key, value in row.items():
    yield prefix + key
    if isinstance(value, dict) and prefix.count('.') < 3:
      yield from _paths(value, f'{prefix}{key}.')


def _twice(line: str, column: str) -> bool:
  """Whether the object of a line has the key at its top twice."""
  tops = []  # The pairs of every object of the line, inner ones first.
  try:
    json.loads(line, object_pairs_hook=lambda pairs: tops.append(pairs))
  except (ValueError, RecursionError):
    return False
  return sum(key == column for key, _ in tops[-1]) > 1  # The last to end.


def _parse_json(line: str) -> tuple[dict | None, str | None]:
  """The object of a line and None, or None and the reason."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    return None, f'broken JSON: {error}'
  return (row, None) if isinstance(row, dict) else (None, 'not a JSON object')


def _as_text(value: object) -> str | None:
  if value is None or isinstance(value, str):
    return value
  if isinstance(value, float) and value.is_integer():
    value = int(value)  # 7.0 is 7.
  return json.dumps(value, ensure_ascii=False)


def _is_text(text: str) -> bool:
  """Whether `text` is free of the surrogates that bad bytes became."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def mend(text: str) -> str:
  """The text as UTF-8 has it, with ? for what it cannot say."""
  return text.encode(errors='replace').decode()
