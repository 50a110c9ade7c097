"""Products are counted however they are nested."""

import jax
import jax.numpy as jnp
import pytest

from behaviorlm_jax.cost import flops

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 16), jnp.float32)
ONE = 2 * 8 * 16 * 16  # x @ w.


def repeated(x, w):
  return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]


def either(x, w):
  return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)


@pytest.mark.parametrize(
  'function, products',
  [(jnp.matmul, 1), (jax.jit(repeated), 5), (either, 2)],
  ids=['one', 'of a loop, as often as it runs', 'of alternatives, the most'],
)
def test_products_count_a_multiplication_and_an_addition_each(function, products):
  assert flops.count(function, X, W) == products * ONE


def test_batches_of_products_count_each():
  batches = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (X, W)]
  assert flops.count(jnp.matmul, *batches) == 3 * ONE


def test_a_gradient_costs_two_more_products_and_remat_one_more():
  def loss(body):
    scanned = lambda x, w: jax.lax.scan(lambda x, _: (body(x, w), None), x, length=5)[
      0
    ].sum()
    return jax.grad(scanned, (0, 1))

  plain = lambda x, w: jnp.sin(x @ w)
  again = jax.checkpoint(plain, prevent_cse=False)
  assert flops.count(loss(plain), X, W) == 5 * 3 * ONE
  assert flops.count(loss(again), X, W) == 5 * 4 * ONE


def test_a_loop_of_unknown_length_is_refused():
  endless = lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w, x)
  with pytest.raises(ValueError, match='how often'):
    flops.count(endless, X, W)
