"""Tensors of a Hugging Face folder: found, checked, read slice by slice.

A file's header is checked against its size, and against the shapes of the model,
before any tensor is read, so a truncated or foreign file is refused at once.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import families

_FIELD = 'model.address'
_WEIGHTS = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_DTYPES = ('F64', 'F32', 'F16', 'BF16')

# Hugging Face tensors that carry nothing: recomputed, or the tied head again.
_IGNORED = ('rotary_emb.inv_freq', 'lm_head.weight')


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in its file, which is mapped: `data[index]` reads a slice of it."""

  file: Path
  data: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.data.get_shape())


def stored_tensors(folder: Path, config: families.DecoderConfig) -> dict[str, Stored]:
  """Every tensor of `config` in the folder; no byte of the data is read.

  Raises InputError where one is missing, too much, of another shape or of an
  unsupported type, or where a file does not fit its header.
  """
  if (folder / _WEIGHTS).is_file():
    stored = _tensors_of(folder / _WEIGHTS)
  elif (folder / _INDEX).is_file():
    stored = _indexed(folder)
  else:
    raise InputError(
      f'{_FIELD}: the folder {folder} has neither {_WEIGHTS} nor {_INDEX}; '
      'give a folder with safetensors weights.'
    )
  _check_tensors(config, stored, folder)
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


def _indexed(folder: Path) -> dict[str, Stored]:
  """Every tensor that the index names, from the file where it says it is."""
  index = folder / _INDEX
  places = read_json_object(index).get('weight_map')
  if not isinstance(places, dict) or not all(
    isinstance(name, str) for name in places.values()
  ):
    raise InputError(
      f'{_FIELD}: {index} has no weight_map of tensors to files; fetch it again.'
    )
  held = {}
  for name in sorted(set(places.values())):
    if not (folder / name).is_file():
      raise InputError(
        f'{_FIELD}: {index} names {name}, which does not exist; fetch that file too.'
      )
    held[name] = _tensors_of(folder / name)
  for tensor, name in places.items():
    if tensor not in held[name]:
      raise InputError(
        f'{_FIELD}: {index} says that {tensor} is in {name}, which does not hold '
        'it; fetch both files again.'
      )
  return {tensor: held[name][tensor] for tensor, name in places.items()}


def _tensors_of(file: Path) -> dict[str, Stored]:
  try:
    # It checks that header and file fit, and outlives the block as a mapping.
    with safetensors.safe_open(file, 'np') as opened:
      names = opened.keys()
      return {name: Stored(file, opened.get_slice(name)) for name in names}
  except safetensors.SafetensorError as error:
    raise InputError(
      f'{_FIELD}: {file} is corrupt or truncated at {file.stat().st_size} bytes '
      f'({error}); fetch it again.'
    ) from error


def _check_tensors(
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
    dtype = found.data.get_dtype()
    if dtype not in _DTYPES:
      raise InputError(
        f'{_FIELD}: {name} in {found.file} has type {dtype}; supported are '
        f'{", ".join(_DTYPES)}.'
      )
  for name in stored.keys() - expected:
    # lm_head.weight is ignored only where tied: else it was expected.
    if not name.endswith(_IGNORED):
      raise InputError(
        f'{_FIELD}: {stored[name].file} holds {name}, which is not part of a '
        'Llama decoder; choose another model.'
      )
