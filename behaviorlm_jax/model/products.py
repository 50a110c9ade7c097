"""Matrix products as XLA multiplies them fastest, forward and backward.

Factors are multiplied in the dtype of the first one and added up in float32,
which is also what is returned.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

Axes = tuple[int, ...]


def contract(x: Array, y: Array, x_axes: Axes, y_axes: Axes, batch: Axes = ()) -> Array:
  """Sum of products over axes of x and y, for every index of the `batch` axes."""
  # TF32 would lose half of the digits that float32 is asked for.
  precision = 'highest' if x.dtype == jnp.float32 else None
  # Adapters come as float32 masters and are rounded here, where they are used.
  return jax.lax.dot_general(
    x,
    y.astype(x.dtype),
    ((x_axes, y_axes), (batch, batch)),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def _times(x: Array, y: Array, axis: int) -> Array:
  """Sum over the last axis of x [..., n] and `axis` of the matrix y."""
  return contract(x, y, (x.ndim - 1,), (axis,))


def _outer(x: Array, y: Array) -> Array:
  """Sum over all rows of x [..., m] and y [..., n]: [m, n]."""
  rows = tuple(range(x.ndim - 1))
  return contract(x, y, rows, rows)


@jax.custom_vjp
def dot(x: Array, w: Array) -> Array:
  """x [..., in] times w [out, in] -> [..., out].

  Left to itself, the gradient of a bfloat16 product with a float32 result is a
  float32 product, at half the speed; here it is a bfloat16 product, too.
  """
  return _times(x, w, 1)


def _dot_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
  x, w = saved
  dy = dy.astype(x.dtype)
  # The base is not trained: nobody asks for the gradient of w, and its product
  # is dropped as dead code.
  return _times(dy, w, 0).astype(x.dtype), _outer(dy, x).astype(w.dtype)


dot.defvjp(lambda x, w: (dot(x, w), (x, w)), _dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lora_dot(scale: float, x: Array, w: Array, a: Array, b: Array) -> Array:
  """x W' + scale (x A') B' -> [..., out]; a, b: float32 masters.

  One rule for the sum, so that its gradients add up in float32 and x is
  rounded once; see `dot`.
  """
  return _lora_dot_forward(scale, x, w, a, b)[0]


def _lora_dot_forward(
  scale: float, x: Array, w: Array, a: Array, b: Array
) -> tuple[Array, tuple[Array, ...]]:
  # Kept by the remat policy 'products': R numbers a position, for a product over
  # all of x.
  low = checkpoint_name(_times(x, a, 1), 'product').astype(x.dtype)
  y = _times(x, w, 1) + scale * _times(low, b, 1)
  return y, (x, w, a, b, low)


def _lora_dot_backward(
  scale: float, saved: tuple[Array, ...], dy: Array
) -> tuple[Array, ...]:
  x, w, a, b, low = saved
  dy = dy.astype(x.dtype)
  dlow = (scale * _times(dy, b, 0)).astype(x.dtype)
  # Added in float32 and rounded once, below.
  dx = _times(dy, w, 0) + _times(dlow, a, 0)
  # The narrow factor first: XLA for CPU transposes the first one in memory, and
  # the wide one costs more to transpose than to multiply. The barrier keeps it
  # from turning the product round again.
  db = jax.lax.optimization_barrier(scale * _outer(low, dy)).T
  # dlow has the scale already.
  return dx.astype(x.dtype), _outer(dy, x).astype(w.dtype), _outer(dlow, x), db


lora_dot.defvjp(_lora_dot_forward, _lora_dot_backward)


def _as_bits(y: Array) -> Array:
  bits = jax.lax.bitcast_convert_type(y.astype(jnp.bfloat16), jnp.uint16)
  bits = checkpoint_name(bits, 'product')
  return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


@jax.custom_vjp
def keep_bits(y: Array) -> Array:
  """y as bfloat16, saved for the backward pass as integers.

  XLA for CPU would convert the saved arrays of all layers to float32 and back
  to write one layer's.
  """
  return _as_bits(y)


# Not keep_bits again: remat policies see no name inside a custom gradient.
keep_bits.defvjp(
  # The zero tells y's dtype: residuals are arrays. Rounding lets gradients
  # through.
  lambda y: (_as_bits(y), jnp.zeros((), y.dtype)),
  lambda like, dy: (dy.astype(like.dtype),),
)
