"""A Llama-family decoder in Flax NNX, its layers stacked and scanned.

Invariants:
  * Weights keep the Hugging Face layout [out, in]; layer weights carry a
    leading axis `layers`. Nothing is permuted, folded or fused, so import and
    export are a table of names.
  * Base weights are `nnx.Param` in the compute dtype and never trained; adapter
    weights are `nnx.LoRAParam` in float32. `nnx.split(model, nnx.LoRAParam,
    ...)` is all that training needs to tell them apart.
  * The caller says who attends to whom, so one forward pass serves packed
    training rows, prompts and the label tree.
  * `Execution` changes how things are computed, never what.

Shapes in comments: B batch, L query length, M memory (cache) length, D embed,
H query heads, K key-value heads, C head_dim, V vocab, R LoRA rank.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from behaviorlm_jax.model import attention, families, products

# The products of a layer, any of which an adapter may change.
PROJECTIONS = tuple(
  name.removeprefix('layers.')
  for name in families.LLAMA_NAMES
  if name.endswith('_proj')
)
# What the backward pass finds saved; the rest of a layer it computes again.
REMAT_POLICIES = {
  'none': None,  # Everything.
  'full': jax.checkpoint_policies.nothing_saveable,  # The layer's input.
  # What takes a product to compute; attention names what it keeps itself.
  'products': jax.checkpoint_policies.save_only_these_names('product'),
}


# (q, k, v) -> y, or (q, k, v, memory_k, memory_v) -> y: see Decoder.__call__.
Attend = Callable[..., Array]
Cache = tuple[Array, Array]  # Keys and values.
Rotate = Callable[[Array], Array]  # Heads [B, L, heads, C], by their positions.
# (x, a logical axis or None for each of its axes) -> x.
Constrain = Callable[[Array, tuple[str | None, ...]], Array]

_ROWS = ('batch', None, None)  # Logical axes of [B, L, D]
_TABLE = ('vocab', None)  # and of [V, D] where it is used.


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  # Hugging Face rounds to the dtype of x before the weight comes in; here the
  # product that takes this up rounds, once.
  return x32 * scale * weight


def rope_frequencies(config: families.DecoderConfig) -> Array:
  """Inverse frequencies, float32 [C / 2], with Llama 3 scaling if asked for."""
  exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32)
  frequencies = config.rope_theta ** (-exponents / config.head_dim)
  if config.rope_scaling is None:
    return frequencies
  return frequencies * config.rope_scaling.multipliers(frequencies)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
  """Rotary embedding of x [B, L, heads, C]; halves, as Hugging Face does."""
  # Dimension i turns with i + C / 2. GGUF's pairs (2 i, 2 i + 1) are undone at
  # import (gguf_import.unpermute).
  first, second = jnp.split(x, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  return x * cos + turned * sin


class Linear(nnx.Module):
  """y = x W' + (alpha / R) (x A') B' with all layers' weights stacked.

  kernel [layers, out, in]; lora None, or a [layers, R, in] and b [.., out, R].
  """

  def __init__(self, kernel: Array, lora: Mapping[str, Array] | None, scale: float):
    self.kernel = nnx.Param(kernel)
    self.scale = scale
    self.has_lora = lora is not None
    if lora is not None:
      self.lora_a = nnx.LoRAParam(lora['a'])
      self.lora_b = nnx.LoRAParam(lora['b'])

  def __call__(self, x: Array) -> Array:
    """float32 [..., out] of x [..., in], which is rounded to kernel's dtype."""
    kernel = self.kernel[...]
    x = x.astype(kernel.dtype)
    if not self.has_lora:
      return products.dot(x, kernel)
    return products.lora_dot(self.scale, x, kernel, self.lora_a[...], self.lora_b[...])


class Layer(nnx.Module):
  """One pre-norm block; every weight has the leading axis `layers`."""

  def __init__(
    self,
    config: families.DecoderConfig,
    params: Mapping[str, Array],
    lora: Mapping[str, Mapping[str, Array]],
    scale: float,
    between: jnp.dtype,
    constrain: Constrain,
  ):
    """`between`: dtype of what flows between the products."""
    self.config = config
    self.between = between
    self.constrain = constrain
    self.attention_norm = nnx.Param(params['layers.attention_norm'])
    self.mlp_norm = nnx.Param(params['layers.mlp_norm'])
    for name in PROJECTIONS:
      kernel = params[f'layers.{name}']
      setattr(self, name, Linear(kernel, lora.get(name), scale))

  def __call__(
    self, x: Array, rotate: Rotate, attend: Attend, memory: Cache | None
  ) -> tuple[Array, Cache]:
    """x [B, L, D] -> the same; also this layer's keys, values [B, L, K, C]."""
    eps = self.config.norm_eps
    x = self.constrain(x, _ROWS)
    y = _rms_norm(x, self.attention_norm[...], eps)
    attended, cache = self._attend(y, rotate, attend, memory)
    # What products return is float32, so is the sum; it is rounded once.
    x = self._keep(self.constrain(x + attended, _ROWS))
    y = _rms_norm(x, self.mlp_norm[...], eps)
    inner = lambda y: self.constrain(self._round(y), ('batch', None, 'mlp'))
    gate, up = inner(self.gate_proj(y)), inner(self.up_proj(y))
    # Each is kept rounded, as the backward pass needs them; what is made of
    # them stays float32 until down_proj rounds it.
    y = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    x = self.constrain(x + self.down_proj(y), _ROWS)
    return x.astype(self.between), cache

  def _keep(self, y: Array) -> Array:
    # The name has the remat policy 'products' save it.
    return checkpoint_name(y.astype(self.between), 'product')

  def _round(self, y: Array) -> Array:
    """The same, in the weights' dtype: what products or their like take up."""
    same = self.o_proj.kernel[...].dtype == self.between
    return self._keep(y) if same else products.keep_bits(y)

  def _attend(
    self, x: Array, rotate: Rotate, attend: Attend, memory: Cache | None
  ) -> tuple[Array, Cache]:
    batch, length = x.shape[:2]
    heads = lambda y, axis: self.constrain(
      y.reshape(batch, length, -1, self.config.head_dim), ('batch', None, axis, None)
    )
    q = self._round(rotate(heads(self.q_proj(x), 'heads')))
    # Keys are cached turned: a position in a segment never changes.
    k = self._round(rotate(heads(self.k_proj(x), 'kv_heads')))
    v = self._round(heads(self.v_proj(x), 'kv_heads'))
    y = attend(q, k, v) if memory is None else attend(q, k, v, *memory)
    return self.o_proj(y.reshape(batch, length, -1)), (k, v)


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a decoder is computed, never what.

  Attributes:
    remat: key of REMAT_POLICIES, applied to each layer.
    packed: attention of packed rows.
    backend: 'cpu', 'gpu' or 'tpu'; None: where this process runs.
    constrain: says how activations are divided among devices. Left to itself
      XLA gathers those of all rows where it should gather a layer's weights.
  """

  remat: str = 'none'
  packed: attention.Attention = attention.reference_attention
  backend: str | None = None
  constrain: Constrain = lambda x, axes: x


_PLAIN = Execution()


class Decoder(nnx.Module):
  """Token ids to hidden states; `logits` is separate, for chosen positions."""

  def __init__(
    self,
    config: families.DecoderConfig,
    params: Mapping[str, Array],
    lora: Mapping[str, Mapping[str, Array]] | None = None,
    scale: float = 1.0,
    how: Execution = _PLAIN,
  ):
    """Wraps arrays (or ShapeDtypeStructs); nothing is initialised here.

    params: base weights by our names (families.parameter_shapes), in the compute
    dtype; lora: an adapter (see model.lora), or None for the bare base; scale:
    alpha / rank.
    """
    self.config = config
    self.constrain = how.constrain
    self.remat = how.remat
    self.packed = how.packed
    self.on_cpu = (how.backend or jax.default_backend()) == 'cpu'
    # A CPU has no bfloat16 arithmetic outside of products: each operation would
    # convert there and back. Accelerators want the smaller arrays.
    between = jnp.dtype(jnp.float32) if self.on_cpu else params['embed'].dtype
    self.embed = nnx.Param(params['embed'])
    self.final_norm = nnx.Param(params['final_norm'])
    self.layers = Layer(config, params, lora or {}, scale, between, how.constrain)
    if not config.tied:
      self.head = nnx.Param(params['head'])

  def __call__(
    self,
    tokens: Array,
    positions: Array,
    attend: Attend,
    memory: Cache | None = None,
    keep_cache: bool = False,
  ) -> tuple[Array, Cache | None]:
    """Hidden states [B, L, D] after the final norm, in the compute dtype.

    Args:
      tokens: int32 [B, L].
      positions: int32 [B, L], of each token in its own segment.
      attend: (q, k, v) -> y, attention among these tokens alone; with `memory`
        (q, k, v, memory_k, memory_v) -> y. See model.attention for shapes.
      memory: keys and values of earlier tokens, each [layers, B, M, K, C].
      keep_cache: also return keys and values of these tokens, else None.
    """
    table = self.constrain(self._bits(self.embed[...]), _TABLE)
    embedded = self.constrain(self._unpacked(table[tokens]), _ROWS)
    x = embedded.astype(self.layers.between)
    # For attention that leaves precision open; model.products asks for its own.
    precise = 'highest' if embedded.dtype == jnp.float32 else None
    with jax.default_matmul_precision(precise):
      # In float32: beyond 256 bfloat16 skips positions.
      angles = positions[..., None] * rope_frequencies(self.config)
      # Both halves of a head turn by the same angles, all heads alike.
      angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
      rotate = functools.partial(_rotate, cos=jnp.cos(angles), sin=jnp.sin(angles))
      x, cache = self._scan(x, rotate, attend, memory, keep_cache)
    x = _rms_norm(x, self.final_norm[...], self.config.norm_eps)
    return x.astype(embedded.dtype), cache

  def packed_hidden(
    self, tokens: Array, positions: Array, segments: Array, keep_cache: bool = False
  ) -> tuple[Array, Cache | None]:
    """Hidden states of packed rows; segments int32 [B, L], 0 is padding."""
    attend = functools.partial(self.packed, segments=segments)
    return self(tokens, positions, attend, keep_cache=keep_cache)

  def _scan(
    self,
    x: Array,
    rotate: Rotate,
    attend: Attend,
    memory: Cache | None,
    keep_cache: bool,
  ) -> tuple[Array, Cache | None]:
    graphdef, state = nnx.split(self.layers)

    def block(x: Array, scanned: tuple) -> tuple[Array, Cache | None]:
      state, memory = self._unpacked(scanned)
      x, cache = nnx.merge(graphdef, state)(x, rotate, attend, memory)
      return x, self._bits(cache) if keep_cache else None

    if self.remat != 'none':
      # A scan by itself keeps XLA from merging what is computed again with what
      # was computed first; barriers against that would only cost.
      block = jax.checkpoint(
        block, policy=REMAT_POLICIES[self.remat], prevent_cse=False
      )
    # One layer compiled, whatever their number; each step gets its slice of the
    # stacked weights, and of the memory.
    x, cache = jax.lax.scan(block, x, self._bits((state, memory)))
    return x, self._unpacked(cache)

  def _bits(self, state):
    """On CPU, bfloat16 arrays as the integers they are stored in.

    XLA for CPU cannot slice bfloat16: it would convert the whole embedding, and
    all layers' weights before the loop and each layer's back inside.
    """
    return self._recast(state, jnp.bfloat16, jnp.uint16)

  def _unpacked(self, state):
    return self._recast(state, jnp.uint16, jnp.bfloat16)

  def _recast(self, state, given, wanted):
    if not self.on_cpu:
      return state
    cast = lambda x: jax.lax.bitcast_convert_type(x, wanted) if x.dtype == given else x
    return jax.tree.map(cast, state)

  def logits(self, hidden: Array) -> Array:
    """Float32 logits [..., V] of hidden states [..., D]."""
    return products.dot(hidden, self._head)

  def logits_of(self, hidden: Array, tokens: Array) -> Array:
    """Those float32 [n] of one token [n] after each hidden state [n, D]."""
    # One row of the head for each state, not all V of them.
    rows = self._head[tokens].astype(hidden.dtype)
    return jnp.sum(hidden.astype(jnp.float32) * rows.astype(jnp.float32), axis=-1)

  @property
  def _head(self) -> Array:
    head = self.embed if self.config.tied else self.head
    return self.constrain(head[...], _TABLE)
