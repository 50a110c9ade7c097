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
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from behaviorlm_jax.model import attention, families

PROJECTIONS = (
  'q_proj',
  'k_proj',
  'v_proj',
  'o_proj',
  'gate_proj',
  'up_proj',
  'down_proj',
)
# What the backward pass finds saved; the rest of a layer it computes again.
REMAT_POLICIES = {
  'none': None,  # Everything.
  'full': jax.checkpoint_policies.nothing_saveable,  # The layer's input.
  # What takes a product to compute; attention names what it keeps itself.
  'products': jax.checkpoint_policies.save_only_these_names('product'),
}


# (q, k, v) -> y, or (q, k, v, memory_k, memory_v) -> y: see Decoder.__call__.
Attend = Callable[..., jax.Array]
Cache = tuple[jax.Array, jax.Array]  # Keys and values.
# (x, a logical axis or None for each of its axes) -> x.
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

_ROWS = ('batch', None, None)  # Logical axes of [B, L, D]
_TABLE = ('vocab', None)  # and of [V, D] where it is used.


def _contract(
  x: jax.Array, y: jax.Array, x_axes: tuple[int, ...], y_axes: tuple[int, ...]
) -> jax.Array:
  """Sum of products over the given axes, in float32, `x`'s dtype inside."""
  # TF32 would lose half of the digits that float32 is asked for.
  precision = 'highest' if x.dtype == jnp.float32 else None
  # Adapters come as float32 masters and are rounded here, where they are used.
  return jax.lax.dot_general(
    x,
    y.astype(x.dtype),
    ((x_axes, y_axes), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


@jax.custom_vjp
def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
  """x [..., in] times w [out, in] -> float32 [..., out].

  Left to itself, the gradient of a bfloat16 product with a float32 result is a
  float32 product, at half the speed; here it is a bfloat16 product, too.
  """
  return _contract(x, w, (x.ndim - 1,), (1,))


def _dot_forward(
  x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _dot(x, w), (x, w)


def _dot_backward(
  saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, w = saved
  dy = dy.astype(x.dtype)
  dx = _contract(dy, w, (dy.ndim - 1,), (0,))
  # The base is not trained: nobody asks for the gradient of w, and its product
  # is dropped as dead code.
  return dx.astype(x.dtype), _outer(dy, x).astype(w.dtype)


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
  """Sum over all rows of x [..., m] and y [..., n]: float32 [m, n]."""
  rows = tuple(range(x.ndim - 1))
  return _contract(x, y, rows, rows)


_dot.defvjp(_dot_forward, _dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lora_dot(
  scale: float, x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array
) -> jax.Array:
  """x W' + scale (x A') B' -> float32 [..., out]; a, b: float32 masters.

  One rule for the sum, so that its gradients add up in float32 and x is
  rounded once; see _dot.
  """
  return _lora_dot_forward(scale, x, w, a, b)[0]


def _lora_dot_forward(
  scale: float, x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  last = (x.ndim - 1,)
  # Kept by the remat policy 'products': R numbers a position, for a product over
  # all of x.
  low = checkpoint_name(_contract(x, a, last, (1,)), 'product').astype(x.dtype)
  y = _contract(x, w, last, (1,)) + scale * _contract(low, b, last, (1,))
  return y, (x, w, a, b, low)


def _lora_dot_backward(
  scale: float, saved: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, ...]:
  x, w, a, b, low = saved
  dy, last = dy.astype(x.dtype), (x.ndim - 1,)
  dlow = (scale * _contract(dy, b, last, (0,))).astype(x.dtype)
  # Added in float32 and rounded once, below.
  dx = _contract(dy, w, last, (0,)) + _contract(dlow, a, last, (0,))
  # The narrow factor first: XLA for CPU transposes the first one in memory, and
  # the wide one costs more to transpose than to multiply. The barrier keeps it
  # from turning the product round again.
  return (
    dx.astype(x.dtype),
    _outer(dy, x).astype(w.dtype),
    # dlow has the scale already; that of B is put in here.
    _outer(dlow, x),
    jax.lax.optimization_barrier(scale * _outer(low, dy)).T,
  )


_lora_dot.defvjp(_lora_dot_forward, _lora_dot_backward)


def _as_bits(y: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(y.astype(jnp.bfloat16), jnp.uint16)
  bits = checkpoint_name(bits, 'product')
  return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


@jax.custom_vjp
def _keep_bits(y: jax.Array) -> jax.Array:
  """y as bfloat16, saved for the backward pass as integers.

  XLA for CPU would convert the saved arrays of all layers to float32 and back
  to write one layer's.
  """
  return _as_bits(y)


# Not _keep_bits again: remat policies see no name inside a custom gradient.
_keep_bits.defvjp(
  # The zero tells y's dtype: residuals are arrays. Rounding lets gradients
  # through.
  lambda y: (_as_bits(y), jnp.zeros((), y.dtype)),
  lambda like, dy: (dy.astype(like.dtype),),
)


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  # Hugging Face rounds to the dtype of x before the weight comes in; here the
  # product that takes this up rounds, once.
  return x32 * scale * weight


def rope_frequencies(config: families.DecoderConfig) -> jax.Array:
  """Inverse frequencies, float32 [C / 2], with Llama 3 scaling if asked for.

  Llama 3.1 stretches wavelengths longer than original_length / low_freq_factor
  by `factor`, keeps those shorter than original_length / high_freq_factor and
  interpolates between (formula: transformers, modeling_rope_utils.py).
  """
  exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32)
  frequencies = config.rope_theta ** (-exponents / config.head_dim)
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  # How often each frequency goes round within the context of the pretraining.
  turns = scaling.original_length * frequencies / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  # 1: as it is, of short wavelengths; 0: stretched by the whole factor.
  keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
  return frequencies * (keep + (1 - keep) / scaling.factor)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotary embedding of x [B, L, heads, C]; halves, as Hugging Face does."""
  # Dimension i turns with i + C / 2. GGUF's pairs (2 i, 2 i + 1) are undone at
  # import (gguf_import.unpermute).
  first, second = jnp.split(x, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  return x * cos + turned * sin


class Linear(nnx.Module):
  """y = x W' + (alpha / R) (x A') B' with all layers' weights stacked."""

  def __init__(
    self,
    kernel: jax.Array,
    lora: tuple[jax.Array, jax.Array] | None = None,
    scale: float = 1.0,
  ):
    """kernel [layers, out, in]; lora None or (A [layers, R, in], B [.., R])."""
    self.kernel = nnx.Param(kernel)
    self.scale = scale
    self.has_lora = lora is not None
    if lora is not None:
      self.lora_a = nnx.LoRAParam(lora[0])
      self.lora_b = nnx.LoRAParam(lora[1])

  def __call__(self, x: jax.Array) -> jax.Array:
    """float32 [..., out] of x [..., in], which is rounded to kernel's dtype."""
    kernel = self.kernel[...]
    x = x.astype(kernel.dtype)
    if not self.has_lora:
      return _dot(x, kernel)
    return _lora_dot(self.scale, x, kernel, self.lora_a[...], self.lora_b[...])


class Layer(nnx.Module):
  """One pre-norm block; every weight has the leading axis `layers`."""

  def __init__(
    self,
    config: families.DecoderConfig,
    params: Mapping[str, jax.Array],
    lora: Mapping[str, tuple[jax.Array, jax.Array]],
    scale: float,
    between: jnp.dtype,
    constrain: Constrain,
  ):
    """between: dtype of what flows between the products; constrain: see
    Execution."""
    self.config = config
    self.between = between
    self.constrain = constrain
    self.attention_norm = nnx.Param(params['layers.attention_norm'])
    self.mlp_norm = nnx.Param(params['layers.mlp_norm'])
    for name in PROJECTIONS:
      kernel = params[f'layers.{name}']
      setattr(self, name, Linear(kernel, lora.get(name), scale))

  def __call__(
    self,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    attend: Attend,
    memory: Cache | None,
  ) -> tuple[jax.Array, Cache]:
    """x [B, L, D] -> the same; also this layer's keys, values [B, L, K, C]."""
    eps = self.config.norm_eps
    x = self.constrain(x, _ROWS)
    y = _rms_norm(x, self.attention_norm[...], eps)
    attended, cache = self._attend(y, cos, sin, attend, memory)
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

  def _keep(self, y: jax.Array) -> jax.Array:
    # The name has the remat policy 'products' save it.
    return checkpoint_name(y.astype(self.between), 'product')

  def _round(self, y: jax.Array) -> jax.Array:
    """The same, in the weights' dtype: what products or their like take up."""
    dtype = self.o_proj.kernel[...].dtype
    if dtype == self.between:
      return self._keep(y)
    return _keep_bits(y)

  def _attend(
    self,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    attend: Attend,
    memory: Cache | None,
  ) -> tuple[jax.Array, Cache]:
    batch, length = x.shape[:2]
    heads = lambda y, axis: self.constrain(
      y.reshape(batch, length, -1, self.config.head_dim), ('batch', None, axis, None)
    )
    q = self._round(_rotate(heads(self.q_proj(x), 'heads'), cos, sin))
    # Keys are cached turned: a position in a segment never changes.
    k = self._round(_rotate(heads(self.k_proj(x), 'kv_heads'), cos, sin))
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
    params: Mapping[str, jax.Array],
    lora: Mapping[str, tuple[jax.Array, jax.Array]] | None = None,
    scale: float = 1.0,
    how: Execution = _PLAIN,
  ):
    """Wraps arrays (or ShapeDtypeStructs); nothing is initialised here.

    Args:
      config: dimensions.
      params: base weights by our names (families.parameter_shapes), compute dtype.
      lora: {projection: (A, B)}, float32, or None for the bare base model.
      scale: alpha / rank.
      how: changes speed and memory alone.
    """
    self.config = config
    self.constrain = how.constrain
    self.remat = how.remat
    self.packed = how.packed
    self.on_cpu = (how.backend or jax.default_backend()) == 'cpu'
    dtype = params['embed'].dtype
    # A CPU has no bfloat16 arithmetic outside of products: each operation would
    # convert there and back. Accelerators want the smaller arrays.
    between = jnp.dtype(jnp.float32) if self.on_cpu else dtype
    self.embed = nnx.Param(params['embed'])
    self.final_norm = nnx.Param(params['final_norm'])
    self.layers = Layer(config, params, lora or {}, scale, between, how.constrain)
    if not config.tied:
      self.head = nnx.Param(params['head'])

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    memory: Cache | None = None,
    keep_cache: bool = False,
  ) -> tuple[jax.Array, Cache | None]:
    """Hidden states after the final norm.

    Args:
      tokens: int32 [B, L].
      positions: int32 [B, L], position of each token in its own segment.
      attend: (q, k, v) -> y, attention among these tokens alone; with `memory`
        (q, k, v, memory_k, memory_v) -> y. See model.attention for shapes.
      memory: keys and values of earlier tokens, each [layers, B, M, K, C].
      keep_cache: also return keys and values of these tokens.

    Returns:
      Hidden states [B, L, D] in the compute dtype, and the cache or None.
    """
    table = self.constrain(self._bits(self.embed[...]), _TABLE)
    embedded = self.constrain(self._unpacked(table[tokens]), _ROWS)
    x = embedded.astype(self.layers.between)
    # For attention that leaves precision open; _contract asks for its own.
    precise = 'highest' if embedded.dtype == jnp.float32 else None
    with jax.default_matmul_precision(precise):
      # In float32: beyond 256 bfloat16 skips positions.
      angles = positions[..., None] * rope_frequencies(self.config)
      # Both halves of a head turn by the same angles, all heads alike.
      angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
      x, cache = self._scan(
        x, jnp.cos(angles), jnp.sin(angles), attend, memory, keep_cache
      )
    x = _rms_norm(x, self.final_norm[...], self.config.norm_eps)
    return x.astype(embedded.dtype), cache

  def packed_hidden(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    keep_cache: bool = False,
  ) -> tuple[jax.Array, Cache | None]:
    """Hidden states of packed rows; segments int32 [B, L], 0 is padding."""
    attend = functools.partial(self.packed, segments=segments)
    return self(tokens, positions, attend, keep_cache=keep_cache)

  def prefill(self, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Cache]:
    """Runs prompts int32 [B, P] padded on the right; lengths int32 [B].

    Returns the hidden state after each prompt [B, D] and the keys and values.
    """
    batch, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    # Padding stands behind its prompt and is causally out of its sight, but its
    # keys are in the cache: whoever reads that has to mask them.
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    hidden, cache = self.packed_hidden(tokens, positions, segments, keep_cache=True)
    last = hidden[jnp.arange(batch), lengths - 1]
    return last, cache

  def _scan(
    self,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    attend: Attend,
    memory: Cache | None,
    keep_cache: bool,
  ) -> tuple[jax.Array, Cache | None]:
    graphdef, state = nnx.split(self.layers)

    def block(x: jax.Array, scanned: tuple) -> tuple[jax.Array, Cache | None]:
      state, memory = self._unpacked(scanned)
      layer = nnx.merge(graphdef, state)
      x, cache = layer(x, cos, sin, attend, memory)
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

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D]."""
    return _dot(hidden, self._head)

  def logits_of(self, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """Those float32 [n] of one token [n] after each hidden state [n, D]."""
    # One row of the head for each state, not all V of them.
    rows = self._head[tokens].astype(hidden.dtype)
    products = hidden.astype(jnp.float32) * rows.astype(jnp.float32)
    return jnp.sum(products, axis=-1)

  @property
  def _head(self) -> jax.Array:
    head = self.embed if self.config.tied else self.head
    return self.constrain(head[...], _TABLE)
