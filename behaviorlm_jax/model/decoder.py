"""A Llama-family decoder in Flax NNX, its layers stacked and scanned.

Invariants:
  * Weights keep the Hugging Face layout [out, in]; layer weights carry a
    leading axis `layers`. Nothing is permuted, folded or fused, so import and
    export are a table of names.
  * Base weights are `nnx.Param` in the compute dtype and never trained; adapter
    weights are `nnx.LoRAParam` in float32. `nnx.split(model, nnx.LoRAParam,
    ...)` is all that training needs to tell them apart.
  * The caller gives the attention mask, so one forward pass serves packed
    training rows, prompts and the label tree.

Shapes in comments: B batch, L query length, M memory (cache) length, D embed,
H query heads, K key-value heads, C head_dim, V vocab, R LoRA rank.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

PROJECTIONS = (
    'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'
)
REMAT_POLICIES = {
    'none': None,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _contract(x, y, x_axes, y_axes):
  """Sum of products over the given axes, in float32, `x`'s dtype inside."""
  # TF32 would lose half of the digits that float32 is asked for.
  precision = 'highest' if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(x, y.astype(x.dtype), ((x_axes, y_axes), ((), ())),
                             precision=precision,
                             preferred_element_type=jnp.float32)


@jax.custom_vjp
def _dot(x, w):
  """x [..., in] times w [out, in] -> float32 [..., out].

  Left to itself, the gradient of a bfloat16 product with a float32 result is a
  float32 product, at half the speed; here it is a bfloat16 product, too. `w`
  may be a float32 master; its gradient then is float32.
  """
  return _contract(x, w, (x.ndim - 1,), (1,))


def _dot_forward(x, w):
  return _dot(x, w), (x, w)


def _dot_backward(saved, dy):
  x, w = saved
  dy = dy.astype(x.dtype)
  rows = tuple(range(x.ndim - 1))
  dx = _contract(dy, w, (x.ndim - 1,), (0,))
  return dx.astype(x.dtype), _contract(dy, x, rows, rows).astype(w.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


def _rms_norm(x, weight, eps):
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * scale).astype(x.dtype) * weight


def rope_frequencies(config):
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
  turns = scaling.original_length * frequencies / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
  return frequencies * (keep + (1 - keep) / scaling.factor)


def _rotate(x, cos, sin):
  """Rotary embedding of x [B, L, heads, C]; halves, as Hugging Face does."""
  x32 = x.astype(jnp.float32)
  first, second = jnp.split(x32, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  return (x32 * cos + turned * sin).astype(x.dtype)


def causal_mask(segments):
  """Mask [B, 1, L, L] of packed rows; segments int32 [B, L], 0 is padding."""
  same = segments[:, None, :, None] == segments[:, None, None, :]
  length = segments.shape[1]
  return same & jnp.tril(jnp.ones((length, length), bool))


class Linear(nnx.Module):
  """y = x W' + (alpha / R) (x A') B' with all layers' weights stacked."""

  def __init__(self, kernel, lora=None, scale=1.0):
    """kernel [layers, out, in]; lora None or (A [layers, R, in], B [.., R])."""
    self.kernel = nnx.Param(kernel)
    self.scale = scale
    self.has_lora = lora is not None
    if lora is not None:
      self.lora_a = nnx.LoRAParam(lora[0])
      self.lora_b = nnx.LoRAParam(lora[1])

  def __call__(self, x):
    y = _dot(x, self.kernel[...])
    if self.has_lora:
      low = _dot(x, self.lora_a[...]).astype(x.dtype)
      y += self.scale * _dot(low, self.lora_b[...])
    return y.astype(x.dtype)


class Layer(nnx.Module):
  """One pre-norm block; every weight has the leading axis `layers`."""

  def __init__(self, config, params, lora, scale):
    self.config = config
    self.attention_norm = nnx.Param(params['layers.attention_norm'])
    self.mlp_norm = nnx.Param(params['layers.mlp_norm'])
    for name in PROJECTIONS:
      kernel = params[f'layers.{name}']
      setattr(self, name, Linear(kernel, lora.get(name), scale))

  def __call__(self, x, cos, sin, mask, memory):
    eps = self.config.norm_eps
    attended, cache = self._attend(
        _rms_norm(x, self.attention_norm[...], eps), cos, sin, mask, memory
    )
    x = x + attended
    y = _rms_norm(x, self.mlp_norm[...], eps)
    y = jax.nn.silu(self.gate_proj(y)) * self.up_proj(y)
    return x + self.down_proj(y), cache

  def _attend(self, x, cos, sin, mask, memory):
    batch, length = x.shape[:2]
    heads = lambda y: y.reshape(batch, length, -1, self.config.head_dim)
    q = _rotate(heads(self.q_proj(x)), cos, sin)
    k = _rotate(heads(self.k_proj(x)), cos, sin)
    v = heads(self.v_proj(x))
    if memory is not None:
      k = jnp.concatenate([memory[0], k], axis=1)
      v = jnp.concatenate([memory[1], v], axis=1)
    y = jax.nn.dot_product_attention(q, k, v, mask=mask)
    return self.o_proj(y.reshape(batch, length, -1)), (k, v)


class Decoder(nnx.Module):
  """Token ids to hidden states; `logits` is separate, for chosen positions."""

  def __init__(self, config, params, lora=None, scale=1.0, remat='none'):
    """Wraps arrays (or ShapeDtypeStructs); nothing is initialised here.

    Args:
      config: families.DecoderConfig.
      params: base weights by our names (families.shapes), compute dtype.
      lora: {projection: (A, B)}, float32, or None for the bare base model.
      scale: alpha / rank.
      remat: key of REMAT_POLICIES, applied to each layer.
    """
    self.config = config
    self.remat = remat
    self.embed = nnx.Param(params['embed'])
    self.final_norm = nnx.Param(params['final_norm'])
    self.layers = Layer(config, params, lora or {}, scale)
    if not config.tied:
      self.head = nnx.Param(params['head'])

  def __call__(self, tokens, positions, mask, memory=None, keep_cache=False):
    """Hidden states after the final norm.

    Args:
      tokens: int32 [B, L].
      positions: int32 [B, L], position of each token in its own segment.
      mask: bool [B, 1, L, M + L], True where a query may look.
      memory: keys and values of earlier tokens, each [layers, B, M, K, C].
      keep_cache: also return keys and values of memory and tokens together.

    Returns:
      Hidden states [B, L, D] in the compute dtype, and the cache or None.
    """
    x = self.embed[...][tokens]
    precise = 'highest' if x.dtype == jnp.float32 else None
    with jax.default_matmul_precision(precise):
      angles = positions[..., None] * rope_frequencies(self.config)
      angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
      x, cache = self._scan(x, jnp.cos(angles), jnp.sin(angles), mask, memory,
                            keep_cache)
    return _rms_norm(x, self.final_norm[...], self.config.norm_eps), cache

  def _scan(self, x, cos, sin, mask, memory, keep_cache):
    graphdef, state = nnx.split(self.layers)

    def block(x, scanned):
      state, memory = scanned
      x, cache = nnx.merge(graphdef, state)(x, cos, sin, mask, memory)
      return x, cache if keep_cache else None

    if self.remat != 'none':
      block = jax.checkpoint(block, policy=REMAT_POLICIES[self.remat],
                             prevent_cse=False)
    return jax.lax.scan(block, x, (state, memory))

  def logits(self, hidden):
    """Float32 logits [..., V] of hidden states [..., D]."""
    head = self.embed[...] if self.config.tied else self.head[...]
    return _dot(hidden, head)
