"""Attention of packed training rows, by whatever the backend does fastest.

Every implementation is a function (q, k, v, segments) -> y: causal attention
inside each segment, with grouped heads. `choose_implementation` turns
config.model.attention into one of their names before anything large is compiled;
the reference says what is right, the others differ from it by rounding alone.

Invariants:
  * A position attends to itself, padding (segment 0) included. So no softmax is
    over nothing, and neither values nor gradients are ever NaN.
  * Other segments of a row get weights, and so gradients, of exactly zero.

Shapes: q [B, L, H, C]; k and v [B, L, K, C] with H a multiple of K; segments
int32 [B, L]. B batch, L length, H query heads, K key-value heads, C head_dim.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import families

_LANES = 128  # Splash attention works on multiples of a TPU's vector width.
# The largest that divides a length is taken; _pad sees to it that one does.
_BLOCKS = (512, 256, _LANES)


# (q, k, v, segments) -> y.
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def causal_mask(segments: jax.Array) -> jax.Array:
  """Mask [B, 1, L, L] of packed rows; segments int32 [B, L], 0 is padding."""
  length = segments.shape[1]
  # Segments lie one behind the other in a row, so the order of the row is that
  # inside each of them.
  return _same(segments) & jnp.tril(jnp.ones((length, length), bool))


def _same(segments: jax.Array) -> jax.Array:
  # The axis of length 1 is that of heads: one mask for all.
  return segments[:, None, :, None] == segments[:, None, None, :]


def masked_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
  """The reference, for any mask: bool [B, 1, L, M], k and v [B, M, K, C]."""
  # It scales by C ** -0.5, repeats grouped heads and has its softmax in float32
  # whatever the dtype of q.
  return jax.nn.dot_product_attention(q, k, v, mask=mask)


def reference_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> jax.Array:
  return masked_attention(q, k, v, causal_mask(segments))


_BLOCK = 64  # Queries at a time: scores of a block stay in a CPU's cache.


def blocked(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
  """The reference in blocks of queries, for CPUs.

  A block sees only keys up to its own end, which saves up to half of the work.
  """
  # Queries are scaled rather than scores: C numbers each instead of M.
  q = _by_key_head(scaled(q), k.shape[2])
  y = _blocked(q, k.swapaxes(1, 2), v.swapaxes(1, 2), segments)
  return _by_position(y)


def scaled(q: jax.Array) -> jax.Array:
  # In float32: the factor may not exist in bfloat16.
  return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def grouped(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
  """Masked attention of scaled queries; float32 [B, L, H, C].

  mask bool [B, 1, L, M], k and v [B, M, K, C].
  """
  q = _by_key_head(q, k.shape[2])
  y, _ = _attend(
    _rows(q), k.swapaxes(1, 2), v.swapaxes(1, 2), _bias(mask[:, 0], q.shape[2])
  )
  return _by_position(y.reshape(q.shape))


# From here on heads come before positions, the layout that XLA for CPU
# multiplies fastest, and the G query heads of a key head stand below each other
# as rows of one product: q [B, K, G, L, C], its rows [B, K, G L, C], k and v
# [B, K, M, C].


def _by_key_head(q: jax.Array, kv_heads: int) -> jax.Array:
  batch, length, heads, size = q.shape
  # Query heads of one key head are neighbors: h attends by key head h // G.
  q = q.reshape(batch, length, kv_heads, heads // kv_heads, size)
  return q.transpose(0, 2, 3, 1, 4)


def _by_position(y: jax.Array) -> jax.Array:
  y = y.transpose(0, 3, 1, 2, 4)
  return y.reshape(*y.shape[:2], -1, y.shape[-1])


def _rows(x: jax.Array) -> jax.Array:
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _bias(mask: jax.Array, groups: int, axis: int = 1) -> jax.Array:
  """float32 [B, 1, G L, M], to add to scores: 0 where mask [B, L, M], or -inf.

  `axis`: of the queries in mask, which may be the last. The barrier has XLA
  make the bias once: it would work out the mask again for every score of every
  head, which takes longer than the products.
  """
  # The G query heads of a key head have one mask.
  mask = jnp.concatenate([mask] * groups, axis=axis)[:, None]
  bias = jnp.where(mask, jnp.float32(0), -jnp.inf)
  return jax.lax.optimization_barrier(bias)


def _attend(
  q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Attention of rows q, float32, and the logsumexp of its scores [.., 1]."""
  scores = _products(q, k, 3, 3) + bias
  # The largest score goes out first, so no exp overflows. It is finite, as each
  # query sees a key at least: -inf less it is -inf, of weight zero.
  top = scores.max(axis=-1, keepdims=True)
  weights = jnp.exp(scores - top)
  total = weights.sum(axis=-1, keepdims=True)
  # Divided at the end: C numbers a row instead of M, and the total is that of
  # the weights before they are rounded.
  y = _products(weights.astype(q.dtype), v, 3, 2) / total
  return y, top + jnp.log(total)


@jax.custom_vjp
def _blocked(
  q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> jax.Array:
  """Causal attention inside each segment; float32 [B, K, G, L, C].

  The backward pass computes the weights again, and multiplies in the dtype of
  q (gradients: Dao et al., FlashAttention, appendix B.2).
  """
  return _blocked_forward(q, k, v, segments)[0]


def _blocked_forward(
  q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  groups, parts = q.shape[2], []
  for begin, end in _blocks(q.shape[3]):
    block = q[:, :, :, begin:end]
    # Of the mask of all up to `end`, the rows of this block.
    bias = _bias(causal_mask(segments[:, :end])[:, 0, begin:], groups)
    parts.append(
      [
        x.reshape(*block.shape[:4], -1)
        for x in _attend(_rows(block), k[:, :, :end], v[:, :, :end], bias)
      ]
    )
  # Both are kept by the remat policy 'products': with the sums the backward pass
  # has its weights as exp(scores - sums), without another softmax.
  y, sums = (
    checkpoint_name(jnp.concatenate(x, axis=3), 'product')
    for x in zip(*parts, strict=True)
  )
  return y, (q, k, v, segments, y, sums)


def _blocked_backward(
  saved: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array | None, ...]:
  """Scores stand transposed here, [B, K, M, G L].

  So every product but that of dq sums over the last axis of its first factor,
  the only form that XLA for CPU multiplies in bfloat16; for dq the narrow
  factor is transposed, and the narrow result back.
  """
  q, k, v, segments, y, sums = saved
  groups, length = q.shape[2:4]
  # Of the softmax's gradient: what each row's weights average of their own
  # gradients is dy . y. In float32, before dy is rounded.
  inside = jnp.sum(dy * y, axis=-1, keepdims=True)
  dy = dy.astype(q.dtype)
  # Transposed once for all blocks (as in decoder._lora_dot_backward).
  flat = jax.lax.optimization_barrier(k.swapaxes(2, 3))
  dqs, dks, dvs = [], [], []
  for begin, end in _blocks(length):
    block, dy_block, sum_block, inside_block = (
      _rows(x[:, :, :, begin:end]) for x in (q, dy, sums, inside)
    )
    mask = causal_mask(segments[:, :end])[:, 0, begin:]
    bias = _bias(mask.swapaxes(1, 2), groups, axis=2)
    # Those of the forward pass, divided already. What is masked is exactly
    # zero, and so is its dscores.
    weights = jnp.exp(
      _products(k[:, :, :end], block, 3, 3) + bias - sum_block.swapaxes(2, 3)
    )
    dscores = weights * (
      _products(v[:, :, :end], dy_block, 3, 3) - inside_block.swapaxes(2, 3)
    )
    dscores = dscores.astype(q.dtype)
    dvs.append(_products(weights.astype(q.dtype), dy_block, 3, 2))
    dks.append(_products(dscores, block, 3, 2))
    dq = _products(flat[..., :end], dscores, 3, 2)
    dq = jax.lax.optimization_barrier(dq).swapaxes(2, 3)
    dqs.append(dq.reshape(*dq.shape[:2], groups, -1, dq.shape[-1]))
  # No factor C ** -0.5: q came in scaled, and `scaled` has a gradient of its
  # own.
  dq = jnp.concatenate(dqs, axis=3)
  return (
    dq.astype(q.dtype),
    _add_up(dks, length).astype(k.dtype),
    _add_up(dvs, length).astype(v.dtype),
    None,
  )


def _blocks(length: int) -> list[tuple[int, int]]:
  return [(begin, min(begin + _BLOCK, length)) for begin in range(0, length, _BLOCK)]


def _add_up(parts: Sequence[jax.Array], length: int) -> jax.Array:
  """Sum of what the blocks say of keys, each of those up to its own end."""
  return jnp.concatenate(
    [
      # Earlier blocks end before these keys.
      sum(part[:, :, begin:end] for part in parts[i:])
      for i, (begin, end) in enumerate(_blocks(length))
    ],
    axis=2,
  )


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _products(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
  """One product per row and key head, in float32."""
  precision = 'highest' if x.dtype == jnp.float32 else None  # See decoder.
  return jax.lax.dot_general(
    x,
    y,
    (((x_axis,), (y_axis,)), ((0, 1), (0, 1))),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
  """cuDNN's flash attention: NVIDIA GPUs, half precision.

  cuDNN skips what lies above the diagonal; segments reach it as a mask, whose
  bias (and, in jax 0.10, its unused gradient) take 2 B L L bytes each. Its own
  packed layout would need Hopper, and jax 0.10 reaches it by private names,
  counting the offsets of grouped keys in query heads.
  """
  length = q.shape[1]
  # With a mask, cuDNN differentiates even lengths only.
  q, k, v, segments = _pad(2, q, k, v, segments)
  y = jax.nn.dot_product_attention(
    q, k, v, mask=_same(segments), is_causal=True, implementation='cudnn'
  )
  return y[:, :length]


def pallas(
  q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, interpret: bool = False
) -> jax.Array:
  """Splash attention, a Pallas kernel for TPUs; `interpret` runs it anywhere.

  It knows grouped heads, and never visits blocks above the diagonal.
  """
  length = q.shape[1]
  # Queries are scaled here, as the kernel does not.
  q, k, v, segments = _pad(_LANES, scaled(q), k, v, segments)
  kernel = _splash(q.shape[1], q.shape[2], interpret)
  heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
  # The kernel takes one row, [heads, L, C].
  y = jax.vmap(kernel)(*heads_first, splash_attention.SegmentIds(segments, segments))
  return y.swapaxes(1, 2)[:, :length]


def _splash(length: int, heads: int, interpret: bool) -> Callable[..., jax.Array]:
  block = next(b for b in _BLOCKS if length % b == 0)
  sizes = splash_attention.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  mask = splash_attention.CausalMask((length, length))
  return splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
    # What its backward pass reads, by the name that REMAT_POLICIES save.
    residual_checkpoint_name='product',
  )


def _pad(multiple: int, *arrays: jax.Array) -> list[jax.Array]:
  """Axis 1 of each array, filled with zeros up to a multiple."""
  # At the end, where no real position looks: attention is causal.
  more = -arrays[0].shape[1] % multiple
  return [
    jnp.pad(x, [(0, more if axis == 1 else 0) for axis in range(x.ndim)])
    for x in arrays
  ]


IMPLEMENTATIONS = {
  'reference': reference_attention,
  'blocked': blocked,
  'cudnn': cudnn,
  'pallas': pallas,
}
_FASTEST = {'cpu': 'blocked', 'gpu': 'cudnn', 'tpu': 'pallas'}
_KERNEL_OF = {'cudnn': 'gpu', 'pallas': 'tpu'}  # Opaque to XLA.


def packed_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: jax.Array,
  implementation: str = 'reference',
  where: jax.sharding.NamedSharding | None = None,
) -> jax.Array:
  """Causal attention inside each segment of packed rows.

  Args:
    q, k, v, segments: see the module.
    implementation: key of IMPLEMENTATIONS, from `choose_implementation`.
    where: NamedSharding of k, over rows and heads; None on a single device. XLA
      cannot divide a kernel, so each device runs it on its own part.

  Returns:
    y [B, L, H, C] in the dtype of q, or in float32.
  """
  attend = IMPLEMENTATIONS[implementation]
  if implementation in _KERNEL_OF and where is not None:
    attend = on_each_device(attend, where)
  return attend(q, k, v, segments)


def on_each_device(attend: Attention, where: jax.sharding.NamedSharding) -> Attention:
  part = where.spec
  # Kernels do not declare over which axes their results vary.
  return jax.shard_map(
    attend,
    mesh=where.mesh,
    out_specs=part,
    # Heads of queries are divided as those of keys, so each device has what
    # belongs together; segments have rows, but no heads.
    in_specs=(part, part, part, PartitionSpec(*part[:1])),
    check_vma=False,
  )


def choose_implementation(
  wanted: str,
  device: jax.Device,
  config: families.DecoderConfig,
  dtype: jax.typing.DTypeLike,
  rows: int,
  length: int,
) -> str:
  """Name of the implementation that trains.

  Args:
    wanted: config.model.attention, 'auto' or a key of IMPLEMENTATIONS.
    device: one of those that will run it; it may be of a topology that is
      compiled for.
    config: dimensions, of which heads and head_dim count.
    dtype: compute dtype of the model.
    rows: rows of a micro-batch on one device.
    length: tokens per row.
  """
  name = wanted
  if wanted == 'auto':
    name = _FASTEST.get(device.platform, 'reference')
  obstacle = _obstacle(name, device, config, jnp.dtype(dtype), rows, length)
  if obstacle is None:
    return name
  if wanted != 'auto':
    raise InputError(
      f'model.attention is {name!r}, but {obstacle}; choose auto or reference.'
    )
  logging.info('Attention: reference, not %s: %s.', name, obstacle)
  return 'reference'


def _obstacle(
  name: str,
  device: jax.Device,
  config: families.DecoderConfig,
  dtype: jax.typing.DTypeLike,
  rows: int,
  length: int,
) -> str | None:
  """Why `name` cannot serve, as part of a sentence, or None."""
  if name not in _KERNEL_OF:
    return None
  if device.platform != _KERNEL_OF[name]:
    return f'it needs a {_KERNEL_OF[name].upper()} and this run is on {device.platform}'
  if dtype != jnp.bfloat16:  # float32 is asked for its digits; kernels drop it.
    return f'it needs bfloat16 weights and these are {dtype}'
  error = compile_error(name, device, config, dtype, rows, length)
  return error and f'its kernel does not compile here ({error})'


def compile_error(
  name: str,
  device: jax.Device,
  config: families.DecoderConfig,
  dtype: jax.typing.DTypeLike,
  rows: int,
  length: int,
) -> str | None:
  """First line of what stops the kernel's compilation with gradient, or None.

  Seconds, once, against a run that ends at its first step: cuDNN may be absent
  or old, the chip, too, and only the compiler knows what each supports.
  """
  where = jax.sharding.SingleDeviceSharding(device)
  array = lambda heads: jax.ShapeDtypeStruct(
    (rows, length, heads, config.head_dim), dtype, sharding=where
  )
  segments = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=where)

  def total(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    return jnp.sum(packed_attention(q, k, v, segments, name), dtype=jnp.float32)

  # With the gradient, as a kernel may compile forwards alone.
  try:  # Missing cuDNN, its limits and the compilers' refusals.
    jax.jit(jax.grad(total, (0, 1, 2))).lower(
      array(config.heads), array(config.kv_heads), array(config.kv_heads), segments
    ).compile()
  except Exception as error:  # Pallas raises classes of its own, some private.
    return str(error).strip().split('\n')[0].rstrip('.')
  return None
