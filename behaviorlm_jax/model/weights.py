"""A base model in: address -> dimensions, tokenizer and stacked parameters.

Whatever the address names ends as one Hugging Face folder (or as seeded random
draws), so there is one way of reading: tensor by tensor, slice by slice,
checked against the table of shapes, straight to where the caller places it. No
more of a file is read than the slices that are asked for.
"""

import dataclasses
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
from absl import logging
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import addresses
from behaviorlm_jax.model import families
from behaviorlm_jax.model.formats import gguf_import, safetensors_files

_FIELD = 'model.address'
_DESCRIPTIONS = (
  'config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'chat_template.jinja',
)
_CONVERTER = 1  # raise it when gguf_import writes something else

_CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
  "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]
# (Hugging Face's name, shape, index) -> that slice of the tensor.
Tensor = Callable[[str, tuple[int, ...], Index], np.ndarray]
Place = Callable[[str, tuple[int, ...], np.dtype, Read], object]


@dataclasses.dataclass(frozen=True)
class Base:
  """A model to tune; its parameters are still on disk."""

  config: families.DecoderConfig
  tokenizer: PreTrainedTokenizerFast
  address: str
  folder: Path | None  # the Hugging Face folder; None for random://
  fingerprint: str  # of dimensions, tokenizer and weights


def open_base(address: str) -> Base:
  """Opens `random://PRESET`, or a folder or .gguf file by its address."""
  if address.startswith('random://'):
    return _random_base(address)
  path = addresses.resolve(address, _FIELD)
  if path.is_file():
    if path.suffix != '.gguf':
      raise InputError(
        f'{_FIELD}: {path} is neither a folder nor a .gguf file; give the '
        'folder that holds config.json, or a .gguf file.'
      )
    path = _converted(path)
  return _folder_base(address, path)


def _read_all(
  name: str, shape: tuple[int, ...], dtype: np.dtype, read: Read
) -> np.ndarray:
  return read((slice(None),) * len(shape))


def read_params(
  base: Base, dtype: np.typing.DTypeLike, place: Place = _read_all
) -> dict:
  """Reads every parameter of `families.parameter_shapes`, as float32 or bfloat16.

  `place` is `(name, shape, dtype, read) -> array`, where `read(index)` returns the
  slice `index` of the stacked parameter, as the callback of
  `jax.make_array_from_callback` does. By default all is read into numpy arrays.
  """
  dtype, tensor = np.dtype(dtype), _random_tensor
  if base.folder is not None:
    stored = safetensors_files.stored_tensors(base.folder, base.config)
    tensor = lambda name, shape, index: stored[name].data[index]
  return {
    name: place(name, shape, dtype, _reader(tensor, name, shape, dtype))
    for name, shape in families.parameter_shapes(base.config).items()
  }


def _reader(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Read:
  """`read(index)` of one parameter."""
  theirs = families.LLAMA_NAMES[name]

  def read(index: Index) -> np.ndarray:
    if not name.startswith('layers.'):
      return np.asarray(tensor(theirs, shape, index), dtype)
    out = None
    layers = range(*index[0].indices(shape[0]))
    for row, layer in enumerate(layers):
      values = tensor(theirs.format(layer), shape[1:], index[1:])
      if out is None:  # allocated once, in the final type
        out = np.empty((len(layers), *values.shape), dtype)
      out[row] = values
    return out

  return read


# Random weights.


def _random_base(address: str) -> Base:
  preset = address.removeprefix('random://')
  if preset not in families.PRESETS:
    raise InputError(
      f'{_FIELD}: {address!r} names no preset; choose one of '
      f'{", ".join(families.PRESETS)}.'
    )
  config = families.PRESETS[preset]
  fingerprint = hashlib.sha256(f'{address} {config}'.encode()).hexdigest()
  return Base(config, _byte_tokenizer(config), address, None, fingerprint)


def _byte_tokenizer(config: families.DecoderConfig) -> PreTrainedTokenizerFast:
  """One token per UTF-8 byte, and a ChatML template without system message."""
  # The package returns it in no fixed order, and ids must not change.
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {symbol: index for index, symbol in enumerate(alphabet)}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
  # Without merges there are no words to keep apart; nor may a blank come in.
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(['<|im_start|>', '<|im_end|>', '<|pad|>'])
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token='<|im_start|>',
    eos_token='<|im_end|>',
    pad_token='<|pad|>',
    chat_template=_CHATML,
    # Decoding gives back what was encoded, blanks before commas included.
    clean_up_tokenization_spaces=False,
    model_max_length=config.max_length,
  )


def _random_tensor(name: str, shape: tuple[int, ...], index: Index) -> np.ndarray:
  """Normal(0, 0.02), a function of the name alone; norms are ones."""
  if 'norm' in name:
    return np.ones(shape, np.float32)[index]
  # The whole tensor for any slice of it: a number does not depend on how
  # parameters are divided among devices.
  generator = np.random.default_rng((0, zlib.crc32(name.encode())))
  values = generator.standard_normal(shape, np.float32) * np.float32(0.02)
  return values[index]


# GGUF.


def _converted(path: Path) -> Path:
  """The cached Hugging Face folder of a .gguf file, made on first use."""
  digest = addresses.sha256(path)
  root = addresses.cache_dir() / 'models'
  target = root / f'{digest[:16]}-{_CONVERTER}'
  if target.is_dir():
    return target
  logging.info('Converting %s once, into %s.', path, target)
  root.mkdir(parents=True, exist_ok=True)
  # Inside the cache, so that the rename stays on one file system.
  with tempfile.TemporaryDirectory(dir=root, prefix='.convert-') as folder:
    gguf_import.convert(path, Path(folder) / 'model')
    try:
      os.rename(Path(folder) / 'model', target)
    except OSError:
      if not target.is_dir():  # else another process was faster
        raise
  return target


# Hugging Face folders.


def _folder_base(address: str, folder: Path) -> Base:
  for name in ('config.json', 'tokenizer.json'):
    if not (folder / name).is_file():
      raise InputError(
        f'{_FIELD}: the folder {folder} has no {name}; give a folder in the '
        'layout of Hugging Face.'
      )
  where = folder / 'config.json'
  config = families.from_hf(safetensors_files.read_json_object(where), str(where))
  stored = safetensors_files.stored_tensors(folder, config)
  fingerprint = _fingerprint(folder, {item.file for item in stored.values()})
  tokenizer = _load_tokenizer(folder, config)
  return Base(config, tokenizer, address, folder, fingerprint)


def _load_tokenizer(
  folder: Path, config: families.DecoderConfig
) -> PreTrainedTokenizerFast:
  """Reads tokenizer.json as it stands: AutoTokenizer would rebuild that of a
  Llama with a pre-tokenizer of its own."""
  if 'model' not in safetensors_files.read_json_object(folder / 'tokenizer.json'):
    raise InputError(
      f'{_FIELD}: {folder / "tokenizer.json"} describes no tokenizer; fetch it again.'
    )
  tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
  if len(tokenizer) > config.vocab:
    raise InputError(
      f'{_FIELD}: the tokenizer of {folder} has {len(tokenizer)} tokens but '
      f'the model {config.vocab}; use the tokenizer of this model.'
    )
  return tokenizer


def _fingerprint(folder: Path, files: set[Path]) -> str:
  """Digest of config, tokenizer and weights.

  Of large weight files only evenly spaced blocks are read, 16 MiB per file:
  training moves all of them, and hashing hundreds of gigabytes takes minutes.
  """
  digest = hashlib.sha256()
  for name in _DESCRIPTIONS:
    if (folder / name).is_file():
      digest.update(name.encode() + (folder / name).read_bytes())
  blocks, length = 256, 1 << 16
  # Files come as a set, whose order differs from process to process.
  for file in sorted(files):
    size = file.stat().st_size
    digest.update(f'{file.name} {size}'.encode())
    with open(file, 'rb') as stream:
      for start in range(0, size, max(length, size // blocks)):
        stream.seek(start)
        digest.update(stream.read(length))
  return digest.hexdigest()
