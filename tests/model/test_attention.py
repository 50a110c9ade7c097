"""Every attention computes the reference, and the choice between them is sound.

Kernels of other backends run interpreted here where they can (the TPU's), and
are lowered for their platform where they cannot (cuDNN's). Run as a program,
this file compares one device with four; a test does so, because the number of
devices of a process is fixed at its start.
"""

import functools
import json
import logging
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import attention

LENGTH = 300  # Of no kernel's block; three blocks of 128 when padded.
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
CONFIG = types.SimpleNamespace(heads=HEADS, kv_heads=KV_HEADS, head_dim=20)
CUDNN_VERSION = 'jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version'
RUNNABLE = ('reference', 'blocked', 'pallas', 'auto')


@functools.cache
def runner(name, where=None):
  """jitted (q, k, v, segments, dy) -> y and the gradients of q, k and v.

  `auto` is what trains here: on a GPU or TPU the tests below run its kernel.
  """
  if name == 'auto':
    config = types.SimpleNamespace(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    name = attention.choose_implementation(
      name, jax.devices()[0], config, 'bfloat16', 2, LENGTH
    )
  attend = attention.IMPLEMENTATIONS[name]
  if name == 'pallas' and jax.default_backend() != 'tpu':
    attend = functools.partial(attention.pallas, interpret=True)
  if where is not None:
    attend = attention.on_each_device(attend, where)

  def run(q, k, v, segments, dy):
    precise = 'highest' if q.dtype == jnp.float32 else None  # As the decoder.
    with jax.default_matmul_precision(precise):
      y, back = jax.vjp(
        lambda q, k, v: attend(q, k, v, segments).astype(q.dtype), q, k, v
      )
      return y, *back(dy)

  return jax.jit(run)


def draw(dtype=jnp.float32, rows=2):
  """q, k, v, segments and dy; every row ends in padding."""
  generator = np.random.default_rng(0)
  normal = lambda heads: jnp.asarray(
    generator.standard_normal((rows, LENGTH, heads, HEAD_DIM)), dtype
  )
  segments = np.zeros((rows, LENGTH), np.int32)
  for row in range(rows):  # Borders inside of blocks and between them.
    for start in (0, 37 + row, 128, 250):
      segments[row, start:] += 1
    segments[row, 290:] = 0
  return (
    normal(HEADS),
    normal(KV_HEADS),
    normal(KV_HEADS),
    jnp.asarray(segments),
    normal(HEADS),
  )


def one_by_one(q, k, v, segments):
  """Each segment, query and head by itself, in float64; padding stays zero."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  y = np.zeros(q.shape)
  for row, at, head in np.ndindex(q.shape[:3]):
    if segments[row, at]:
      start = np.argmax(segments[row] == segments[row, at])
      seen, group = slice(start, at + 1), head // (HEADS // KV_HEADS)
      scores = k[row, seen, group] @ q[row, at, head] / np.sqrt(HEAD_DIM)
      weights = np.exp(scores - scores.max())
      y[row, at, head] = weights @ v[row, seen, group] / weights.sum()
  return y


def test_reference_is_causal_softmax_inside_each_segment():
  q, k, v, segments, dy = draw()
  y = np.array(runner('reference')(q, k, v, segments, dy)[0])
  y[np.asarray(segments) == 0] = 0
  np.testing.assert_allclose(
    y, one_by_one(q, k, v, np.asarray(segments)), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('name', RUNNABLE[1:])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_values_and_gradients_are_the_reference(name, dtype):
  if dtype == 'float32' and jax.default_backend() != 'cpu':
    dtype = 'bfloat16'  # Kernels on accelerators are for that alone.
  exact = runner('reference')(*draw())
  inputs = draw(dtype)
  tolerance = 1e-4 if dtype == 'float32' else 0.05
  for x, expected, like in zip(
    runner(name)(*inputs), exact, (inputs[4], *inputs[:3]), strict=True
  ):
    assert (x.dtype, x.shape) == (like.dtype, like.shape)
    np.testing.assert_allclose(
      x.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize('name', RUNNABLE)
def test_neighbours_in_a_row_get_exactly_no_gradient(name):
  q, k, v, segments, dy = draw(jnp.bfloat16)
  own = (segments == 2)[:, :, None, None]
  gradients = runner(name)(q, k, v, segments, jnp.where(own, dy, 0))[1:]
  for gradient in gradients:
    assert not jnp.any(jnp.where(own, 0, gradient))
    assert jnp.any(jnp.where(own, gradient, 0))


@pytest.mark.parametrize('name', RUNNABLE)
def test_neighbours_in_a_row_cannot_change_a_value(name):
  q, k, v, segments, dy = draw(jnp.bfloat16)
  own = (segments == 2)[:, :, None, None]
  y = runner(name)(q, k, v, segments, dy)[0]
  others = [jnp.where(own, x, 7 * x + 1) for x in (q, k, v)]
  changed = runner(name)(*others, segments, dy)[0]
  assert jnp.array_equal(jnp.where(own, y, 0), jnp.where(own, changed, 0))
  assert not jnp.array_equal(y, changed)


@pytest.mark.parametrize('name', RUNNABLE)
def test_rows_of_padding_give_finite_values_and_gradients(name):
  q, k, v, segments, dy = draw(jnp.bfloat16)
  for x in runner(name)(q, k, v, segments.at[0].set(0), dy):
    assert jnp.all(jnp.isfinite(x))


def lowered(name, platform, dtype, where=None):
  """The program, forward and backward, for a platform that is not here."""

  def run(q, k, v, segments, dy):
    y, back = jax.vjp(
      lambda q, k, v: attention.packed_attention(q, k, v, segments, name, where),
      q,
      k,
      v,
    )
    return y, *back(dy)

  traced = jax.jit(run).trace(*draw(dtype, rows=4))
  return traced.lower(lowering_platforms=(platform,)).as_text()


def test_cudnn_lowers_to_its_causal_kernels(monkeypatch):
  monkeypatch.setattr(CUDNN_VERSION, lambda: 91000)
  program = lowered('cudnn', 'cuda', jnp.bfloat16)
  assert program.count('__cudnn$fmhaScaleBiasSoftmax(') == 1
  assert program.count('__cudnn$fmhaScaleBiasSoftmaxBackward(') == 1
  assert program.count('mask_type\\22: \\22CAUSAL') == 2


def test_what_cudnn_is_asked_for_is_the_reference(monkeypatch):
  q, k, v, segments, _ = [x[:, : LENGTH - 1] for x in draw()]
  expected = attention.reference_attention(q, k, v, segments)
  ask = jax.nn.dot_product_attention
  monkeypatch.setattr(  # The same call to the implementation that runs here.
    jax.nn,
    'dot_product_attention',
    lambda *args, implementation, **kwargs: ask(*args, **kwargs),
  )
  y = attention.cudnn(q, k, v, segments)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_cudnn_pads_odd_lengths(monkeypatch):
  monkeypatch.setattr(CUDNN_VERSION, lambda: 91000)
  q = jnp.ones((1, 33, 2, 8), jnp.bfloat16)
  run = jax.grad(
    lambda q: jnp.sum(
      attention.cudnn(q, q, q, jnp.ones((1, 33), jnp.int32)), dtype='float32'
    )
  )
  program = jax.jit(run).trace(q).lower(lowering_platforms=('cuda',)).as_text()
  assert 'tensor<1x34x2x8xbf16>' in program


def test_splash_attention_lowers_to_its_three_kernels():
  program = lowered('pallas', 'tpu', jnp.bfloat16)
  assert program.count('@tpu_custom_call') == 3


@pytest.mark.parametrize(
  'wanted, backend, dtype, name',
  [
    ('auto', 'cpu', 'bfloat16', 'blocked'),
    ('auto', 'gpu', 'bfloat16', 'cudnn'),
    ('auto', 'tpu', 'bfloat16', 'pallas'),
    ('auto', 'gpu', 'float32', 'reference'),
    ('auto', 'tpu', 'float32', 'reference'),
    ('reference', 'gpu', 'bfloat16', 'reference'),
    ('reference', 'tpu', 'float32', 'reference'),
    ('cudnn', 'gpu', 'bfloat16', 'cudnn'),
    ('pallas', 'tpu', 'bfloat16', 'pallas'),
  ],
)
def test_choice_by_backend_and_dtype(monkeypatch, wanted, backend, dtype, name):
  monkeypatch.setattr(attention, 'compile_error', lambda *_: None)
  device = types.SimpleNamespace(platform=backend)
  assert attention.choose_implementation(wanted, device, CONFIG, dtype, 8, 512) == name


@pytest.mark.parametrize(
  'wanted, backend, dtype, reason',
  [
    ('cudnn', 'cpu', 'bfloat16', 'it needs a GPU and this run is on cpu'),
    ('cudnn', 'tpu', 'bfloat16', 'it needs a GPU and this run is on tpu'),
    ('pallas', 'gpu', 'bfloat16', 'it needs a TPU and this run is on gpu'),
    ('cudnn', 'gpu', 'float32', 'it needs bfloat16 weights and these are float32'),
    ('pallas', 'tpu', 'float32', 'it needs bfloat16 weights and these are float32'),
    ('cudnn', 'gpu', 'bfloat16', 'its kernel does not compile here (too old)'),
  ],
)
def test_an_attention_that_cannot_run_is_refused_when_asked_for(
  monkeypatch, wanted, backend, dtype, reason
):
  monkeypatch.setattr(attention, 'compile_error', lambda *_: 'too old')
  with pytest.raises(InputError) as caught:
    attention.choose_implementation(
      wanted, types.SimpleNamespace(platform=backend), CONFIG, dtype, 8, 512
    )
  assert str(caught.value) == (
    f'model.attention is {wanted!r}, but {reason}; choose auto or reference.'
  )


def test_auto_trains_with_the_reference_where_the_kernel_does_not_compile(
  monkeypatch, caplog
):
  def absent():
    raise RuntimeError('cuDNN is not detected.')

  monkeypatch.setattr(CUDNN_VERSION, absent)
  monkeypatch.setitem(attention._KERNEL_OF, 'cudnn', 'cpu')
  monkeypatch.setitem(attention._FASTEST, 'cpu', 'cudnn')
  with caplog.at_level(logging.INFO, logger='absl'):
    chosen = attention.choose_implementation(
      'auto', jax.devices('cpu')[0], CONFIG, 'bfloat16', 2, 32
    )
  assert chosen == 'reference'
  assert 'does not compile here (cuDNN is not detected)' in caplog.text


def test_what_cudnn_lacks_is_said_in_its_words(monkeypatch):
  monkeypatch.setattr(CUDNN_VERSION, lambda: 91000)
  monkeypatch.setitem(attention._KERNEL_OF, 'cudnn', 'cpu')
  with pytest.raises(InputError, match=r'\(.*head dim must be.* got 20\)'):
    attention.choose_implementation(
      'cudnn', jax.devices('cpu')[0], CONFIG, 'bfloat16', 2, 32
    )


def test_a_kernel_that_compiles_is_chosen(monkeypatch):
  monkeypatch.setitem(attention._KERNEL_OF, 'blocked', 'cpu')
  chosen = attention.choose_implementation(
    'blocked', jax.devices('cpu')[0], CONFIG, 'bfloat16', 2, 32
  )
  assert chosen == 'blocked'


def differences():
  """Largest differences of four devices to one, and cuDNN's program on four."""
  mesh = jax.make_mesh(
    (1, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 3
  )
  place = lambda *axes: NamedSharding(
    mesh, PartitionSpec(('data', 'fsdp'), None, *axes)
  )
  inputs = draw(rows=4)
  expected = runner('reference')(*inputs)
  result = {}
  # Every mesh axis that does not divide the heads computes the same.
  for name, where in (('pallas', place('tensor')), ('reference', place())):
    placed = [jax.device_put(x, where if x.ndim == 4 else place()) for x in inputs]
    result[name] = [
      float(jnp.max(jnp.abs(x - e)))
      for x, e in zip(runner(name, where)(*placed), expected, strict=True)
    ]
  from jax._src.cudnn import fused_attention_stablehlo

  fused_attention_stablehlo.check_cudnn_version = lambda: 91000
  result['program'] = lowered('cudnn', 'cuda', jnp.bfloat16, place('tensor'))
  return result


@pytest.mark.slow
def test_four_devices_run_the_kernels_on_their_own_rows_and_heads():
  done = subprocess.run(
    [sys.executable, __file__],
    text=True,
    capture_output=True,
    check=False,
    timeout=300,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': '4', 'JAX_PLATFORMS': 'cpu'},
  )
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  program = result.pop('program')
  for name, worst in result.items():
    assert max(worst) < 1e-4, name
  # cuDNN sees two of four rows, and one of two key-value heads.
  call = next(
    line for line in program.splitlines() if '__cudnn$fmhaScaleBiasSoftmax(' in line
  )
  assert f'tensor<2x{LENGTH}x1x{HEAD_DIM}xbf16>' in call


if __name__ == '__main__':
  print(json.dumps(differences()))
