"""The jitted LoRA update and the validation loss.

The loss of a batch is divided by the global sum of its weights, so
micro-batches and devices cannot change the gradient. Only the adapter is
differentiated, and optimizer state exists for it alone.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.model import attention, families, lora
from behaviorlm_jax.train import sharding
from behaviorlm_jax.train.loss import Loss


def attacher(
  base_config: families.DecoderConfig,
  layout: sharding.Layout,
  model: Mapping[str, str],
  train: Mapping[str, int],
  alpha: float,
) -> Callable:
  """attach(params, adapter) -> Decoder, as fast as the layout's devices allow.

  `model` and `train`: sections of the config, for what runs and for the shape of a
  batch; `alpha`: of the adapter.
  """
  batch, length = train['batch'], train['length']
  heads = (batch, length, base_config.kv_heads, base_config.head_dim)
  name = attention.choose_implementation(
    model['attention'],
    layout.device,
    base_config,
    model['dtype'],  # Of the params to come: kernels serve only some.
    batch // train['accumulate'] // layout.row_parts,
    length,
  )
  packed = functools.partial(
    attention.packed_attention,
    implementation=name,
    where=layout.sharding(('batch', None, 'kv_heads', None), heads, 'attention'),
  )
  return functools.partial(
    lora.attach,
    base_config,
    alpha=alpha,
    remat=model['remat'],
    packed=packed,
    backend=layout.device.platform,
    constrain=layout.constrain,
  )


def make_optimizer(
  stage: config_lib.Stage, train: Mapping[str, float]
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """AdamW with linear warm-up, cosine decay to zero and clipping.

  `train`: the config's section.
  """
  warmup = max(1, round(train['warmup'] * stage.steps))
  schedule = optax.warmup_cosine_decay_schedule(
    stage.learning_rate / warmup,  # The first update is one, too.
    stage.learning_rate,
    warmup,
    max(stage.steps, warmup + 1),
  )
  adam = optax.adamw(schedule, weight_decay=train['weight_decay'])
  # Clipped before Adam: its moments never see what clipping takes away.
  if train['clip']:
    return optax.chain(optax.clip_by_global_norm(train['clip']), adam), schedule
  return adam, schedule


class Tuner:
  """The training state of an adapter, where it lies, and how it is updated.

  A state is {'adapter', 'optimizer', 'step'}: its moments lie as the weights that
  they are of, its counters on all devices.
  """

  def __init__(
    self,
    stage: config_lib.Stage,
    train: Mapping[str, float],
    layout: sharding.Layout,
    shapes: dict,
  ):
    """`train`: the config's section; `shapes`: of the adapter."""
    self.layout = layout
    self._optimizer, self.schedule = make_optimizer(stage, train)
    self._adapter = jax.tree.map(
      lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
      shapes,
      is_leaf=lambda x: isinstance(x, tuple),
    )
    places = layout.adapter(shapes)
    moments = optax.tree.map_params(
      self._optimizer,
      lambda _, place: place,
      jax.eval_shape(self._optimizer.init, self._adapter),
      places,
      transform_non_params=lambda _: layout.replicated,
    )
    self.places = {'adapter': places, 'optimizer': moments, 'step': layout.replicated}

  def _begin(self, adapter):
    moments = self._optimizer.init(adapter)
    return {'adapter': adapter, 'optimizer': moments, 'step': jnp.zeros((), jnp.int32)}

  def begin(self, adapter: dict) -> dict:
    """The state before the first step."""
    adapter = jax.device_put(adapter, self.places['adapter'])
    # In a program of all devices: each makes its own part of the moments alone.
    return jax.jit(self._begin, out_shardings=self.places)(adapter)

  def abstract(self) -> dict:
    """What `begin` returns, as jax.ShapeDtypeStruct with shardings."""
    return jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      jax.eval_shape(self._begin, self._adapter),
      self.places,
    )

  def update(self, state: dict, grads: dict) -> dict:
    """The state after a step."""
    adapter = state['adapter']
    updates, moments = self._optimizer.update(grads, state['optimizer'], adapter)
    return {
      'adapter': optax.apply_updates(adapter, updates),
      'optimizer': moments,
      'step': state['step'] + 1,
    }


def gradient(
  loss: Loss, adapter: dict, params: dict, batch: dict, accumulate: int = 1
) -> tuple[jax.Array, dict, jax.Array]:
  """Loss (mean over the batch's weights), its gradient and the weight sum.

  `accumulate`: how many micro-batches the batch is divided into.
  """
  sums = lambda adapter, part: loss.sums(adapter, params, part)
  if accumulate == 1:
    (total, weight), grads = jax.value_and_grad(sums, has_aux=True)(adapter, batch)
  else:
    total, weight, grads = _accumulated(sums, adapter, batch, accumulate)
  # Once, at the end: micro-batches of other weights would count alike.
  grads = jax.tree.map(lambda g: g / weight, grads)
  return total / weight, grads, weight


def _accumulated(sums, adapter, batch, parts):
  # Row i goes to part i % parts, so every device keeps its own rows.
  split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

  def add(totals: tuple, part: dict) -> tuple[tuple, None]:
    (loss, weight), grads = jax.value_and_grad(sums, has_aux=True)(adapter, part)
    return jax.tree.map(jnp.add, totals, (loss, weight, grads)), None

  # In float32, as the adapter is: in less, many small parts would add up to less.
  zero = jnp.zeros((), jnp.float32)
  start = (zero, zero, jax.tree.map(jnp.zeros_like, adapter))
  return jax.lax.scan(add, start, jax.tree.map(split, batch))[0]


def make_step(loss: Loss, tuner: Tuner, accumulate: int) -> Callable:
  """jitted (state, params, batch) -> (state, metrics); state is donated."""

  def step(state: dict, params: dict, batch: dict) -> tuple[dict, dict]:
    mean, grads, weight = gradient(loss, state['adapter'], params, batch, accumulate)
    metrics = {
      'loss': mean,
      'grad_norm': optax.tree.norm(grads),  # Before clipping.
      'learning_rate': tuner.schedule(state['step']),  # Of this very update.
      'answer_weight': weight,
      'tokens': jnp.sum(batch['segments'] > 0),
      'padding': jnp.mean(batch['segments'] == 0),
      'samples': jnp.sum(batch['samples']),
    }
    return tuner.update(state, grads), metrics

  return jax.jit(
    step,
    donate_argnums=0,  # The new state takes the memory of the old one.
    out_shardings=(tuner.places, tuner.layout.replicated),
    compiler_options=tuner.layout.compiler_options,
  )


def make_validation(loss: Loss, layout: sharding.Layout) -> Callable:
  """jitted (adapter, params, batch) -> (loss sum, weight sum)."""
  return jax.jit(loss.sums, out_shardings=layout.replicated)
