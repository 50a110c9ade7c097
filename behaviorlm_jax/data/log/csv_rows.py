"""CSV in any dialect -> rows.

A chunk of lines without a malformed row goes the fast way, by columns; any doubt
sends it record by record.
"""

import csv
import dataclasses
import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TextIO

import numpy as np
import pyarrow as pa

from behaviorlm_jax.data.log import text_rows
from behaviorlm_jax.data.log.sources import Settings, TextFile
from behaviorlm_jax.errors import InputError

_RECORD_LINES = 256  # a stray quote may swallow no more lines than this
_DELIMITERS = (',', '\t', ';', '|', '\x01')
_TRIED = 512  # lines that choose a delimiter
# (quote, blanks before a quote, escape): of equals the first.
_QUOTINGS = tuple(itertools.product(('"', None, "'"), (False, True), (None, '\\')))
_WORDS = {'tab': '\t', '\\t': '\t', 'none': None}
_OPEN = 'broken row: unexpected end of data'  # csv's words: a quote does not end


@dataclasses.dataclass(frozen=True)
class _Dialect:
  delimiter: str
  quote: str | None
  blanks: bool  # whether blanks before a quote are passed over
  escape: str | None

  @property
  def quoting(self) -> tuple[str | None, bool, str | None]:
    return self.quote, self.blanks, self.escape

  def shows(self, text: str) -> bool:
    """Whether a text has what tells this quoting from others."""
    return (
      (self.quote in (None, '"') or self.quote in text)
      and (self.escape is None or self.escape in text)
      and (not self.blanks or (self.quote is not None and f' {self.quote}' in text))
    )

  @functools.cached_property
  def options(self) -> dict:
    """Of csv.reader."""
    return {
      'delimiter': self.delimiter,
      'quotechar': self.quote or '"',
      'quoting': csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
      # A quote that escapes itself is doubled.
      'escapechar': None if self.escape == self.quote else self.escape,
      'skipinitialspace': self.blanks,
      # A quote in the wrong place is an error, and not part of a field.
      'strict': True,
    }

  def __str__(self) -> str:
    shown = {'\t': 'tabs', '\x01': r'\x01'}
    text = f'CSV, divided by {shown.get(self.delimiter, repr(self.delimiter))}'
    if self.quote is None:
      text += ', without quotes'
    elif self.quote != '"':
      text += f', quoted by {self.quote}'
    if self.options['escapechar']:
      text += f', escaped by {self.escape}'
    return text

  def header(self, lines: list[str]) -> list[str]:
    """The names of the columns; none: the dialect does not read them."""
    try:
      return _names(next(filter(None, csv.reader(lines, **self.options)), []))
    except csv.Error:
      return []

  def keep_nulls(self, lines: list[str]) -> list[str]:
    r"""The lines with \N, which is no escape but a null, as csv.reader keeps it."""
    if self.options['escapechar'] != '\\' or not any('\\N' in line for line in lines):
      return lines
    mark, quote = re.escape(self.delimiter), re.escape(self.options['quotechar'])
    null = re.compile(rf'((?:^|{mark}) *{quote}?)(?=\\N{quote}?(?:{mark}|[\r\n]|$))')
    return [null.sub(r'\1\\', line) if '\\N' in line else line for line in lines]

  def find_wrapped(self) -> Callable[[str], re.Match | None]:
    """Finds a field that is quoted."""
    if not self.quote:
      return lambda text: None
    mark, quote = re.escape(self.delimiter), re.escape(self.quote)
    return re.compile(f'(?:^|{mark}){" *" if self.blanks else ""}{quote}').search


def _names(header: list[str]) -> list[str]:
  return [name.strip('\u200b\ufeff \t') for name in header]


def csv_batches(
  text: TextFile, file: TextIO, settings: Settings, number: int
) -> tuple[str, Iterator[pa.RecordBatch]]:
  """The dialect of a file and its rows in batches; its first line has a number."""
  path, columns = text.path, settings.columns
  lines = list(itertools.islice(file, text_rows.LINES))
  dialect = _find_dialect(columns, lines, settings.csv)
  reader = csv.reader(lines, **dialect.options)
  try:
    header = next(filter(None, reader), None)
  except csv.Error as error:
    raise InputError(
      f'{path} line {reader.line_num}: the header is broken: {error}'
    ) from error
  if header is None:
    raise InputError(f'{path} is empty: give data.events a log with a header')
  names = _names(header)
  text_rows.check_columns(path, columns, names)
  used = reader.line_num
  rest = itertools.chain(lines[used:], file)
  return str(dialect), _Rows(columns, names, dialect).read(rest, number + used)


@dataclasses.dataclass(frozen=True)
class _Rows:
  """What follows a header."""

  columns: Mapping[str, str]
  names: list[str]  # of all columns of the file
  dialect: _Dialect

  def read(self, lines: Iterator[str], number: int) -> Iterator[pa.RecordBatch]:
    waiting, more = [], True
    while more:
      chunk = list(itertools.islice(lines, text_rows.LINES))
      waiting, more = waiting + chunk, bool(chunk)
      batches, used = self._cut(waiting, number, not more)
      yield from batches
      # What a record that goes on has begun with stays for the next chunk.
      waiting, number = waiting[used:], number + used

  def _cut(
    self, lines: list[str], number: int, last: bool
  ) -> tuple[Iterable[pa.RecordBatch], int]:
    """Cuts lines into rows; returns them and how many lines they took."""
    pick = operator.itemgetter(*map(self.names.index, self.columns.values()))
    kept = self.dialect.keep_nulls(lines)
    try:
      table = list(csv.reader(kept, **self.dialect.options))
    except csv.Error:
      table = []
    # The fast way: a line is a row, so a row's number follows from its place.
    if (
      len(table) == len(lines)
      and set(map(len, table)) == {len(self.names)}
      and text_rows.is_text(''.join(lines))
    ):
      values = pick(list(zip(*table, strict=True)))
      numbers = np.arange(number, number + len(lines))
      whole = [None] * len(lines)
      batch = text_rows.as_batch(self.columns, numbers, values, whole, lines)
      return [batch], len(lines)
    records, used = _cut_records(lines, last, len(self.names), self.dialect)
    rows = (
      (number + start, pick(fields), reason, text_rows.mend(text))
      for start, fields, reason, text in records
    )
    return text_rows.batch_rows(self.columns, rows), used


def _find_dialect(
  columns: Mapping[str, str], lines: list[str], given: Mapping[str, str]
) -> _Dialect:
  """The dialect of the first lines; `given`: data.csv, of which '' is found."""
  dialects = _dialects(''.join(lines), given)
  headers = {dialect: dialect.header(lines[:_TRIED]) for dialect in dialects}
  fits = {
    dialect: sum(column in header for column in columns.values())
    for dialect, header in headers.items()
  }
  # The most mapped columns, then the most columns at all: a header that a wrong
  # delimiter cuts has few. Of equals the first one: commas and double quotes.
  best = max(dialects, key=lambda one: (fits[one], len(headers[one])))
  fitting = [
    one
    for one in dialects
    if fits[one] == fits[best] and one.delimiter == best.delimiter
  ]
  if len(fitting) == 1:
    return best
  # A header rarely tells how rows are quoted; the rows do. Rows that a quote wraps
  # speak for it, malformed ones against, but never for one that wraps fewer; of
  # those that read all, what reads most rows wins.
  chosen, most, top = fitting[0], -1, (-math.inf, 0)
  for dialect in fitting:
    wrapped, score = _weigh(lines, dialect)
    if wrapped >= most and score > top:
      chosen, most, top = dialect, wrapped, score
  return chosen


def _dialects(text: str, given: Mapping[str, str]) -> list[_Dialect]:
  """Those that a text may be written in, the likeliest first."""
  words = {field: _character(given, field) for field in given if given[field]}
  delimiters = [words['delimiter']] if 'delimiter' in words else _DELIMITERS
  quotings = dict.fromkeys(
    (words.get('quote', quote), blanks, words.get('escape', escape))
    for quote, blanks, escape in _QUOTINGS
  )
  dialects = [
    _Dialect(delimiter, *quoting)
    for quoting in quotings
    for delimiter in delimiters
    if delimiter not in (quoting[0], quoting[2])
  ]
  if not dialects:
    raise InputError(
      'data.csv.delimiter is also the quote or the escape; give different characters'
    )
  first = dialects[0].quoting
  return [one for one in dialects if one.quoting == first or one.shows(text)]


def _character(given: Mapping[str, str], field: str) -> str | None:
  """What a field of data.csv means; refuses what is no character."""
  value = _WORDS.get(given[field], given[field])
  if value is None and field != 'delimiter':
    return None
  if value is None or len(value) != 1 or value in '\r\n':
    none = ' or tab' if field == 'delimiter' else ', tab, or none'
    raise InputError(f'data.csv.{field} is {given[field]!r}; give a character{none}')
  return value


def _weigh(lines: list[str], dialect: _Dialect) -> tuple[int, tuple[int, int]]:
  """How many rows have quoted fields in a dialect, and how well it reads all."""
  rows, _ = _cut_records(lines, True, len(dialect.header(lines)), dialect)
  count = len(rows)
  for i, (start, _, reason, _) in enumerate(rows):
    # It may be whole in the file: then no rows follow it here, but what it holds.
    if reason == _OPEN and start + _RECORD_LINES > len(lines):
      if sum(reason is not None for _, _, reason, _ in rows[i:]) * 2 > count - i:
        rows = rows[:i]
      break
  sound = [text for _, _, reason, text in rows if reason is None]
  malformed, find = len(rows) - len(sound), dialect.find_wrapped()
  # One that goes on in the next line may be two stray quotes.
  wrapped = sum(bool(find(text)) and '\n' not in text.strip() for text in sound)
  return wrapped, (wrapped - malformed, 0 if malformed else count)


def _cut_records(
  lines: list[str], last: bool, width: int, dialect: _Dialect
) -> tuple[list[tuple[int, list[str], str | None, str]], int]:
  """Records (line from 0, fields, reason, text) one by one, and lines used."""
  kept, records, start = dialect.keep_nulls(lines), [], 0
  while start < len(lines):
    record = kept[start : start + _RECORD_LINES]
    fields, reason, used = _cut_record(record, width, dialect)
    if fields is None and not last and len(record) < _RECORD_LINES:
      break  # Its end may stand in the next chunk.
    text = ''.join(lines[start : start + used])
    if text.strip():
      records.append((start, [''] * width if reason else fields, reason, text))
    start += used
  return records, start


def _cut_record(
  lines: list[str], width: int, dialect: _Dialect
) -> tuple[list[str] | None, str | None, int]:
  """The first record of `lines`: fields, why it is malformed, lines used."""
  reader = csv.reader(lines, **dialect.options)
  try:
    fields = next(reader)
  except csv.Error as error:
    # One line: those that a stray quote has swallowed are tried again.
    return None, f'broken row: {error}', 1
  reason = None
  if len(fields) != width:
    reason = f'{len(fields)} fields instead of {width}'
  elif not text_rows.is_text(''.join(fields)):
    reason = 'not UTF-8 text'
  return fields, reason, reader.line_num
