"""The header of a GGUF file, and whether the file is as long as it says.

A file is measured against its own header before anything is read, since the
reader of the `gguf` package fails on truncated files with numpy's errors.
"""

import math
import mmap
import struct
from pathlib import Path

import gguf

from behaviorlm_jax.errors import InputError

# Sizes in bytes of GGUF's scalar types; 8 is a string and 9 an array.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def check_complete(path: Path) -> None:
  """Refuses a file that is no GGUF, or shorter than its header says."""
  size = path.stat().st_size
  with open(path, 'rb') as file:
    if file.read(4) != b'GGUF':
      raise corrupt(path, "it does not begin with 'GGUF'")
    # Mapped: no more is read than the header's pages.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      try:
        needed = _end_of_tensors(_Header(data), path)
      except struct.error as error:
        reason = f'its header goes beyond its {size} bytes: {error}'
        raise corrupt(path, reason) from error
  if needed > size:
    raise InputError(
      f'model.address: {path} is truncated: it has {size} bytes but its '
      f'header needs {needed}; fetch it again.'
    )


def corrupt(path: Path, reason: object) -> InputError:
  return InputError(
    f'model.address: {path} is not a readable GGUF file ({reason}); fetch it again.'
  )


def unsupported(path: Path, name: str, kind: str) -> InputError:
  return InputError(
    f'model.address: the tensor {name} of {path} has the unsupported '
    f'quantisation {kind}; choose another file, such as Q8_0 or Q4_K_M.'
  )


def under(fields: dict, prefix: str) -> dict:
  """The metadata whose keys begin with `prefix`, by the rest of the key."""
  return {
    key.removeprefix(prefix): value
    for key, value in fields.items()
    if key.startswith(prefix)
  }


class _Header:
  """A cursor over the bytes of a GGUF header; `struct.error` at their end."""

  def __init__(self, data: mmap.mmap):
    self.data = data
    self.at = 0

  def take(self, form: str) -> int:
    # Little-endian. A big-endian file shows in its version, which then is none
    # that is known.
    (value,) = struct.unpack_from('<' + form, self.data, self.at)
    self.at += struct.calcsize('<' + form)
    return value

  def string(self) -> bytes:
    # Of 64 bits since version 2; version 1 is refused.
    length = self.take('Q')
    self._advance(length)
    return self.data[self.at - length : self.at]

  def _advance(self, length: int) -> None:
    # A slice would come back short, without a word.
    if length > len(self.data) - self.at:
      raise struct.error(f'{length} bytes are needed at {self.at}')
    self.at += length

  def value(self) -> int | None:
    """Skips one typed value; returns it when it is a 32-bit count."""
    kind = self.take('I')
    if kind == 4:
      return self.take('I')
    self._skip(kind)
    return None

  def _skip(self, kind: int) -> None:
    if kind in _SCALARS:
      self._advance(_SCALARS[kind])
    elif kind == 8:
      self.string()
    elif kind == 9:
      item, count = self.take('I'), self.take('Q')
      # At once: an array may hold a number for each token.
      if item in _SCALARS:
        self._advance(_SCALARS[item] * count)
        return
      for _ in range(count):
        self._skip(item)
    else:
      raise struct.error(f'unknown value type {kind}')


def _end_of_tensors(header: _Header, path: Path) -> int:
  """Reads the header up to its end; returns where the last tensor ends."""
  header.at = 4  # Behind the letters 'GGUF'.
  version = header.take('I')
  if version not in (2, 3):
    raise corrupt(path, f'version {version}, where 2 and 3 are supported')
  tensors, values = header.take('Q'), header.take('Q')
  alignment = gguf.GGUF_DEFAULT_ALIGNMENT
  for _ in range(values):
    key, value = header.string(), header.value()
    if key == b'general.alignment' and value:
      alignment = value
  end = 0
  for _ in range(tensors):
    name = header.string()
    shape = [header.take('Q') for _ in range(header.take('I'))]
    kind, offset = header.take('I'), header.take('Q')
    # Tensors may stand in any order.
    end = max(end, offset + _n_bytes(shape, kind, name, path))
  # Offsets count from the next multiple of the alignment after the header.
  start = math.ceil(header.at / alignment) * alignment
  return start + end


def _n_bytes(shape: list[int], kind: int, name: bytes, path: Path) -> int:
  try:
    # Quantised types pack blocks of numbers, with their scales, into so many
    # bytes.
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
  except ValueError as error:
    raise unsupported(path, repr(name)[2:-1], f'type {kind}') from error
  return math.prod(shape) // block * size
