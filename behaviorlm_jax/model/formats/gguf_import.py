"""GGUF in, Hugging Face folder out; done once per file, without torch.

What a straight copy would get wrong, and this module undoes:
- llama.cpp interleaves the rotary halves of the q and k rows of Llama models.
  The wrong order still gives plausible text, so tests compare exact weights.
- A tied head has no tensor of its own.
- Llama 3's rope scaling arrives as a tensor of factors; it is accepted only
  when known parameters reproduce it.

`gguf_file` reads a file, `gguf_tokenizer` makes its tokenizer.
"""

import dataclasses
import json
import math
import os
import struct
from pathlib import Path

import gguf
import gguf.quants
import numpy as np

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import files
from behaviorlm_jax.model import families
from behaviorlm_jax.model.formats import gguf_file, gguf_tokenizer

_ROPE_FACTORS = 'rope_freqs.weight'


def convert(path: Path, folder: Path) -> None:
  """Writes config, float32 weights and tokenizer of `path` into `folder`."""
  fields, tensors = gguf_file.read(path)
  config = _config(fields, tensors, path)
  tokenizer = gguf_tokenizer.build_tokenizer(fields, path)
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / 'tokenizer.json'))
  files.write_json(
    folder / 'tokenizer_config.json', gguf_tokenizer.tokenizer_config(fields)
  )
  if template := fields.get('tokenizer.chat_template'):
    (folder / 'chat_template.jinja').write_text(template, encoding='utf-8')
  hf_config = families.to_hf(config) | {'dtype': 'float32'}
  for name in ('bos_token_id', 'eos_token_id'):
    hf_config[name] = fields.get(f'tokenizer.ggml.{name}')
  files.write_json(folder / 'config.json', hf_config)
  _write_weights(folder / 'model.safetensors', config, tensors, path)


# Dimensions.


def _config(fields: dict, tensors: dict, path: Path) -> families.DecoderConfig:
  """Dimensions in the file's words, checked as any config.json is."""
  kind = fields.get('general.architecture')
  if kind != 'llama' or fields.get('llama.expert_count'):
    raise InputError(
      f'model.address: {path} has the architecture {kind!r}'
      f'{" with experts" if kind == "llama" else ""}; supported is a dense '
      "'llama'."
    )
  get = lambda key: fields.get(f'llama.{key}')
  if 'token_embd.weight' not in tensors:
    raise InputError(
      f'model.address: {path} lacks the tensor token_embd.weight; choose a '
      'file that holds a whole model.'
    )
  scaling = get('rope.scaling.type')
  if scaling not in (None, 'none'):
    raise InputError(
      f'model.address: {path} scales its rotary embedding by {scaling!r}; '
      'supported are none and that of Llama 3.'
    )
  given = {
    'model_type': 'llama',
    # Rows of the embedding, which may be more than the tokens.
    'vocab_size': _shape(tensors['token_embd.weight'])[0],
    'num_hidden_layers': get('block_count'),
    'hidden_size': get('embedding_length'),
    'intermediate_size': get('feed_forward_length'),
    'num_attention_heads': get('attention.head_count'),
    'num_key_value_heads': get('attention.head_count_kv'),
    # May be missing: from_hf then divides hidden_size by the heads.
    'head_dim': get('attention.key_length'),
    'max_position_embeddings': get('context_length'),
    'rms_norm_eps': _decimal(get('attention.layer_norm_rms_epsilon') or 1e-6),
    # Where a file has none llama.cpp takes 10000, too.
    'rope_theta': _decimal(get('rope.freq_base') or 1e4),
    'tie_word_embeddings': 'output.weight' not in tensors,
  }
  config = families.from_hf(given, str(path))
  if get('rope.dimension_count') not in (None, config.head_dim):
    raise InputError(
      f'model.address: {path} rotates {get("rope.dimension_count")} of '
      f'{config.head_dim} dimensions per head; only all are supported.'
    )
  if _ROPE_FACTORS not in tensors:
    return config
  factors = _dequantized(tensors[_ROPE_FACTORS], path)
  scaling = _rope_scaling(factors, config, path)
  return dataclasses.replace(config, rope_scaling=scaling)


def _decimal(value: float) -> float:
  """The shortest decimal of the same float32: 1e-05, not 9.99999975e-06."""
  return float(str(np.float32(value)))


def _rope_scaling(
  factors: np.ndarray, config: families.DecoderConfig, path: Path
) -> families.RopeScaling:
  """Recovers Llama 3's parameters from its divisors of frequencies.

  The published models share every parameter but `factor`, which is the largest
  divisor; that the divisors computed from them equal the file's
  [head_dim / 2] is the proof.
  """
  # low_freq_factor, high_freq_factor and original context of all of them.
  found = families.RopeScaling(_decimal(factors.max()), 1.0, 4.0, 8192)
  exponents = np.arange(0, config.head_dim, 2) / config.head_dim
  expected = 1 / found.multipliers(config.rope_theta**-exponents)
  if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-5):
    raise InputError(
      f'model.address: the tensor {_ROPE_FACTORS} of {path} is not the rope '
      'scaling of a published Llama 3 model; give the Hugging Face folder of '
      'the model instead.'
    )
  return found


# Weights.


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
  # GGUF counts dimensions from the fastest one.
  return tuple(tensor.shape[::-1].tolist())


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rotary pairs (0, 1), (2, 3) .. of each head's rows back into two halves.

  The inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py;
  `rows` is [heads * head_dim, in].
  """
  # Axis 2 says which of a pair; in front of the pairs it says which half.
  pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def _dequantized(tensor: gguf.ReaderTensor, path: Path) -> np.ndarray:
  try:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError as error:
    raise InputError(
      f'model.address: the tensor {tensor.name} of {path} has the unsupported '
      f'quantisation {tensor.tensor_type.name}; choose another file, such as '
      'Q8_0 or Q4_K_M.'
    ) from error
  return np.asarray(values, np.float32)


def _write_weights(
  target: Path, config: families.DecoderConfig, tensors: dict, path: Path
) -> None:
  """Writes a float32 safetensors file, one tensor in memory at a time."""
  sources = _sources(config, tensors, path)
  # Offsets count from the end of the header; without gaps, in file order.
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for name, tensor in sources.items():
    shape = _shape(tensor)
    start, end = end, end + 4 * math.prod(shape)
    header[name] = {'dtype': 'F32', 'shape': shape, 'data_offsets': [start, end]}
  encoded = json.dumps(header).encode()
  # Padded with blanks, so that the data begin at a multiple of 8.
  encoded += b' ' * (-len(encoded) % 8)
  # Rotary embedding turns q and k alone: all else lies as Hugging Face has it.
  heads = {'q_proj': config.heads, 'k_proj': config.kv_heads}
  with open(target, 'wb') as out:
    out.write(struct.pack('<Q', len(encoded)) + encoded)
    for name, tensor in sources.items():
      values = _dequantized(tensor, path)
      projection = name.split('.')[-2]
      if projection in heads:
        values = unpermute(values, heads[projection])
      out.write(np.ascontiguousarray(values, '<f4').data)
    # On the disk before the folder is renamed to its place in the cache.
    out.flush()
    os.fsync(out.fileno())


def _sources(
  config: families.DecoderConfig, tensors: dict, path: Path
) -> dict[str, gguf.ReaderTensor]:
  """Hugging Face name -> tensor: all that are needed, in their shapes, and
  none in the file that we would ignore."""
  # A damaged file may claim a billion layers; each has a tensor at least.
  layers = min(config.layers, len(tensors))
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
  sources, extra = {}, tensors.keys() - {_ROPE_FACTORS}
  for name, shape in families.hf_shapes(config):
    theirs = names.get_name(name, ('.weight',))
    found = theirs in tensors and _shape(tensors[theirs])
    if found != shape:
      raise InputError(
        f'model.address: {path} has {found or "no tensor"} where {name} of '
        f'shape {shape} is needed; fetch the file again.'
      )
    sources[name] = tensors[theirs]
    extra.discard(theirs)
  if extra:
    raise InputError(
      f'model.address: {path} holds the tensor {min(extra)}, which is not part '
      'of a Llama decoder; choose another model.'
    )
  return sources
