"""Columns and names on disk, of any length: written in pieces, then mapped.

A column is one .npy file and not several, so that a mapped file is one array,
without a copy. Names are Arrow, one record batch for each piece.
"""

import collections.abc
import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import duckdb
import numpy as np
import pyarrow as pa

DTYPES = {
  'user': '<i4',
  'time': '<i8',
  'behavior': '<i4',
  'place': '<i4',
  'split': '<i1',
  'first': '<i8',
}
_BATCH = 1 << 16  # Names at a time.
_HEADER = 128  # Bytes of a .npy file before its data.


class Writer:
  """Writes columns of one length piece by piece; a context manager."""

  def __init__(self, folder: Path, names: Iterable[str]):
    self._paths = {name: folder / f'{name}.npy' for name in names}
    self._size = 0

  def __enter__(self) -> Self:
    with contextlib.ExitStack() as stack:
      self._files = {
        name: stack.enter_context(open(path, 'wb'))
        for name, path in self._paths.items()
      }
      for file in self._files.values():
        file.write(bytes(_HEADER))  # Until the length is known.
      self._stack = stack.pop_all()
    return self

  def add(self, **values: np.ndarray) -> dict[str, np.ndarray]:
    """Appends an array to every column; returns them as they are written."""
    assert values.keys() == self._files.keys(), sorted(values)
    values = {
      name: np.ascontiguousarray(value, DTYPES[name]) for name, value in values.items()
    }
    (size,) = {len(value) for value in values.values()}  # One length, or it fails.
    for name, value in values.items():
      self._files[name].write(value)
    self._size += size
    return values

  def __exit__(self, *error: object) -> None:
    with self._stack:  # Closes the files, whatever happens here.
      for name, file in self._files.items():
        file.seek(0)  # Over the zeros that `__enter__` left.
        np.lib.format.write_array_header_1_0(
          file, {'descr': DTYPES[name], 'fortran_order': False, 'shape': (self._size,)}
        )
        assert file.tell() == _HEADER, file.tell()


def read_column(folder: Path, name: str) -> np.ndarray:
  """Maps a column; nothing of it is read before it is looked at."""
  return np.asarray(np.load(folder / f'{name}.npy', mmap_mode='r'))


class MappedNames(collections.abc.Sequence):
  """Mapped names, each read when it is asked for."""

  def __init__(self, path: Path):
    self._column = read_table(path)['name']

  def __len__(self) -> int:
    return len(self._column)

  def __getitem__(self, index: int) -> str:
    return self._column[int(index)].as_py()


def number_names(con: duckdb.DuckDBPyConnection, table: str, query: str) -> None:
  """Makes `table` (id, name): distinct names of a query in code point order."""
  # DuckDB orders VARCHAR by bytes, which in UTF-8 is the order of code points: the
  # same numbers on every machine.
  con.execute(
    f'CREATE TABLE {table} AS SELECT '
    '(row_number() OVER (ORDER BY name) - 1)::INT AS id, name '
    f'FROM (SELECT DISTINCT name FROM ({query}) WHERE name IS NOT NULL)'
  )


def write_table(path: Path, relation: duckdb.DuckDBPyRelation) -> None:
  """Writes what a DuckDB relation yields, one batch after the other."""
  reader = relation.to_arrow_reader(_BATCH)
  with pa.ipc.new_file(str(path), reader.schema) as writer:
    for batch in reader:
      writer.write_batch(batch)


def write_names(con: duckdb.DuckDBPyConnection, folder: Path, table: str) -> None:
  """Writes the names of a table of `number_names`, in the order of their numbers."""
  names = con.sql(f'SELECT name FROM {table} ORDER BY id')
  write_table(folder / f'{table}.arrow', names)


def read_table(path: Path) -> pa.Table:
  """Maps what `write_table` wrote."""
  return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
