"""A GGUF file as the `gguf` package reads it, but whole or not at all."""

from pathlib import Path

import gguf
import numpy as np

from behaviorlm_jax.errors import InputError


def read(path: Path) -> tuple[dict, dict[str, gguf.ReaderTensor]]:
  """Metadata by key, and tensors by name, whose data stay on disk.

  Raises InputError where the file is no GGUF, damaged or truncated.
  """
  try:
    reader = _Reader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
  except EOFError as error:
    raise InputError(
      f'model.address: {path} is truncated or damaged: {error}; fetch it again.'
    ) from error
  except (ValueError, IndexError, KeyError) as error:
    raise corrupt(path, error) from error
  # The package would read it, but not unpack its quantised types.
  if reader.byte_order == 'S':
    raise corrupt(path, 'its bytes are in big-endian order')
  return fields, {tensor.name: tensor for tensor in reader.tensors}


def corrupt(path: Path, reason: object) -> InputError:
  return InputError(
    f'model.address: {path} is not a readable GGUF file ({reason}); fetch it '
    'again or choose another.'
  )


class _Reader(gguf.GGUFReader):
  """Raises EOFError where a slice of the file would come back short."""

  def _get(self, offset, dtype, count=1, **order):
    # In Python's numbers: damaged ones overflow numpy's.
    needed = int(offset) + np.dtype(dtype).itemsize * int(count)
    if needed > self.data.size:
      raise EOFError(
        f'it has {self.data.size} bytes but its header needs {needed} or more'
      )
    return super()._get(offset, dtype, count, **order)
