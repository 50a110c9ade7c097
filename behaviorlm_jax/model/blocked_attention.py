"""Attention for CPUs: a block of queries at a time, or of any mask.

Heads come before positions, the layout that XLA for CPU multiplies fastest, and
the G query heads of a key head stand below each other as rows of one product:
q [B, K, G, L, C], its rows [B, K, G L, C], k and v [B, K, M, C]. The other
letters are those of `attention`, to which this is one of the implementations.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from behaviorlm_jax.model import products

_BLOCK = 64  # Queries at a time: scores of a block stay in a CPU's cache.


def blocked(q: Array, k: Array, v: Array, segments: Array) -> Array:
  """Causal attention inside each segment; float32 [B, L, H, C].

  A block sees only keys up to its own end, which saves up to half of the work.
  """
  # Queries are scaled rather than scores: C numbers each instead of M.
  q = _by_key_head(scaled(q), k.shape[2])
  y = _blocked(q, k.swapaxes(1, 2), v.swapaxes(1, 2), segments)
  return _by_position(y)


def scaled(q: Array) -> Array:
  # In float32: the factor may not exist in bfloat16.
  return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def grouped(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """Masked attention of scaled queries; float32 [B, L, H, C].

  mask bool [B, 1, L, M], k and v [B, M, K, C].
  """
  q = _by_key_head(q, k.shape[2])
  bias = _bias(mask[:, 0], q.shape[2])
  y, _ = _attend(_rows(q), k.swapaxes(1, 2), v.swapaxes(1, 2), bias)
  return _by_position(y.reshape(q.shape))


def _by_key_head(q: Array, kv_heads: int) -> Array:
  batch, length, heads, size = q.shape
  # Query heads of one key head are neighbors: h attends by key head h // G.
  q = q.reshape(batch, length, kv_heads, heads // kv_heads, size)
  return q.transpose(0, 2, 3, 1, 4)


def _by_position(y: Array) -> Array:
  y = y.transpose(0, 3, 1, 2, 4)
  return y.reshape(*y.shape[:2], -1, y.shape[-1])


def _rows(x: Array) -> Array:
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _bias(mask: Array, groups: int, axis: int = 1) -> Array:
  """float32 [B, 1, G L, M], to add to scores: 0 where mask [B, L, M], or -inf.

  `axis`: of the queries in mask, which may be the last.
  """
  # The G query heads of a key head have one mask.
  mask = jnp.concatenate([mask] * groups, axis=axis)[:, None]
  bias = jnp.where(mask, jnp.float32(0), -jnp.inf)
  # XLA would work out the mask again for every score of every head, which takes
  # longer than the products: the barrier has it make the bias once.
  return jax.lax.optimization_barrier(bias)


def _attend(q: Array, k: Array, v: Array, bias: Array) -> tuple[Array, Array]:
  """Attention of rows q, float32, and the logsumexp of its scores [.., 1]."""
  scores = _product(q, k, 3, 3) + bias
  # The largest score goes out first, so no exp overflows. It is finite, as each
  # query sees a key at least: -inf less it is -inf, of weight zero.
  top = scores.max(axis=-1, keepdims=True)
  weights = jnp.exp(scores - top)
  total = weights.sum(axis=-1, keepdims=True)
  # Divided at the end: C numbers a row instead of M, and the total is that of
  # the weights before they are rounded.
  y = _product(weights.astype(q.dtype), v, 3, 2) / total
  return y, top + jnp.log(total)


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
  """One product per row and key head."""
  return products.contract(x, y, (x_axis,), (y_axis,), batch=(0, 1))


def _blocks(segments: Array) -> Iterator[tuple[int, int, Array]]:
  """Yields where each block of queries begins and ends, and what it sees.

  That is bool [B, end - begin, end]: causal, and inside each segment.
  """
  length = segments.shape[1]
  for begin in range(0, length, _BLOCK):
    end = min(begin + _BLOCK, length)
    same = segments[:, begin:end, None] == segments[:, None, :end]
    yield begin, end, same & jnp.tri(end - begin, end, begin, bool)


@jax.custom_vjp
def _blocked(q: Array, k: Array, v: Array, segments: Array) -> Array:
  """Causal attention inside each segment; float32 [B, K, G, L, C].

  The backward pass computes the weights again, and multiplies in the dtype of
  q (gradients: Dao et al., FlashAttention, appendix B.2).
  """
  return _blocked_forward(q, k, v, segments)[0]


def _blocked_forward(
  q: Array, k: Array, v: Array, segments: Array
) -> tuple[Array, tuple[Array, ...]]:
  ys, sums = [], []
  for begin, end, mask in _blocks(segments):
    block = q[:, :, :, begin:end]
    bias = _bias(mask, q.shape[2])
    y, total = _attend(_rows(block), k[:, :, :end], v[:, :, :end], bias)
    ys.append(y.reshape(block.shape))
    sums.append(total.reshape(*block.shape[:4], 1))
  # Both are kept by the remat policy 'products': with the sums the backward pass
  # has its weights as exp(scores - sums), without another softmax.
  y, sums = (checkpoint_name(jnp.concatenate(x, axis=3), 'product') for x in (ys, sums))
  return y, (q, k, v, segments, y, sums)


def _blocked_backward(
  saved: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array, None]:
  """Scores stand transposed here, [B, K, M, G L].

  So every product but that of dq sums over the last axis of its first factor,
  the only form that XLA for CPU multiplies in bfloat16; for dq the narrow
  factor is transposed, and the narrow result back.
  """
  q, k, v, segments, y, sums = saved
  groups = q.shape[2]
  # Of the softmax's gradient: what each row's weights average of their own
  # gradients is dy . y. In float32, before dy is rounded.
  inside = jnp.sum(dy * y, axis=-1, keepdims=True)
  dy = dy.astype(q.dtype)
  # Transposed once for all blocks (as in products.lora_dot).
  flat = jax.lax.optimization_barrier(k.swapaxes(2, 3))
  dqs, dks, dvs = [], [], []
  for begin, end, mask in _blocks(segments):
    block, dy_block, sum_block, inside_block = (
      _rows(x[:, :, :, begin:end]) for x in (q, dy, sums, inside)
    )
    # Those of the forward pass, divided already. What is masked is exactly
    # zero, and so is its dscores.
    scores = _product(k[:, :, :end], block, 3, 3)
    bias = _bias(mask.swapaxes(1, 2), groups, axis=2)
    weights = jnp.exp(scores + bias - sum_block.swapaxes(2, 3))
    dweights = _product(v[:, :, :end], dy_block, 3, 3)
    dscores = weights * (dweights - inside_block.swapaxes(2, 3))
    dscores = dscores.astype(q.dtype)
    dvs.append(_product(weights.astype(q.dtype), dy_block, 3, 2))
    dks.append(_product(dscores, block, 3, 2))
    dq = jax.lax.optimization_barrier(_product(flat[..., :end], dscores, 3, 2))
    dqs.append(dq.swapaxes(2, 3).reshape(*q.shape[:3], -1, q.shape[-1]))
  # No factor C ** -0.5: q came in scaled, and `scaled` has a gradient of its
  # own.
  dq = jnp.concatenate(dqs, axis=3)
  return dq.astype(q.dtype), _add_up(dks, k), _add_up(dvs, v), None


def _add_up(parts: Sequence[Array], like: Array) -> Array:
  """Sum of what the blocks say of keys, each of those up to its own end."""
  sums = []
  for i in range(len(parts)):
    # Earlier blocks end before these keys.
    keys = slice(i * _BLOCK, (i + 1) * _BLOCK)
    sums.append(sum(part[:, :, keys] for part in parts[i:]))
  return jnp.concatenate(sums, axis=2).astype(like.dtype)


_blocked.defvjp(_blocked_forward, _blocked_backward)
