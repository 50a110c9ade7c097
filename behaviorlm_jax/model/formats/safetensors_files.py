"""Tensors of a Hugging Face folder: found, checked, read slice by slice.

Headers are checked against the sizes of their files and the shapes of the model
before any tensor is read, so a truncated or foreign file is refused at once.
"""

import dataclasses
import json
import math
import struct
from pathlib import Path

import numpy as np
import safetensors

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import families

_FIELD = 'model.address'
_WEIGHTS = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_DTYPES = {'F64': 8, 'F32': 4, 'F16': 2, 'BF16': 2}  # bytes per element

# Hugging Face tensors that carry nothing: recomputed, or the tied head again.
_IGNORED = ('rotary_emb.inv_freq', 'lm_head.weight')


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where a tensor lies, from the header of its file."""

  file: Path
  dtype: str
  shape: tuple[int, ...]
  size: int  # bytes


class Files:
  """Slices of the tensors of a folder, by Hugging Face name."""

  def __init__(self, folder: Path, config: families.DecoderConfig):
    self.stored = stored_tensors(folder, config)
    self.open = {}

  def tensor(
    self, name: str, shape: tuple[int, ...], index: tuple[slice, ...]
  ) -> np.ndarray:
    file = self.stored[name].file
    assert self.stored[name].shape == shape, (name, shape)
    # Opened once: it is mapped, and slices are read out of it.
    if file not in self.open:
      try:
        self.open[file] = safetensors.safe_open(file, 'np')
      except safetensors.SafetensorError as error:
        raise InputError(
          f'{_FIELD}: {file} is corrupt ({error}); fetch it again.'
        ) from error
    return self.open[file].get_slice(name)[index]


def stored_tensors(folder: Path, config: families.DecoderConfig) -> dict[str, Stored]:
  """Every tensor of `config` in the folder; no byte of the data is read.

  Raises:
    InputError: one is missing, too much, of another shape or an unsupported
      type, or a file does not fit its header.
  """
  stored = _stored(folder)
  _check_shapes(config, stored, folder)
  return stored


def read_json_object(path: Path) -> dict:
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise InputError(
      f'{_FIELD}: {path} is not JSON ({error}); fetch it again.'
    ) from error
  if not isinstance(content, dict):
    raise InputError(
      f'{_FIELD}: {path} holds {type(content).__name__}, not an object; fetch it again.'
    )
  return content


def _stored(folder: Path) -> dict[str, Stored]:
  """Every tensor of the folder, from headers that fit their files."""
  if (folder / _WEIGHTS).is_file():
    return _read_header(folder / _WEIGHTS)
  if not (folder / _INDEX).is_file():
    raise InputError(
      f'{_FIELD}: the folder {folder} has neither {_WEIGHTS} nor {_INDEX}; '
      'give a folder with safetensors weights.'
    )
  places = read_json_object(folder / _INDEX).get('weight_map')
  if not isinstance(places, dict) or not all(
    isinstance(name, str) for name in places.values()
  ):
    raise InputError(
      f'{_FIELD}: {folder / _INDEX} has no weight_map of tensors to files; '
      'fetch it again.'
    )
  files = {name: folder / name for name in sorted(set(places.values()))}
  for name, file in files.items():
    if not file.is_file():
      raise InputError(
        f'{_FIELD}: {folder / _INDEX} names {name}, which does not exist; '
        'fetch that file too.'
      )
  headers = {name: _read_header(file) for name, file in files.items()}
  for tensor, name in places.items():
    if tensor not in headers[name]:
      raise InputError(
        f'{_FIELD}: {folder / _INDEX} says that {tensor} is in {name}, which '
        'does not hold it; fetch both files again.'
      )
  return {tensor: headers[name][tensor] for tensor, name in places.items()}


def _read_header(file: Path) -> dict[str, Stored]:
  """Parses a safetensors header; checks that header and data fit the file."""
  size = file.stat().st_size
  with open(file, 'rb') as stream:
    # 8 bytes say how long the JSON header is; data follow, and offsets count
    # from there.
    prefix = stream.read(8)
    length = struct.unpack('<Q', prefix)[0] if len(prefix) == 8 else 0
    if not 0 < length <= size - 8:
      raise InputError(
        f'{_FIELD}: {file} is corrupt: its header should take {length} bytes '
        f'of a file of {size}; fetch it again.'
      )
    text = stream.read(length)
  try:
    header = json.loads(text)
    header.pop('__metadata__', None)
    stored, end = {}, 0
    for name, item in header.items():
      first, last = item['data_offsets']
      shape = tuple(item['shape'])
      stored[name] = Stored(file, item['dtype'], shape, last - first)
      end = max(end, last)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(
      f'{_FIELD}: {file} is corrupt: its header is not that of a safetensors '
      f'file ({type(error).__name__}: {error}); fetch it again.'
    ) from error
  needed = 8 + length + end
  # No less, and no more: the format allows no bytes behind the data.
  if needed != size:
    raise InputError(
      f'{_FIELD}: {file} is corrupt or truncated: it has {size} bytes but its '
      f'header describes {needed}; fetch it again.'
    )
  return stored


def _check_shapes(
  config: families.DecoderConfig, stored: dict[str, Stored], folder: Path
) -> None:
  """Every tensor of the family in its shape, and none that we would drop."""
  expected = set()
  for name, shape in families.hf_shapes(config):
    expected.add(name)
    found = stored.get(name)
    if found is None or found.shape != shape:
      raise InputError(
        f'{_FIELD}: {folder} has {found.shape if found else "no tensor"} '
        f'where {name} of shape {shape} is needed by its config.json; use '
        'weights and config of the same model.'
      )
    if found.dtype not in _DTYPES:
      raise InputError(
        f'{_FIELD}: {name} in {found.file} has type {found.dtype}; supported '
        f'are {", ".join(_DTYPES)}.'
      )
    needed = math.prod(shape) * _DTYPES[found.dtype]
    if found.size != needed:
      raise InputError(
        f'{_FIELD}: {name} takes {found.size} bytes of {found.file} where '
        f'its shape {shape} needs {needed}; fetch the file again.'
      )
  for name in stored.keys() - expected:
    # lm_head.weight is ignored only where tied: else it was expected.
    if not name.endswith(_IGNORED):
      raise InputError(
        f'{_FIELD}: {stored[name].file} holds {name}, which is not part of a '
        'Llama decoder; choose another model.'
      )
