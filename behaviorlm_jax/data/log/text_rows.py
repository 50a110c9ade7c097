"""Text of a log -> rows: CSV in any dialect, and JSON.

`open_csv` and `open_json` take the first lines and return (lines used, cut).
`cut(lines, last)` returns (rows as a Table, lines used); a row is (offset of its
first line in `lines`, values of the mapped columns, reason or None, text). What is
not used stands at the start of the next call's lines; with `last` all is used.
`json_stream` is for JSON whose objects are not one to a line.

A malformed row carries a reason and never stops the reading. A chunk without
one goes the fast way; any doubt sends it record by record.
"""

import collections
import csv
import difflib
import functools
import itertools
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from ml_collections import ConfigDict

from behaviorlm_jax.errors import InputError

FIELDS = ('user', 'time', 'behavior', 'place', 'group')
Columns = Sequence[str | None]  # Of the log, one for each of FIELDS; None: not mapped.
# Offset of its first line, values of the mapped columns, reason or None, text.
Row = tuple[int, Sequence[str | None], str | None, str]
# The same column by column: offsets, the mapped columns, reasons, texts.
Table = tuple[Sequence[int], Sequence[Sequence], Sequence[str | None], Sequence[str]]
Cut = Callable[[list[str], bool], tuple[Table, int]]  # See the module.
_RECORD_LINES = 256  # a stray quote may swallow no more lines than this
_DELIMITERS = (',', '\t', ';', '|', '\x01')
_TRIED = 512  # lines that choose a delimiter
# (quote, blanks before a quote, escape): of equals the first.
_QUOTINGS = tuple(itertools.product(('"', None, "'"), (False, True), (None, '\\')))
_WORDS = {'tab': '\t', '\\t': '\t', 'none': None}
_OPEN = 'broken row: unexpected end of data'  # csv's words: a quote does not end
_FIRST = 8192  # objects of a JSON array that tell its columns
_BLOCK = 1 << 20  # characters of a JSON array at a time


def check_columns(path: Path, columns: Columns, present: Sequence[str]) -> None:
  """Refuses a mapped column that the log lacks, or has twice."""
  for field, column in zip(FIELDS, columns, strict=True):
    if column is None:
      continue
    if column not in present:
      near = difflib.get_close_matches(column, present, n=3, cutoff=0.4)
      shown = ', '.join(map(repr, near or list(present)[:20]))
      raise InputError(
        f'{path} has no column {column!r}; set data.columns.{field} to one '
        f'of its columns, {"nearest" if near else "which are"}: '
        + (shown if len(shown) <= 200 else f'{shown[:197]}...')
      )
    if list(present).count(column) > 1:
      raise InputError(
        f'{path} has {list(present).count(column)} columns named {column!r}; '
        f'rename all but the one that data.columns.{field} means'
      )


# CSV.


def open_csv(
  path: Path, columns: Columns, lines: list[str], given: ConfigDict
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
  if options.get('quoting') == csv.QUOTE_NONE:
    text += ', without quotes'
  elif options.get('quotechar', '"') != '"':
    text += f', quoted by {options["quotechar"]}'
  if options.get('escapechar'):
    text += f', escaped by {options["escapechar"]}'
  return text


def _character(given: ConfigDict, field: str) -> str | None:
  """What a field of data.csv means; refuses what is no character."""
  value = _WORDS.get(given[field], given[field])
  if value is None and field != 'delimiter':
    return None
  if value is None or len(value) != 1 or value in '\r\n':
    words = (
      'a character or tab' if field == 'delimiter' else 'a character, tab, or none'
    )
    raise InputError(f'data.csv.{field} is {given[field]!r}; give {words}')
  return value


def _dialect(columns: Columns, lines: list[str], given: ConfigDict) -> dict:
  """Options of csv.reader."""
  words = {field: _character(given, field) for field in given if given[field]}
  delimiters = [words['delimiter']] if words.get('delimiter') else _DELIMITERS
  quotings = dict.fromkeys(
    (words.get('quote', quote), blanks, words.get('escape', escape))
    for quote, blanks, escape in _QUOTINGS
  )
  found, text = [], ''.join(lines)
  for quote, blanks, escape in quotings:
    if found and not (
      (quote in (None, '"') or quote in text)
      and (escape is None or escape in text)
      and (not blanks or (quote is not None and f' {quote}' in text))
    ):
      continue  # It reads as one before it does.
    for delimiter in delimiters:
      if delimiter in (quote, escape):
        continue
      options = _options(delimiter, quote, blanks, escape)
      header = _header(lines[:_TRIED], options)
      fits = sum(column in header for column in columns if column is not None)
      found.append((fits, len(header), options))
  if not found:
    raise InputError(
      'data.csv.delimiter is also the quote or the escape; give different characters'
    )
  # The most mapped columns, then the most columns at all: a header that a wrong
  # delimiter cuts has few. Of equals the first one: commas and double quotes.
  best = max(found, key=lambda item: item[:2])
  fitting = [
    options
    for fits, _, options in found
    if fits == best[0] and (options['delimiter'] == best[2]['delimiter'])
  ]
  # A header rarely tells how rows are quoted; the rows do. Rows that a quote wraps
  # speak for it, malformed ones against, but never for one that wraps fewer; of
  # those that read all, what reads most rows wins.
  chosen, most, top = fitting[0], -1, (-math.inf, 0)
  for options in fitting if len(fitting) > 1 else ():
    wrapped, score = _weigh(lines, options)
    if wrapped >= most and score > top:
      chosen, most, top = options, wrapped, score
  return chosen


def _options(
  delimiter: str, quote: str | None, blanks: bool, escape: str | None
) -> dict:
  # Strict: a quote in the wrong place is an error, and not part of a field.
  options = {'delimiter': delimiter, 'strict': True}
  if quote is None:
    options['quoting'] = csv.QUOTE_NONE
  elif quote != '"':
    options['quotechar'] = quote
  if escape not in (None, quote):  # A quote that escapes itself is doubled.
    options['escapechar'] = escape
  if blanks:
    options['skipinitialspace'] = True
  return options


def _header(lines: list[str], options: dict) -> list[str]:
  try:
    return _names(next(filter(None, csv.reader(lines, **options)), []))
  except csv.Error:
    return []


def _weigh(lines: list[str], options: dict) -> tuple[int, tuple[int, int]]:
  """How many rows have quoted fields in a dialect, and how well it reads all."""
  width = len(_header(lines, options))
  rows, _ = _cut_records(lines, True, width, lambda fields: (), options)
  count = len(rows)
  for i, (start, _, reason, _) in enumerate(rows):
    # It may be whole in the file: then no rows follow it here, but what it holds.
    if reason == _OPEN and start + _RECORD_LINES > len(lines):
      if sum(reason is not None for _, _, reason, _ in rows[i:]) * 2 > count - i:
        rows = rows[:i]
      break
  malformed, wrapped = sum(reason is not None for _, _, reason, _ in rows), 0
  if options.get('quoting') != csv.QUOTE_NONE:
    mark, quote = map(re.escape, (options['delimiter'], options.get('quotechar', '"')))
    blanks = ' *' if options.get('skipinitialspace') else ''
    quoted = re.compile(f'(?:^|{mark}){blanks}{quote}').search
    # One that goes on in the next line may be two stray quotes.
    wrapped = sum(
      reason is None and quoted(text) is not None and '\n' not in text.strip()
      for _, _, reason, text in rows
    )
  return wrapped, (wrapped - malformed, 0 if malformed else count)


def _keep_nulls(lines: list[str], options: dict) -> list[str]:
  r"""The lines with \N, which is no escape but a null, as csv.reader keeps it."""
  if options.get('escapechar') != '\\' or not any('\\N' in line for line in lines):
    return lines
  mark = re.escape(options['delimiter'])
  quote = re.escape(options.get('quotechar', '"'))
  null = re.compile(rf'((?:^|{mark}) *{quote}?)(?=\\N{quote}?(?:{mark}|[\r\n]|$))')
  return [null.sub(r'\1\\', line) if '\\N' in line else line for line in lines]


def _cut_csv(
  lines: list[str],
  last: bool,
  width: int,
  pick: Callable[[list[str]], tuple[str, ...]],
  options: dict,
) -> tuple[Table, int]:
  """Cuts lines into rows; returns them and how many lines they took."""
  try:
    table = list(csv.reader(_keep_nulls(lines, options), **options))
  except csv.Error:
    table = []
  # The fast way: a line is a row, so a row's number follows from its place.
  if (
    len(table) == len(lines)
    and set(map(len, table)) == {width}
    and _is_text(''.join(lines))
  ):
    columns = pick(list(zip(*table, strict=True)))
    return (range(len(lines)), columns, [None] * len(lines), lines), len(lines)
  rows, used = _cut_records(lines, last, width, pick, options)
  return as_table(rows), used


def as_table(rows: Sequence[Row]) -> Table:
  """Rows column by column."""
  if not rows:
    return (), (), (), ()
  offsets, values, reasons, texts = zip(*rows, strict=True)
  return offsets, list(zip(*values, strict=True)), reasons, texts


def _cut_records(lines, last, width, pick, options) -> tuple[list[Row], int]:
  """Like `_cut_csv`, one record after the other."""
  kept, rows, start = _keep_nulls(lines, options), [], 0
  while start < len(lines):  # record by record
    record = kept[start : start + _RECORD_LINES]
    fields, reason, used = _cut_record(record, width, options)
    if fields is None and not last and len(record) < _RECORD_LINES:
      break  # its end may stand in the next chunk
    text = ''.join(lines[start : start + used])
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


def open_json(path: Path, columns: Columns, lines: list[str]) -> tuple[int, Cut]:
  """Like `open_csv`; columns are the keys of the first chunk's objects."""
  if not ''.join(lines).strip():
    raise InputError(f'{path} is empty: give data.events a log with rows')
  _check_keys(path, columns, (_parse_json(line)[0] for line in lines))
  return 0, functools.partial(
    _cut_json, columns=[column for column in columns if column is not None]
  )


def json_stream(path: Path, file: TextIO, columns: Columns) -> Iterator[Row]:
  """Yields rows of arrays, or of objects of many lines; offsets are counts."""
  used = [column for column in columns if column is not None]
  values = _json_values(path, file)
  first = list(itertools.islice(values, _FIRST))
  _check_keys(path, columns, (value for value, _ in first))
  for count, (value, text) in enumerate(itertools.chain(first, values)):
    row = value if isinstance(value, dict) else None
    picked, reason = _pick(row, used)
    yield count, picked, 'not a JSON object' if row is None else reason, mend(text)


def _json_values(path: Path, file: TextIO) -> Iterator[tuple[object, str]]:
  """Yields the objects of a file, and what its arrays hold, each with its text."""
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
    if found is None or (more and found[1] == len(buffer)):
      if more:
        block = file.read(_BLOCK)
        buffer, at, more = buffer[at:] + block, 0, bool(block)
        continue
      if fault:
        raise InputError(
          f'{path} breaks off or is no JSON after {count} objects: {fault}'
        )
      if not count:
        raise InputError(f'{path} is empty: give data.events a log with rows')
      return
    value, end = found
    yield value, buffer[at:end]
    at, count = end, count + 1


def _cut_json(lines: list[str], last: bool, columns: list[str]) -> tuple[Table, int]:
  """Like `_cut_csv`; a line is a row."""
  del last
  rows = []
  for offset, line in enumerate(lines):
    if not line.strip():
      continue
    row, reason = _parse_json(line)
    values, fault = _pick(row, columns)
    rows.append((offset, values, reason or fault, mend(line)))
  return as_table(rows), len(lines)


def _pick(row: dict | None, columns: list[str]) -> tuple[list[str | None], str | None]:
  """The values of columns, as texts, and why they are none."""
  values, reason = [], None
  for column in columns:
    found = _find(row, column) if row else []
    value = found[-1] if found else None
    if len(found) > 1:
      reason = reason or f'two keys {column!r}'
    if isinstance(value, dict | list):
      kind = 'an object' if isinstance(value, dict) else 'an array'
      value, reason = None, reason or (f'{column} is {kind}, not a text or a number')
    values.append(_as_text(value))
  if not _is_text(''.join(filter(None, values))):
    return [None] * len(columns), 'not UTF-8 text'
  return values, reason


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


def _check_keys(path: Path, columns: Columns, objects: Iterable[object]) -> None:
  """Like `check_columns`, of the keys of a log's first objects."""
  deep = max(3, *(column.count('.') for column in columns if column is not None))
  paths = {}
  for row in objects:
    if isinstance(row, dict):
      paths |= dict.fromkeys(_paths(row, deep))
  if paths:  # else every row is malformed, and is reported as such
    check_columns(path, columns, list(map('.'.join, paths)))


def _paths(
  row: dict, deep: int, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
  """Yields the keys of an object and the paths to those inside."""
  for key, value in row.items():
    yield (*prefix, key)
    if isinstance(value, dict) and len(prefix) < deep:
      yield from _paths(value, deep, (*prefix, key))


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


def _parse_json(line: str) -> tuple[dict | None, str | None]:
  """The object of a line and None, or None and the reason."""
  try:
    row = _DECODER.decode(line)
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
