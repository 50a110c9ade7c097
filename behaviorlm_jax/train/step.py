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


def attacher(
  base_config: families.DecoderConfig,
  layout: sharding.Layout,
  model: Mapping[str, str],
  train: Mapping[str, int],
  alpha: float,
) -> Callable:
  """attach(params, adapter) -> Decoder, as fast as the layout's devices allow.

  Args:
    base_config: of the base.
    layout: where its arrays live.
    model: the config's section; its dtype is that of the params to come, and
      attention kernels serve only some.
    train: the config's section, for the shape of a batch.
    alpha: of the adapter.
  """
  batch, length = train['batch'], train['length']
  heads = (batch, length, base_config.kv_heads, base_config.head_dim)
  name = attention.choose_implementation(
    model['attention'],
    layout.device,
    base_config,
    model['dtype'],
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


def _abstract_adapter(shapes):
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def state_shardings(
  layout: sharding.Layout, shapes: dict, optimizer: optax.GradientTransformation
) -> dict:
  """Shardings of {'adapter', 'optimizer', 'step'}; moments lie as weights."""
  where = layout.adapter(shapes)
  everywhere = layout.replicated  # Counters, which all devices need.
  moments = optax.tree.map_params(
    optimizer,
    lambda _, place: place,
    jax.eval_shape(optimizer.init, _abstract_adapter(shapes)),
    where,
    transform_non_params=lambda _: everywhere,
  )
  return {'adapter': where, 'optimizer': moments, 'step': everywhere}


def _fresh(optimizer, adapter):
  return {
    'adapter': adapter,
    'optimizer': optimizer.init(adapter),
    'step': jnp.zeros((), jnp.int32),
  }


def init_state(
  adapter: dict, optimizer: optax.GradientTransformation, shardings: dict
) -> dict:
  """Fresh training state around `adapter`, placed by `shardings`."""
  adapter = jax.device_put(adapter, shardings['adapter'])
  # In a program of all devices: each makes its own part of the moments alone.
  fresh = functools.partial(_fresh, optimizer)
  return jax.jit(fresh, out_shardings=shardings)(adapter)


def abstract_state(
  shapes: dict, optimizer: optax.GradientTransformation, shardings: dict
) -> dict:
  """What init_state returns, as jax.ShapeDtypeStruct with shardings."""
  fresh = functools.partial(_fresh, optimizer)
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    jax.eval_shape(fresh, _abstract_adapter(shapes)),
    shardings,
  )


def make_step(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  accumulate: int,
  shardings: dict,
  layout: sharding.Layout,
) -> Callable:
  """jitted (state, params, batch) -> (state, metrics); state is donated."""

  def step(state: dict, params: dict, batch: dict) -> tuple[dict, dict]:
    mean, grads, weight = gradient(loss, state['adapter'], params, batch, accumulate)
    updates, moments = optimizer.update(grads, state['optimizer'], state['adapter'])
    new = {
      'adapter': optax.apply_updates(state['adapter'], updates),
      'optimizer': moments,
      'step': state['step'] + 1,
    }
    metrics = {
      'loss': mean,
      'grad_norm': optax.tree.norm(grads),  # Before clipping.
      'learning_rate': schedule(state['step']),  # Of this very update.
      'answer_weight': weight,
      'tokens': jnp.sum(batch['segments'] > 0),
      'padding': jnp.mean(batch['segments'] == 0),
      'samples': jnp.sum(batch['samples']),
    }
    return new, metrics

  return jax.jit(
    step,
    donate_argnums=0,  # The new state takes the memory of the old one.
    out_shardings=(shardings, layout.replicated),
    compiler_options=layout.compiler_options,
  )


def make_validation(loss: Loss, layout: sharding.Layout) -> Callable:
  """jitted (adapter, params, batch) -> (loss sum, weight sum)."""
  return jax.jit(loss.sums, out_shardings=layout.replicated)
