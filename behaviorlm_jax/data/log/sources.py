"""The files of a log: where they lie, and how their bytes become text.

`data.events` is one address or several with commas between them: a file, a
folder of parts, a glob. Parts are read in the order of their paths. How a file
is compressed, encoded and laid out is told by what it begins with, not by its
name.
"""

import bz2
import codecs
import dataclasses
import glob
import gzip
import hashlib
import io
import lzma
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import addresses

_FIELD = 'data.events'
_LINE_BITS = 40  # of a row's number; above them stands the number of its file
_PEEK = 1 << 16  # bytes
# What is no log, by its first bytes (decompressed).
_OTHERS = {
  b'PK\x03\x04': 'a zip archive or a spreadsheet',
  b'ARROW1': 'an Arrow file',
  b'Obj\x01': 'an Avro file',
  b'SQLite format 3': 'an SQLite database',
  b'\xd0\xcf\x11\xe0': 'a spreadsheet',
  b'%PDF': 'a PDF',
  b'\x89HDF': 'an HDF5 file',
  b'\x80\x04': 'a Python pickle',
  b'\x80\x05': 'a Python pickle',
}
# The same, where decompressing is all that it lacks.
_PACKED = {
  b'\x04"M\x18': 'compressed with lz4',
  b'\x02!L\x18': 'compressed with lz4',
  b'\xff\x06\0\0sNaPpY': 'compressed with snappy',
  b'\x1f\x9d': 'compressed with compress',
  b"7z\xbc\xaf'\x1c": 'a 7z archive',
  b'Rar!\x1a': 'a RAR archive',
  b'PAR1': 'a compressed Parquet file',
  # One layer is taken off already.
  b'\x1f\x8b': 'compressed twice',
  b'\x28\xb5\x2f\xfd': 'compressed twice',
}
# What a file that breaks off, or whose bytes are broken, raises.
BROKEN = (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError, pa.ArrowInvalid)


@dataclasses.dataclass(frozen=True)
class Log:
  """The files of a log, in the order in which they are read."""

  name: str  # as data.events has it
  files: tuple[Path, ...]

  def at(self, line: int) -> str:
    """'log.csv line 7' of a row's number."""
    number, line = divmod(line, 1 << _LINE_BITS)
    return f'{self.files[number]} line {line}'

  def first_line(self, file: int) -> int:
    """What the lines of a file are counted from, where its first one is 0."""
    return file << _LINE_BITS

  def place(self, line: int) -> tuple[str, int]:
    """The file, below what all have in common, and the line in it."""
    number, line = divmod(line, 1 << _LINE_BITS)
    root = os.path.commonpath([file.parent for file in self.files])
    return os.path.relpath(self.files[number], root), line

  def sha256(self) -> str:
    """Of the file; of several, of their names and digests."""
    if len(self.files) == 1:
      return addresses.sha256(self.files[0])
    digest = hashlib.sha256()
    # Names without folders: the log may have been moved as a whole.
    for file in self.files:
      digest.update(f'{file.name}\0{addresses.sha256(file)}\n'.encode())
    return digest.hexdigest()


def open_log(place: str | Path | Log) -> Log:
  """The Log at `place`: data.events, a path, or a Log already."""
  if isinstance(place, Log):
    return place
  name = str(place)
  if not name.strip():
    raise InputError(
      f'{_FIELD} is empty; give --config.{_FIELD}=LOG: a file, a folder of '
      'parts, a glob, or several of them with commas between.'
    )
  found = _find(name)
  if found is None:  # Not one path: a list.
    found = [
      path
      for part in name.split(',')
      if part.strip()
      for path in _find(part.strip()) or _resolve(part.strip())
    ]
  # Writers such as Spark leave empty parts, which have no header to read.
  full = [path for path in found if path.stat().st_size]
  twice = [path for i, path in enumerate(full) if path in full[:i]]
  if twice:
    raise InputError(f'{_FIELD}: {name!r} names {twice[0]} twice; name every file once')
  if not found:
    raise InputError(
      f'{_FIELD}: {name!r} holds no files (names that begin '
      'with . or _ do not count); give a log'
    )
  return Log(name, tuple(full or found[:1]))  # An empty one is refused by name.


def _find(name: str) -> list[Path] | None:
  """Paths of a local file, folder or glob; None: nothing of this name."""
  if '://' in name:
    return None
  path = Path(name).expanduser()
  if path.exists():  # Before it is a glob or a list: names may hold [, * or commas.
    return _parts(path)
  if any(c in name for c in '*?['):
    matches = [
      match
      for match in sorted(glob.glob(str(path), recursive=True))
      # As in a folder, what writers leave beside the parts does not count.
      if path.name.startswith('_') or not os.path.basename(match).startswith('_')
    ]
    return [part for match in matches for part in _parts(Path(match))] or None
  return None


def _resolve(name: str) -> list[Path]:
  return _parts(addresses.resolve(name, _FIELD))


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


def _open_plain(path: Path) -> BinaryIO:
  return open(path, 'rb')


def _open_zstd(path: Path) -> pa.NativeFile:
  return pa.CompressedInputStream(pa.OSFile(str(path)), 'zstd')


_COMPRESSIONS = {
  b'\x1f\x8b': ('gzip', gzip.open),
  b'\x28\xb5\x2f\xfd': ('zstd', _open_zstd),
  b'BZh': ('bzip2', bz2.open),
  b'\xfd7zXZ\0': ('xz', lzma.open),
}


@dataclasses.dataclass(frozen=True)
class TextFile:
  """A text file: how it is compressed and encoded."""

  path: Path
  compression: str  # '' or the name of one
  encoding: str
  start: str  # what it begins with

  def open(self) -> io.TextIOWrapper:
    """A text file; bytes that are no text become surrogates."""
    opener = dict(_COMPRESSIONS.values()).get(self.compression, _open_plain)
    raw = opener(self.path)
    # Surrogates and not an error: one bad byte is one malformed row.
    # UTF-16 has no escapes, and lets lone surrogates pass.
    errors = (
      'surrogatepass' if self.encoding.startswith('utf-16') else 'surrogateescape'
    )
    # newline='': line ends inside of quotes stay what they are, as csv needs.
    return io.TextIOWrapper(raw, self.encoding, errors, newline='')

  @property
  def described(self) -> str:
    names = {
      'utf-8-sig': 'UTF-8',
      'utf-16': 'UTF-16',
      'utf-16-le': 'UTF-16',
      'utf-16-be': 'UTF-16',
    }
    return names[self.encoding] + (
      f' in {self.compression}' if self.compression else ''
    )


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
  compression, opener = next(
    (value for magic, value in _COMPRESSIONS.items() if head.startswith(magic)),
    ('', _open_plain),
  )
  try:
    with opener(path) as file:
      head = file.read(_PEEK)
  except BROKEN as error:
    raise InputError(f'{path} cannot be read to its end: {error}') from error
  for magic, what in _OTHERS.items():
    if head.startswith(magic):
      raise InputError(f'{path} is {what}; save the log as CSV, JSON lines or Parquet')
  for magic, what in _PACKED.items():
    if head.startswith(magic):
      raise InputError(f'{path} is {what}; decompress it')
  if head[257:262] == b'ustar':
    raise InputError(f'{path} is a tar archive; unpack it')
  encoding = _encoding(head, path)
  start = head.decode(encoding, 'replace').lstrip()
  return TextFile(path, compression, encoding, start)


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
    raise InputError(f'{path} is no text; save the log as CSV, JSON lines or Parquet')
  return 'utf-8-sig'
