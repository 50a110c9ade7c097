"""Files that appear whole or not at all: written beside, then renamed."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
  """Yields a temporary path that takes the place of `path` at the end."""
  # In the same folder: a rename is atomic only inside of one file system.
  temporary = path.with_name(path.name + '.tmp')
  yield temporary
  temporary.replace(path)  # Not reached by a failure: the old file stays.


def write_text(path: Path, text: str) -> None:
  with whole(path) as temporary:
    temporary.write_text(text, encoding='utf-8')


def write_json(path: Path, value: object) -> None:
  write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n')


def write_parquet(
  path: Path, table: pa.Table, facts: dict[str, str] | None = None
) -> None:
  """Writes an Arrow table; `facts` {str: str} become its metadata."""
  if facts is not None:
    table = table.replace_schema_metadata(facts)
  with whole(path) as temporary:
    parquet.write_table(table, temporary)
