"""Decoder families as tables: dimensions, presets and parameter names.

A family is described here once, and import, export and compilation read the
same tables. Our parameters keep the Hugging Face layout ([out, in], rotary
halves not interleaved); those of the layers are stacked along a leading axis,
so one of our parameters `layers.*` is one Hugging Face tensor per layer.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import TypeVar

from behaviorlm_jax.errors import InputError

_Array = TypeVar('_Array')  # numpy's or jax's.


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's stretching of the rotary frequencies to longer contexts."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_length: int

  def multipliers(self, frequencies: _Array) -> _Array:
    """What each inverse frequency [C / 2] is multiplied by.

    Wavelengths above original_length / low_freq_factor are stretched by
    `factor`, those below original_length / high_freq_factor kept, those between
    interpolated (formula: transformers, modeling_rope_utils.py).
    """
    # How often each goes round within the context of the pretraining.
    turns = self.original_length * frequencies / (2 * math.pi)
    low, high = self.low_freq_factor, self.high_freq_factor
    # 1: as it is, of short wavelengths; 0: stretched by the whole factor.
    keep = ((turns - low) / (high - low)).clip(0.0, 1.0)
    return keep + (1 - keep) / self.factor


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Dimensions of one Llama-family decoder; hashable, so a jit constant."""

  vocab: int
  layers: int
  embed: int
  mlp: int
  heads: int
  kv_heads: int
  head_dim: int
  rope_theta: float
  norm_eps: float
  tied: bool  # the output head is the embedding
  rope_scaling: RopeScaling | None = None
  max_length: int = 8192

  @property
  def queries(self) -> int:
    return self.heads * self.head_dim

  @property
  def keys(self) -> int:
    return self.kv_heads * self.head_dim


# Ours -> Hugging Face's, where '{}' stands for the layer, and the shape of one
# such tensor in fields of DecoderConfig.
_LLAMA = {
  'embed': ('model.embed_tokens.weight', ('vocab', 'embed')),
  'layers.attention_norm': ('model.layers.{}.input_layernorm.weight', ('embed',)),
  'layers.q_proj': ('model.layers.{}.self_attn.q_proj.weight', ('queries', 'embed')),
  'layers.k_proj': ('model.layers.{}.self_attn.k_proj.weight', ('keys', 'embed')),
  'layers.v_proj': ('model.layers.{}.self_attn.v_proj.weight', ('keys', 'embed')),
  'layers.o_proj': ('model.layers.{}.self_attn.o_proj.weight', ('embed', 'queries')),
  'layers.mlp_norm': ('model.layers.{}.post_attention_layernorm.weight', ('embed',)),
  'layers.gate_proj': ('model.layers.{}.mlp.gate_proj.weight', ('mlp', 'embed')),
  'layers.up_proj': ('model.layers.{}.mlp.up_proj.weight', ('mlp', 'embed')),
  'layers.down_proj': ('model.layers.{}.mlp.down_proj.weight', ('embed', 'mlp')),
  'final_norm': ('model.norm.weight', ('embed',)),
  'head': ('lm_head.weight', ('vocab', 'embed')),  # absent when tied
}
LLAMA_NAMES = {ours: theirs for ours, (theirs, _) in _LLAMA.items()}

_LLAMA_3_8B = DecoderConfig(
  vocab=128256,
  layers=32,
  embed=4096,
  mlp=14336,
  heads=32,
  kv_heads=8,
  head_dim=128,
  rope_theta=5e5,
  norm_eps=1e-5,
  tied=False,
  rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
  max_length=131072,
)

PRESETS = {
  'tiny': DecoderConfig(
    # 256 bytes and 3 special tokens (weights._byte_tokenizer), filled up.
    vocab=384,
    layers=2,
    embed=64,
    mlp=128,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rope_theta=1e4,
    norm_eps=1e-5,
    tied=True,
  ),
  'smollm2-135m': DecoderConfig(
    vocab=49152,
    layers=30,
    embed=576,
    mlp=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    rope_theta=1e5,
    norm_eps=1e-5,
    tied=True,
  ),
  'llama-3.2-1b': dataclasses.replace(
    _LLAMA_3_8B,
    layers=16,
    embed=2048,
    mlp=8192,
    head_dim=64,
    tied=True,
    rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
  ),
  'llama-3.1-8b': _LLAMA_3_8B,
  'llama-3.1-70b': dataclasses.replace(
    _LLAMA_3_8B, layers=80, embed=8192, mlp=28672, heads=64
  ),
}


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Our parameter -> its shape; `layers.*` begin with the layer axis."""
  shapes = {}
  for name, (_, axes) in _LLAMA.items():
    stack = ('layers',) if name.startswith('layers.') else ()
    shapes[name] = tuple(getattr(config, axis) for axis in (*stack, *axes))
  if config.tied:
    del shapes['head']
  return shapes


def hf_shapes(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Yields every Hugging Face tensor and its shape.

  One by one: a damaged file may claim a billion layers, and whoever looks for
  them stops at the first that is missing.
  """
  for name, shape in parameter_shapes(config).items():
    if name.startswith('layers.'):
      for layer in range(config.layers):
        yield LLAMA_NAMES[name].format(layer), shape[1:]
    else:
      yield LLAMA_NAMES[name], shape


def from_hf(config: dict, where: str) -> DecoderConfig:
  """Reads a Hugging Face `config.json`; refuses what we do not implement.

  `where` is what error messages call the file.
  """
  _refuse_unsupported(config, where)
  heads = _size(config, 'num_attention_heads', where)
  kv_heads = _size(config, 'num_key_value_heads', where, heads)
  embed = _size(config, 'hidden_size', where)
  head_dim = _size(config, 'head_dim', where, embed // heads)
  if heads % kv_heads or head_dim % 2:
    raise InputError(
      f'model.address: {where} has {heads} query heads for {kv_heads} '
      f'key-value heads of width {head_dim}; the first must be a multiple of '
      'the second and the width even.'
    )
  # transformers 5 keeps rotary settings in `rope_parameters`, older versions in
  # `rope_theta` and `rope_scaling`.
  rope = dict(config.get('rope_scaling') or {})
  rope |= config.get('rope_parameters') or {}
  # What a file leaves out is what transformers' LlamaConfig has then.
  theta = rope.get('rope_theta', config.get('rope_theta')) or 1e4
  return DecoderConfig(
    vocab=_size(config, 'vocab_size', where),
    layers=_size(config, 'num_hidden_layers', where),
    embed=embed,
    mlp=_size(config, 'intermediate_size', where),
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    rope_theta=float(theta),
    norm_eps=float(config.get('rms_norm_eps', 1e-6)),
    tied=bool(config.get('tie_word_embeddings', False)),
    rope_scaling=_scaling(rope, where),
    max_length=_size(config, 'max_position_embeddings', where, 2048),
  )


def _refuse_unsupported(config: dict, where: str) -> None:
  kind = config.get('model_type')
  if kind != 'llama':
    raise InputError(
      f'model.address: {where} has model_type {kind!r}; supported is '
      "'llama' (SmolLM2, Llama 2 and 3)."
    )
  only = {
    'attention_bias': False,
    'mlp_bias': False,
    'hidden_act': 'silu',
    'partial_rotary_factor': 1.0,
    'quantization_config': None,
  }
  # transformers 5 has partial_rotary_factor among these.
  config = config | (config.get('rope_parameters') or {})
  for key, supported in only.items():
    if config.get(key) not in (None, supported):
      wanted = 'its absence' if supported is None else repr(supported)
      raise InputError(
        f'model.address: {where} has {key}={config[key]!r}; only {wanted} is '
        'supported, choose another model.'
      )


def _size(config: dict, key: str, where: str, default: int = 0) -> int:
  given = config.get(key)
  value = default if given is None else given
  # JSON's true is an int in Python, too.
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    found = f'lacks {key}' if given is None else f'has {key}={given!r}'
    raise InputError(f'model.address: {where} {found}; a positive integer is needed.')
  return value


def _scaling(rope: dict, where: str) -> RopeScaling | None:
  # Older files say `type`.
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return None
  if kind != 'llama3':
    raise InputError(
      f'model.address: {where} has rotary type {kind!r}; supported are '
      "'default' and 'llama3'."
    )
  factors = ('factor', 'low_freq_factor', 'high_freq_factor')
  length = 'original_max_position_embeddings'
  missing = {*factors, length} - set(rope)
  if missing:
    raise InputError(
      f'model.address: {where} lacks {", ".join(sorted(missing))} in its '
      "'llama3' rotary settings; add them."
    )
  return RopeScaling(*(float(rope[key]) for key in factors), int(rope[length]))


def to_hf(config: DecoderConfig) -> dict:
  """The `config.json` of a `LlamaForCausalLM` with these dimensions."""
  rope_scaling = None
  if scaling := config.rope_scaling:
    rope_scaling = {
      'rope_type': 'llama3',
      'factor': scaling.factor,
      'low_freq_factor': scaling.low_freq_factor,
      'high_freq_factor': scaling.high_freq_factor,
      'original_max_position_embeddings': scaling.original_length,
    }
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': config.vocab,
    'num_hidden_layers': config.layers,
    'hidden_size': config.embed,
    'intermediate_size': config.mlp,
    'num_attention_heads': config.heads,
    'num_key_value_heads': config.kv_heads,
    'head_dim': config.head_dim,
    'hidden_act': 'silu',
    'attention_bias': False,
    'mlp_bias': False,
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tied,
    'max_position_embeddings': config.max_length,
    # Under their older names, which transformers 4 and 5 both read.
    'rope_theta': config.rope_theta,
    'rope_scaling': rope_scaling,
  }
