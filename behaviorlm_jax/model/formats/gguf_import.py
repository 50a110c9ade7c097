"""GGUF in, Hugging Face folder out; done once per file, without torch.

What a straight copy would get wrong, and this module undoes:
- llama.cpp interleaves the rotary halves of the q and k rows of Llama models.
  The wrong order still gives plausible text, so tests compare exact weights.
- A tied head has no tensor of its own.
- Llama 3's rope scaling arrives as a tensor of factors; it is accepted only
  when known parameters reproduce it.

`gguf_header` checks that a file is whole before anything else is read of it,
`gguf_tokenizer` makes its tokenizer.
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
from behaviorlm_jax.model.formats import gguf_header, gguf_tokenizer

_GLOBAL_NAMES = {
  'token_embd.weight': 'embed',
  'output_norm.weight': 'final_norm',
  'output.weight': 'head',
}
_LAYER_NAMES = {
  'attn_norm': 'layers.attention_norm',
  'attn_q': 'layers.q_proj',
  'attn_k': 'layers.k_proj',
  'attn_v': 'layers.v_proj',
  'attn_output': 'layers.o_proj',
  'ffn_norm': 'layers.mlp_norm',
  'ffn_gate': 'layers.gate_proj',
  'ffn_up': 'layers.up_proj',
  'ffn_down': 'layers.down_proj',
}
_ROPE_FACTORS = 'rope_freqs.weight'


def convert(path: Path, folder: Path) -> None:
  """Writes config, float32 weights and tokenizer of `path` into `folder`."""
  gguf_header.check_complete(path)
  try:
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
  except (ValueError, IndexError, KeyError) as error:
    raise gguf_header.corrupt(path, error) from error
  tensors = {tensor.name: tensor for tensor in reader.tensors}
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
  get = gguf_header.under(fields, 'llama.').get
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
    # Rows of the embedding, which may be more than the tokens. GGUF's shape
    # begins with the fastest dimension.
    'vocab_size': int(tensors['token_embd.weight'].shape[1]),
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
  wavelengths = 2 * np.pi * config.rope_theta**exponents
  low, high = found.low_freq_factor, found.high_freq_factor
  turns = found.original_length / wavelengths
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  expected = 1 / ((1 - smooth) / found.factor + smooth)
  if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-5):
    raise InputError(
      f'model.address: the tensor {_ROPE_FACTORS} of {path} is not the rope '
      'scaling of a published Llama 3 model; give the Hugging Face folder of '
      'the model instead.'
    )
  return found


# Weights.


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
    kind = tensor.tensor_type.name
    raise gguf_header.unsupported(path, tensor.name, kind) from error
  return np.asarray(values, np.float32)


def _hf_name(name: str) -> str | None:
  """The Hugging Face name of a GGUF tensor."""
  if name in _GLOBAL_NAMES:
    return families.LLAMA_NAMES[_GLOBAL_NAMES[name]]
  parts = name.split('.')
  block = len(parts) == 4 and parts[0] == 'blk' and parts[1].isdecimal()
  if block and parts[3] == 'weight' and parts[2] in _LAYER_NAMES:
    ours = families.LLAMA_NAMES[_LAYER_NAMES[parts[2]]]
    return ours.format(int(parts[1]))
  return None


def _write_weights(
  target: Path, config: families.DecoderConfig, tensors: dict, path: Path
) -> None:
  """Writes a float32 safetensors file, one tensor in memory at a time."""
  sources = _sources(config, tensors, path)
  shapes = dict(families.hf_shapes(config))
  # Offsets count from the end of the header; without gaps, in file order.
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for name, shape in shapes.items():
    start, end = end, end + 4 * math.prod(shape)
    header[name] = {'dtype': 'F32', 'shape': shape, 'data_offsets': [start, end]}
  encoded = json.dumps(header).encode()
  # Padded with blanks, so that the data begin at a multiple of 8.
  encoded += b' ' * (-len(encoded) % 8)
  # Rotary embedding turns q and k alone: all else lies as Hugging Face has it.
  heads = {'q_proj': config.heads, 'k_proj': config.kv_heads}
  with open(target, 'wb') as out:
    out.write(struct.pack('<Q', len(encoded)) + encoded)
    for name in shapes:
      values = _dequantized(sources[name], path)
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
  sources = {
    _hf_name(name): tensor for name, tensor in tensors.items() if name != _ROPE_FACTORS
  }
  needed = set()
  for name, shape in families.hf_shapes(config):
    needed.add(name)
    # GGUF counts dimensions from the fastest one.
    found = name in sources and tuple(map(int, sources[name].shape[::-1]))
    if found != shape:
      raise InputError(
        f'model.address: {path} has {found or "no tensor"} where {name} of '
        f'shape {shape} is needed; fetch the file again.'
      )
  for name in sources.keys() - needed:
    extra = [key for key in tensors if _hf_name(key) == name]
    raise InputError(
      f'model.address: {path} holds the tensor {extra[0]}, which is not part '
      'of a Llama decoder; choose another model.'
    )
  return sources
