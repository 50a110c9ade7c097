"""Attention of packed training rows, by whatever the backend does fastest.

Every implementation is a function (q, k, v, segments) -> y [B, L, H, C], in the
dtype of q or in float32: causal attention inside each segment, with grouped
heads. The reference says what is right, the others differ from it by rounding
alone.

Invariants:
  * A position attends to itself, padding (segment 0) included. So no softmax is
    over nothing, and neither values nor gradients are ever NaN.
  * Other segments of a row get weights, and so gradients, of exactly zero.

Shapes: q [B, L, H, C]; k and v [B, L, K, C] with H a multiple of K; segments
int32 [B, L]. B batch, L length, H query heads, K key-value heads, C head_dim.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding, PartitionSpec

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import blocked_attention, families

_LANES = 128  # Splash attention works on multiples of a TPU's vector width.
# The largest that divides a length is taken; _pad sees to it that one does.
_BLOCKS = (512, 256, _LANES)

# (q, k, v, segments) -> y.
Attention = Callable[[Array, Array, Array, Array], Array]


def causal_mask(segments: Array) -> Array:
  """Mask [B, 1, L, L] of packed rows; segments int32 [B, L], 0 is padding."""
  length = segments.shape[1]
  # Segments lie one behind the other in a row, so the order of the row is that
  # inside each of them.
  return _same(segments) & jnp.tril(jnp.ones((length, length), bool))


def _same(segments: Array) -> Array:
  # The axis of length 1 is that of heads: one mask for all.
  return segments[:, None, :, None] == segments[:, None, None, :]


def masked_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """The reference, for any mask: bool [B, 1, L, M], k and v [B, M, K, C]."""
  # It scales by C ** -0.5, repeats grouped heads and has its softmax in float32
  # whatever the dtype of q.
  return jax.nn.dot_product_attention(q, k, v, mask=mask)


def reference_attention(q: Array, k: Array, v: Array, segments: Array) -> Array:
  return masked_attention(q, k, v, causal_mask(segments))


def cudnn(q: Array, k: Array, v: Array, segments: Array) -> Array:
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
  q: Array, k: Array, v: Array, segments: Array, interpret: bool = False
) -> Array:
  """Splash attention, a Pallas kernel for TPUs; `interpret` runs it anywhere.

  It knows grouped heads, and never visits blocks above the diagonal.
  """
  length = q.shape[1]
  # Queries are scaled here, as the kernel does not.
  q, k, v, segments = _pad(_LANES, blocked_attention.scaled(q), k, v, segments)
  kernel = _splash(q.shape[1], q.shape[2], interpret)
  heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
  # The kernel takes one row, [heads, L, C].
  y = jax.vmap(kernel)(*heads_first, splash_attention.SegmentIds(segments, segments))
  return y.swapaxes(1, 2)[:, :length]


def _splash(length: int, heads: int, interpret: bool) -> Callable[..., Array]:
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


def _pad(multiple: int, *arrays: Array) -> list[Array]:
  """Axis 1 of each array, filled with zeros up to a multiple."""
  # At the end, where no real position looks: attention is causal.
  more = -arrays[0].shape[1] % multiple
  return [
    jnp.pad(x, [(0, more if axis == 1 else 0) for axis in range(x.ndim)])
    for x in arrays
  ]


IMPLEMENTATIONS = {
  'reference': reference_attention,
  'blocked': blocked_attention.blocked,
  'cudnn': cudnn,
  'pallas': pallas,
}
_FASTEST = {'cpu': 'blocked', 'gpu': 'cudnn', 'tpu': 'pallas'}
_KERNEL_OF = {'cudnn': 'gpu', 'pallas': 'tpu'}  # Opaque to XLA.


def packed_attention(
  q: Array,
  k: Array,
  v: Array,
  segments: Array,
  implementation: str = 'reference',
  where: NamedSharding | None = None,
) -> Array:
  """Causal attention inside each segment of packed rows.

  `where`: how rows and heads of k are divided; None on a single device. XLA
  cannot divide a kernel, so each device runs it on its own part.
  """
  attend = IMPLEMENTATIONS[implementation]
  if implementation in _KERNEL_OF and where is not None:
    attend = on_each_device(attend, where)
  return attend(q, k, v, segments)


def on_each_device(attend: Attention, where: NamedSharding) -> Attention:
  part = where.spec
  return jax.shard_map(
    attend,
    mesh=where.mesh,
    out_specs=part,
    # Heads of queries are divided as those of keys, so each device has what
    # belongs together; segments have rows, but no heads.
    in_specs=(part, part, part, PartitionSpec(*part[:1])),
    # Kernels do not declare over which axes their results vary.
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
  """Name of the implementation that trains, before anything large is compiled.

  `wanted` is config.model.attention; `device` one of those that will run it,
  maybe of a topology that is compiled for; `dtype` what the model computes in;
  `rows` those of a micro-batch on one device, `length` their tokens.
  """
  where = jax.sharding.SingleDeviceSharding(device)
  q, k = (
    jax.ShapeDtypeStruct((rows, length, heads, config.head_dim), dtype, sharding=where)
    for heads in (config.heads, config.kv_heads)
  )
  segments = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=where)
  name = wanted
  if wanted == 'auto':
    name = _FASTEST.get(device.platform, 'reference')
  obstacle = _obstacle(name, device.platform, (q, k, k, segments))
  if obstacle is None:
    return name
  if wanted != 'auto':
    raise InputError(
      f'model.attention is {name!r}, but {obstacle}; choose auto or reference.'
    )
  logging.info('Attention: reference, not %s: %s.', name, obstacle)
  return 'reference'


def _obstacle(
  name: str, platform: str, inputs: tuple[jax.ShapeDtypeStruct, ...]
) -> str | None:
  """Why `name` cannot serve such inputs, as part of a sentence, or None."""
  needed, dtype = _KERNEL_OF.get(name), inputs[0].dtype
  if needed is None:
    return None
  if platform != needed:
    return f'it needs a {needed.upper()} and this run is on {platform}'
  if dtype != jnp.bfloat16:  # float32 is asked for its digits; kernels drop it.
    return f'it needs bfloat16 weights and these are {dtype}'
  error = compile_error(IMPLEMENTATIONS[name], inputs)
  return error and f'its kernel does not compile here ({error})'


def compile_error(
  attend: Attention, inputs: tuple[jax.ShapeDtypeStruct, ...]
) -> str | None:
  """First line of what stops the kernel's compilation with gradient, or None.

  Seconds, once, against a run that ends at its first step: cuDNN may be absent
  or old, the chip, too, and only the compiler knows what each supports.
  """

  def total(q: Array, k: Array, v: Array, segments: Array) -> Array:
    return jnp.sum(attend(q, k, v, segments), dtype=jnp.float32)

  # With the gradient, as a kernel may compile forwards alone.
  try:  # Missing cuDNN, its limits and the compilers' refusals.
    jax.jit(jax.grad(total, (0, 1, 2))).lower(*inputs).compile()
  except Exception as error:  # Pallas raises classes of its own, some private.
    return str(error).strip().split('\n')[0].rstrip('.')
  return None
