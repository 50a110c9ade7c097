"""GGUF files: whatever is damaged or short is refused."""

import struct

import numpy as np
import pytest

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import weights
from behaviorlm_jax.model.formats import gguf_import


@pytest.mark.parametrize('share', [0.0, 0.001, 0.01, 0.05, 0.2, 0.7, 0.999])
def test_a_truncated_file_is_refused_with_its_sizes(
  tmp_path, share, cache, write_gguf, tiny_llama, refused
):
  path = tmp_path / 'm.gguf'
  write_gguf(path, *tiny_llama())
  data = path.read_bytes()
  path.write_bytes(data[: int(len(data) * share)])
  refused(
    path, r'm.gguf is (truncated or damaged: it has \d+ bytes but|not a readable)'
  )
  assert not any((cache / 'models').iterdir())


def test_every_short_header_is_refused(tmp_path, write_gguf, tiny_llama):
  path = tmp_path / 'm.gguf'
  write_gguf(path, *tiny_llama())
  data = path.read_bytes()
  for length in range(0, 20000, 997):
    path.write_bytes(data[:length])
    with pytest.raises(InputError):
      gguf_import.convert(path, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_corrupt_header_is_refused(tmp_path, write_gguf, tiny_llama, refused):
  path = tmp_path / 'm.gguf'
  write_gguf(path, *tiny_llama())
  data = path.read_bytes()
  path.write_bytes(b'GGML' + data[4:])
  refused(path, 'GGUF magic invalid')
  path.write_bytes(data[:4] + struct.pack('<I', 9) + data[8:])
  refused(path, 'version 9')
  path.write_bytes(data[:8] + b'\xff' * 16 + data[24:])
  refused(path, r'it has \d+ bytes but its header needs \d+')
  path.write_bytes(data[:24] + b'\xff' * 8 + data[32:])
  refused(path, r'it has \d+ bytes but its header needs \d+')
  generator = np.random.default_rng(0)
  for _ in range(30):  # whatever is hit, never another exception
    damaged = bytearray(data)
    for place in generator.integers(4, 12000, 3):
      damaged[place] = generator.integers(256)
    path.write_bytes(damaged)
    try:
      weights.open_base(str(path))
    except InputError as error:
      assert '\n' not in str(error)
