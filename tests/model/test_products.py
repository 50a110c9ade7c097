"""Products have jax's values and gradients, in the types that training needs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from behaviorlm_jax.model import products


@pytest.mark.parametrize(
  ('ours', 'plain', 'shapes'),
  [
    pytest.param(products.dot, lambda x, w: x @ w.T, [(7, 5)], id='dot'),
    pytest.param(
      functools.partial(products.lora_dot, 0.5),
      lambda x, w, a, b: x @ w.T + 0.5 * (x @ a.T) @ b.T,
      [(7, 5), (4, 5), (7, 4)],
      id='lora_dot',
    ),
  ],
)
def test_products_have_the_value_and_gradient_of_jax(ours, plain, shapes):
  generator = np.random.default_rng(0)
  draw = lambda shape: generator.standard_normal(shape).astype(np.float32)
  inputs, dy = [draw(shape) for shape in [(2, 3, 5), *shapes]], draw((2, 3, 7))
  y, pull = jax.vjp(ours, *inputs)
  expected, theirs = jax.vjp(plain, *inputs)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
  for found, value in zip(pull(dy), theirs(dy), strict=True):
    np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_float32_master_is_float32_after_a_bfloat16_product():
  x, w = jnp.ones((2, 5), jnp.bfloat16), jnp.ones((7, 5), jnp.float32)
  y, pull = jax.vjp(products.dot, x, w)
  dx, dw = pull(y)
  assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
  np.testing.assert_array_equal(np.asarray(dx, np.float32), 35)
  np.testing.assert_array_equal(dw, 10)


def test_adapter_gradients_stay_float32_around_bfloat16_products():
  x, w = jnp.ones((2, 5), jnp.bfloat16), jnp.ones((7, 5), jnp.bfloat16)
  a, b = jnp.ones((4, 5)), jnp.ones((7, 4))
  y, pull = jax.vjp(functools.partial(products.lora_dot, 1.0), x, w, a, b)
  dx, dw, da, db = pull(jnp.ones_like(y))
  assert y.dtype == da.dtype == db.dtype == jnp.float32
  assert dx.dtype == dw.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, 25)  # 5 of w, 4 x 5 of the adapter.
  np.testing.assert_array_equal(da, 14)
  np.testing.assert_array_equal(db, 10)
