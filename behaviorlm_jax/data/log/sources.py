"""The files of a log: where they lie, and how their bytes become text.

`data.events` is one address or several with commas between them: a file, a
folder of parts, a glob. Parts are read in the order of their paths. How a file
is compressed, encoded and laid out is told by what it begins with, not by its
name.
"""

import bz2
import codecs
import dataclasses
import functools
import glob
import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import pyarrow as pa

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import addresses

FIELDS = ('user', 'time', 'behavior', 'place', 'group')
_REQUIRED = FIELDS[:3]
_FIELD = 'data.events'
_LINE_BITS = 40  # of a row's number; above them stands the number of its file
_PEEK = 1 << 16  # bytes
_SAVE = 'save the log as CSV, JSON lines or Parquet'
# What is no log, by its first bytes (decompressed), and what helps.
_OTHERS = {
  b'PK\x03\x04': f'a zip archive or a spreadsheet; {_SAVE}',
  b'ARROW1': f'an Arrow file; {_SAVE}',
  b'Obj\x01': f'an Avro file; {_SAVE}',
  b'SQLite format 3': f'an SQLite database; {_SAVE}',
  b'\xd0\xcf\x11\xe0': f'a spreadsheet; {_SAVE}',
  b'%PDF': f'a PDF; {_SAVE}',
  b'\x89HDF': f'an HDF5 file; {_SAVE}',
  b'\x80\x04': f'a Python pickle; {_SAVE}',
  b'\x80\x05': f'a Python pickle; {_SAVE}',
  b'\x04"M\x18': 'compressed with lz4; decompress it',
  b'\x02!L\x18': 'compressed with lz4; decompress it',
  b'\xff\x06\0\0sNaPpY': 'compressed with snappy; decompress it',
  b'\x1f\x9d': 'compressed with compress; decompress it',
  b"7z\xbc\xaf'\x1c": 'a 7z archive; decompress it',
  b'Rar!\x1a': 'a RAR archive; decompress it',
  b'PAR1': 'a compressed Parquet file; decompress it',
  # One layer is taken off already.
  b'\x1f\x8b': 'compressed twice; decompress it',
  b'\x28\xb5\x2f\xfd': 'compressed twice; decompress it',
}
_COMPRESSIONS = {
  b'\x1f\x8b': (' in gzip', gzip.open),
  b'\x28\xb5\x2f\xfd': (
    ' in zstd',
    lambda path: pa.CompressedInputStream(pa.OSFile(str(path)), 'zstd'),
  ),
  b'BZh': (' in bzip2', bz2.open),
  b'\xfd7zXZ\0': (' in xz', lzma.open),
  b'': ('', functools.partial(open, mode='rb')),  # All that begins otherwise.
}
# What a file that breaks off, or whose bytes are broken, raises.
BROKEN = (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError, pa.ArrowInvalid)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What decides how a log is read and split, of the config's section `data`."""

  columns: dict[str, str]  # {field: column}, of those of FIELDS that have one
  csv: Mapping[str, str]
  time_format: str
  time_zone: str
  nulls: Sequence[object]
  collapse_repeats: bool
  max_rejected: float
  split: Sequence[float]
  anchor_share: float

  @classmethod
  def of(cls, data: Mapping[str, Any]) -> Self:
    values = {field.name: data[field.name] for field in dataclasses.fields(cls)}
    columns = {
      field: data['columns'][field] or field
      for field in FIELDS
      if data['columns'][field] or field in _REQUIRED
    }
    return cls(**values | {'columns': columns})


@dataclasses.dataclass(frozen=True)
class Log:
  """The files of a log, in the order in which they are read."""

  name: str  # as data.events has it
  files: tuple[Path, ...]
  settings: Settings

  def first_line(self, file: int) -> int:
    """What the lines of a file are counted from, where its first one is 0."""
    return file << _LINE_BITS

  def _find(self, line: int) -> tuple[Path, int]:
    file, line = divmod(line, 1 << _LINE_BITS)
    return self.files[file], line

  def at(self, line: int) -> str:
    """'log.csv line 7' of a row's number."""
    file, line = self._find(line)
    return f'{file} line {line}'

  def place(self, line: int) -> tuple[str, int]:
    """The file, below what all have in common, and the line in it."""
    file, line = self._find(line)
    root = os.path.commonpath([file.parent for file in self.files])
    return os.path.relpath(file, root), line

  def sha256(self) -> str:
    """Of the file; of several, of their names and digests."""
    if len(self.files) == 1:
      return addresses.sha256(self.files[0])
    digest = hashlib.sha256()
    # Names without folders: the log may have been moved as a whole.
    for file in self.files:
      digest.update(f'{file.name}\0{addresses.sha256(file)}\n'.encode())
    return digest.hexdigest()


def open_log(place: str | Path, data: Mapping[str, Any]) -> Log:
  """The log at `place`, to be read as the config's section `data` says."""
  name = str(place)
  if not name.strip():
    raise InputError(
      f'{_FIELD} is empty; give --config.{_FIELD}=LOG: a file, a folder of '
      'parts, a glob, or several of them with commas between.'
    )
  found = _find(name)
  if found is None:  # Not one path: a list.
    parts = [part.strip() for part in name.split(',') if part.strip()]
    found = [
      path
      for part in parts
      for path in _find(part) or _parts(addresses.resolve(part, _FIELD))
    ]
  # Writers such as Spark leave empty parts, which have no header to read.
  full = [path for path in found if path.stat().st_size]
  twice = [path for i, path in enumerate(full) if path in full[:i]]
  if twice:
    raise InputError(f'{_FIELD}: {name!r} names {twice[0]} twice; name every file once')
  if not found:
    raise InputError(
      f'{_FIELD}: {name!r} holds no files (names that begin with . or _ do not '
      'count); give a log'
    )
  # An empty one is refused by name.
  return Log(name, tuple(full or found[:1]), Settings.of(data))


def _find(name: str) -> list[Path] | None:
  """Paths of a local file, folder or glob; None: nothing of this name."""
  if '://' in name:
    return None
  path = Path(name).expanduser()
  if path.exists():  # Before it is a glob or a list: names may hold [, * or commas.
    return _parts(path)
  if not any(c in name for c in '*?['):
    return None
  # As in a folder, what writers leave beside the parts does not count.
  hidden = path.name.startswith('_')
  return [
    part
    for match in sorted(glob.glob(str(path), recursive=True))
    if hidden or not os.path.basename(match).startswith('_')
    for part in _parts(Path(match))
  ] or None


def _parts(path: Path) -> list[Path]:
  """The file, or those below a folder but for what writers leave beside."""
  if path.is_dir():
    return [
      part
      for part in sorted(path.rglob('*'))
      if part.is_file()
      and not any(name.startswith(('.', '_')) for name in part.relative_to(path).parts)
    ]
  if not path.is_file():
    raise InputError(f'{path} is no file or folder: set {_FIELD}')
  return [path]


# Bytes to text.


@dataclasses.dataclass(frozen=True)
class TextFile:
  """A text file, and what its first bytes tell."""

  path: Path
  unpack: Callable[[Path], BinaryIO]
  encoding: str
  start: str  # what it begins with
  described: str  # 'UTF-8 in gzip'

  def open(self) -> io.TextIOWrapper:
    """A text file; bytes that are no text become surrogates."""
    # Surrogates and not an error: one bad byte is one malformed row.
    # UTF-16 has no escapes, and lets lone surrogates pass.
    wide = self.encoding.startswith('utf-16')
    errors = 'surrogatepass' if wide else 'surrogateescape'
    # newline='': line ends inside of quotes stay what they are, as csv needs.
    return io.TextIOWrapper(self.unpack(self.path), self.encoding, errors, newline='')


def is_parquet(path: Path) -> bool:
  """Whether a file is Parquet; refuses one that is by its name alone."""
  with open(path, 'rb') as file:
    found = file.read(4) == b'PAR1'
  if not found and path.suffix.lower() == '.parquet':
    raise InputError(
      f"{path} is not a readable Parquet file: it does not begin with 'PAR1'"
    )
  return found


def open_text(path: Path) -> TextFile:
  """Looks at the first bytes of a text file; refuses what is none."""
  with open(path, 'rb') as file:
    head = file.read(16)
  packed, unpack = next(
    value for magic, value in _COMPRESSIONS.items() if head.startswith(magic)
  )
  try:
    with unpack(path) as file:
      head = file.read(_PEEK)
  except BROKEN as error:
    raise InputError(f'{path} cannot be read to its end: {error}') from error
  for magic, what in _OTHERS.items():
    if head.startswith(magic):
      raise InputError(f'{path} is {what}')
  if head[257:262] == b'ustar':
    raise InputError(f'{path} is a tar archive; unpack it')
  encoding = _encoding(head, path)
  described = ('UTF-8' if encoding == 'utf-8-sig' else 'UTF-16') + packed
  start = head.decode(encoding, 'replace').lstrip()
  return TextFile(path, unpack, encoding, start, described)


def _encoding(head: bytes, path: Path) -> str:
  if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
    raise InputError(f'{path} is UTF-32; save it as UTF-8')
  if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    return 'utf-16'
  # Without a mark: of ASCII in UTF-16 every other byte is 0.
  for encoding, zeros in (('utf-16-le', head[1:400:2]), ('utf-16-be', head[:400:2])):
    if len(zeros) > 1 and zeros.count(0) > 0.9 * len(zeros):
      return encoding
  # Text in UTF-8 has no zeros but for a damaged row or two.
  if head.count(0) > 0.01 * len(head):
    raise InputError(f'{path} is no text; {_SAVE}')
  return 'utf-8-sig'
