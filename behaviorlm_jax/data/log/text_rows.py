"""What rows cut from text have in common, be it CSV or JSON.

A malformed row carries a reason and never stops the reading.
"""

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from behaviorlm_jax.data.log.sources import FIELDS
from behaviorlm_jax.errors import InputError

LINES = 8192  # lines cut at a time; a bad one sends them all the slow way
# Line, values of the mapped columns, reason or None, text.
Row = tuple[int, Sequence[str | None], str | None, str]


def check_columns(
  path: Path, columns: Mapping[str, str], present: Sequence[str]
) -> None:
  """Refuses a mapped column that the log lacks, or has twice."""
  for field, column in columns.items():
    count = present.count(column)
    if not count:
      near = difflib.get_close_matches(column, present, n=3, cutoff=0.4)
      shown = ', '.join(map(repr, near or present[:20]))
      raise InputError(
        f'{path} has no column {column!r}; set data.columns.{field} to one '
        f'of its columns, {"nearest" if near else "which are"}: '
        + (shown if len(shown) <= 200 else f'{shown[:197]}...')
      )
    if count > 1:
      raise InputError(
        f'{path} has {count} columns named {column!r}; '
        f'rename all but the one that data.columns.{field} means'
      )


def batch_rows(
  columns: Mapping[str, str], rows: Iterator[Row]
) -> Iterator[pa.RecordBatch]:
  """Yields rows as Arrow (line, FIELDS, reason, text)."""
  while some := list(itertools.islice(rows, LINES)):
    lines, values, reasons, texts = zip(*some, strict=True)
    yield as_batch(columns, lines, zip(*values, strict=True), reasons, texts)


def as_batch(
  columns: Mapping[str, str],
  lines: Sequence[int],
  values: Iterable[Sequence[str | None]],
  reasons: Sequence[str | None],
  texts: Sequence[str],
) -> pa.RecordBatch:
  """The same of rows that are divided by columns already."""
  nothing = pa.nulls(len(lines), pa.string())
  arrays = {'line': pa.array(lines, pa.int64())} | dict.fromkeys(FIELDS, nothing)
  mapped = zip(columns, values, strict=True)
  for name, column in (*mapped, ('reason', reasons), ('text', texts)):
    arrays[name] = pa.array(column, pa.string())
  return pa.RecordBatch.from_pydict(arrays)


def is_text(text: str) -> bool:
  """Whether a text is free of the surrogates that bad bytes became."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def mend(text: str) -> str:
  """The text as UTF-8 has it, with ? for what it cannot say."""
  return text.encode(errors='replace').decode()
