"""GGUF in, Hugging Face folder out; done once per file, without torch.

What a straight copy would get wrong, and this module undoes:
- llama.cpp interleaves the rotary halves of the q and k rows of Llama models.
  The wrong order still gives plausible text, so tests compare exact weights.
- llama.cpp's pre-tokenizer is a name (`tokenizer.ggml.pre`), not a rule: the
  rules stand here, and an unknown name is refused rather than guessed.
- A tied head has no tensor of its own.
- Llama 3's rope scaling arrives as a tensor of factors; it is accepted only
  when known parameters reproduce it.

A file is measured against its own header before anything is read, since the
reader of the `gguf` package fails on truncated files with numpy's errors.
"""

import dataclasses
import json
import math
import mmap
import os
import struct
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import tokenizers
from absl import logging
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import families

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

# Sizes in bytes of GGUF's scalar types; 8 is a string and 9 an array.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_CONTROL, _USER_DEFINED = 3, 4  # token types

# The split of Llama 3's own tokenizer.json.
_LLAMA_3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def convert(path: Path, folder: Path) -> None:
  """Writes config, float32 weights and tokenizer of `path` into `folder`."""
  _check_complete(path)
  try:
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
  except (ValueError, IndexError, KeyError) as error:
    raise _corrupt(path, error) from error
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  config = _config(fields, tensors, path)
  tokenizer = _tokenizer(fields, path)
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / 'tokenizer.json'))
  _write_json(folder / 'tokenizer_config.json', _tokenizer_config(fields))
  if template := fields.get('tokenizer.chat_template'):
    (folder / 'chat_template.jinja').write_text(template, encoding='utf-8')
  hf_config = families.to_hf(config) | {'dtype': 'float32'}
  for name in ('bos_token_id', 'eos_token_id'):
    hf_config[name] = fields.get(f'tokenizer.ggml.{name}')
  _write_json(folder / 'config.json', hf_config)
  _write_weights(folder / 'model.safetensors', config, tensors, path)


def _write_json(path: Path, content: dict) -> None:
  path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def _corrupt(path: Path, reason: object) -> InputError:
  return InputError(
    f'model.address: {path} is not a readable GGUF file ({reason}); fetch it '
    'again.'
  )


# Header: the end of the last tensor, against the size of the file.


class _Header:
  """A cursor over the bytes of a GGUF header; `struct.error` at their end."""

  def __init__(self, data: mmap.mmap):
    self.data = data
    self.at = 0

  def take(self, form: str) -> int:
    (value,) = struct.unpack_from('<' + form, self.data, self.at)
    self.at += struct.calcsize('<' + form)
    return value

  def string(self) -> bytes:
    length = self.take('Q')
    self._advance(length)
    return self.data[self.at - length : self.at]

  def _advance(self, length: int) -> None:
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
      if item in _SCALARS:
        self._advance(_SCALARS[item] * count)
        return
      for _ in range(count):
        self._skip(item)
    else:
      raise struct.error(f'unknown value type {kind}')


def _check_complete(path: Path) -> None:
  size = path.stat().st_size
  with open(path, 'rb') as file:
    if file.read(4) != b'GGUF':
      raise _corrupt(path, "it does not begin with 'GGUF'")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      try:
        needed = _end_of_tensors(_Header(data), path)
      except struct.error as error:
        reason = f'its header goes beyond its {size} bytes: {error}'
        raise _corrupt(path, reason) from error
  if needed > size:
    raise InputError(
      f'model.address: {path} is truncated: it has {size} bytes but its '
      f'header needs {needed}; fetch it again.'
    )


def _end_of_tensors(header: _Header, path: Path) -> int:
  """Reads the header up to its end; returns where the last tensor ends."""
  header.at = 4
  version = header.take('I')
  if version not in (2, 3):
    raise _corrupt(path, f'version {version}, where 2 and 3 are supported')
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
    end = max(end, offset + _n_bytes(shape, kind, name, path))
  start = math.ceil(header.at / alignment) * alignment
  return start + end


def _n_bytes(shape: list[int], kind: int, name: bytes, path: Path) -> int:
  try:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
  except ValueError as error:
    raise _unsupported(path, repr(name)[2:-1], f'type {kind}') from error
  return math.prod(shape) // block * size


def _unsupported(path: Path, name: str, kind: str) -> InputError:
  return InputError(
    f'model.address: the tensor {name} of {path} has the unsupported '
    f'quantisation {kind}; choose another file, such as Q8_0 or Q4_K_M.'
  )


def _under(fields: dict, prefix: str) -> dict:
  return {key.removeprefix(prefix): value for key, value in fields.items()
          if key.startswith(prefix)}


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
  get = _under(fields, 'llama.').get
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
    'vocab_size': int(tensors['token_embd.weight'].shape[1]),
    'num_hidden_layers': get('block_count'),
    'hidden_size': get('embedding_length'),
    'intermediate_size': get('feed_forward_length'),
    'num_attention_heads': get('attention.head_count'),
    'num_key_value_heads': get('attention.head_count_kv'),
    'head_dim': get('attention.key_length'),
    'max_position_embeddings': get('context_length'),
    'rms_norm_eps': _decimal(get('attention.layer_norm_rms_epsilon') or 1e-6),
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
  found = families.RopeScaling(_decimal(factors.max()), 1.0, 4.0, 8192)
  exponents = np.arange(0, config.head_dim, 2) / config.head_dim
  wavelengths = 2 * np.pi * config.rope_theta**exponents
  low, high = found.low_freq_factor, found.high_freq_factor
  turns = found.original_length / wavelengths
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  expected = 1 / ((1 - smooth) / found.factor + smooth)
  if factors.shape != expected.shape or not np.allclose(
    factors, expected, rtol=1e-5
  ):
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
  pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def _dequantized(tensor: gguf.ReaderTensor, path: Path) -> np.ndarray:
  try:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError as error:
    kind = tensor.tensor_type.name
    raise _unsupported(path, tensor.name, kind) from error
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
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for name, shape in shapes.items():
    start, end = end, end + 4 * math.prod(shape)
    header[name] = {
      'dtype': 'F32', 'shape': shape, 'data_offsets': [start, end]
    }
  encoded = json.dumps(header).encode()
  encoded += b' ' * (-len(encoded) % 8)
  heads = {'q_proj': config.heads, 'k_proj': config.kv_heads}
  with open(target, 'wb') as out:
    out.write(struct.pack('<Q', len(encoded)) + encoded)
    for name in shapes:
      values = _dequantized(sources[name], path)
      projection = name.split('.')[-2]
      if projection in heads:
        values = unpermute(values, heads[projection])
      out.write(np.ascontiguousarray(values, '<f4').data)
    out.flush()
    os.fsync(out.fileno())


def _sources(
  config: families.DecoderConfig, tensors: dict, path: Path
) -> dict[str, gguf.ReaderTensor]:
  """Hugging Face name -> tensor: all that are needed, in their shapes, and
  none in the file that we would ignore."""
  sources = {_hf_name(name): tensor for name, tensor in tensors.items()
             if name != _ROPE_FACTORS}
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


# Tokenizer.


def _pre_tokenizer(name: str, path: Path) -> pre_tokenizers.PreTokenizer:
  byte_level = pre_tokenizers.ByteLevel
  if name == 'smollm':
    # Digits first: the blank before a number is a token of its own.
    return pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True),
      byte_level(add_prefix_space=False, use_regex=True),
    ])
  if name == 'llama-bpe':
    split = tokenizers.Regex(_LLAMA_3_SPLIT)
    return pre_tokenizers.Sequence([
      pre_tokenizers.Split(split, behavior='isolated'),
      byte_level(add_prefix_space=False, use_regex=False),
    ])
  if name in ('gpt-2', 'default'):
    if name == 'default':
      logging.warning('%s names no pre-tokenizer; that of GPT-2 is used.', path)
    return byte_level(add_prefix_space=False, use_regex=True)
  raise InputError(
    f'model.address: {path} has the pre-tokenizer {name!r}; supported are '
    "'smollm', 'llama-bpe', 'gpt-2' and 'default'."
  )


def _tokenizer(fields: dict, path: Path) -> tokenizers.Tokenizer:
  """Byte-level BPE; control and user-defined tokens encode as one id."""
  get = _under(fields, 'tokenizer.ggml.').get
  if get('model') != 'gpt2' or not get('tokens') or get('merges') is None:
    raise InputError(
      f'model.address: {path} has a tokenizer of the kind {get("model")!r}; '
      "supported is 'gpt2' (byte-level BPE) with its tokens and merges."
    )
  tokens, pre = get('tokens'), get('pre') or 'default'
  vocab = {token: index for index, token in enumerate(tokens)}
  merges = [_merge(merge, vocab, path) for merge in get('merges')]
  # Llama 3 takes a whole piece that is in the vocabulary without merging.
  bpe = models.BPE(vocab, merges, ignore_merges=pre == 'llama-bpe')
  tokenizer = tokenizers.Tokenizer(bpe)
  tokenizer.pre_tokenizer = _pre_tokenizer(pre, path)
  tokenizer.decoder = decoders.ByteLevel()
  types = get('token_type') or [1] * len(tokens)
  for token, kind in zip(tokens, types, strict=False):
    if kind in (_CONTROL, _USER_DEFINED):
      special = kind == _CONTROL
      added = tokenizers.AddedToken(token, special=special, normalized=False)
      (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(
        [added]
      )
  _add_bos(tokenizer, fields, pre == 'llama-bpe')
  return tokenizer


def _merge(merge: str, vocab: dict, path: Path) -> tuple[str, str]:
  left, _, right = merge.partition(' ')
  if not {left, right, left + right} <= vocab.keys():
    raise _corrupt(path, f'its merge {merge!r} is not made of its tokens')
  return left, right


def _special(fields: dict, name: str) -> str | None:
  tokens = fields['tokenizer.ggml.tokens']
  index = fields.get(f'tokenizer.ggml.{name}_token_id')
  return tokens[index] if index is not None and index < len(tokens) else None


def _add_bos(
  tokenizer: tokenizers.Tokenizer, fields: dict, usual: bool
) -> None:
  """Lets every text begin with the begin token, where the model wants that."""
  bos = _special(fields, 'bos')
  wanted = fields.get('tokenizer.ggml.add_bos_token')
  if bos is not None and (usual if wanted is None else wanted):
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f'{bos} $A',
      pair=f'{bos} $A {bos}:1 $B:1',
      special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def _tokenizer_config(fields: dict) -> dict:
  """Names of the special tokens, as transformers reads them."""
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'model_max_length': fields.get('llama.context_length'),
  }
  names = {'bos': 'bos', 'eos': 'eos', 'unknown': 'unk', 'padding': 'pad'}
  for theirs, name in names.items():
    if token := _special(fields, theirs):
      config[f'{name}_token'] = token
  return config
