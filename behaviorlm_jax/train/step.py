"""The jitted LoRA update and the validation loss.

The loss is a weighted sum over answer tokens divided by the global sum of
weights, so micro-batches and devices cannot change the gradient. Hidden states
are gathered at answer positions before the output head: logits have shape
[B, A, V], never [B, L, V]. Only the adapter is differentiated, and optimizer
state exists for it alone.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from behaviorlm_jax.model import attention
from behaviorlm_jax.model import lora
from behaviorlm_jax.train import sharding


def make_optimizer(train):
  """AdamW with linear warm-up, cosine decay to zero and clipping."""
  warmup = max(1, round(train.warmup * train.steps))
  schedule = optax.warmup_cosine_decay_schedule(
      train.learning_rate / warmup, train.learning_rate, warmup,
      max(train.steps, warmup + 1))
  adam = optax.adamw(schedule, weight_decay=train.weight_decay)
  if train.clip:
    return optax.chain(optax.clip_by_global_norm(train.clip), adam), schedule
  return adam, schedule


def loss_sums(model, batch):
  """Weighted negative log-likelihood of the answer tokens, and the weights.

  `batch`: see data.loader. Returns two float32 scalars, sums and not means.
  """
  hidden, _ = model.packed_hidden(batch['tokens'], batch['positions'],
                                  batch['segments'])
  at_answers = jnp.take_along_axis(
      hidden, batch['answer_positions'][:, :, None], axis=1)
  losses = optax.softmax_cross_entropy_with_integer_labels(
      model.logits(at_answers), batch['answer_tokens'])
  weights = batch['answer_weights']
  return jnp.sum(losses * weights), jnp.sum(weights)


def gradient(adapter, params, batch, attach, accumulate):
  """Loss (mean over the batch's weights), its gradient and the weight sum."""

  def sums(adapter, part):
    return loss_sums(attach(params, adapter), part)

  if accumulate == 1:
    (loss, weight), grads = jax.value_and_grad(sums, has_aux=True)(
        adapter, batch)
  else:
    loss, weight, grads = _accumulated(sums, adapter, batch, accumulate)
  grads = jax.tree.map(lambda g: g / weight, grads)
  return loss / weight, grads, weight


def _accumulated(sums, adapter, batch, parts):
  # Row i goes to part i % parts, so every device keeps its own rows.
  split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

  def add(totals, part):
    (loss, weight), grads = jax.value_and_grad(sums, has_aux=True)(
        adapter, part)
    return jax.tree.map(jnp.add, totals, (loss, weight, grads)), None

  zero = jnp.zeros((), jnp.float32)
  start = (zero, zero, jax.tree.map(jnp.zeros_like, adapter))
  return jax.lax.scan(add, start, jax.tree.map(split, batch))[0]


def attacher(base_config, config, mesh, dtype, wanted=None):
  """attach(params, adapter) -> Decoder, as fast as this run's backend allows.

  `dtype`: of the params to come; attention kernels serve only some. `wanted`:
  another attention than model.attention.
  """
  train = config.train
  shape = (train.batch, train.length, base_config.kv_heads,
           base_config.head_dim)
  where = sharding.sharding(mesh, ('batch', None, 'kv_heads', None), shape,
                            'attention')
  rows = train.batch // train.accumulate // sharding.row_parts(mesh)
  name = attention.choose(wanted or config.model.attention,
                          jax.default_backend(),
                          base_config, dtype, rows, train.length)
  packed = functools.partial(attention.packed_attention, implementation=name,
                             where=where)
  options = dict(remat=config.model.remat, packed=packed)

  def attach(params, adapter):
    return lora.attach(base_config, params, adapter, config.lora.alpha,
                       **options)

  return attach


def state_shardings(mesh, shapes, optimizer):
  """Shardings of {'adapter', 'optimizer', 'step'}; moments lie as weights."""
  where = sharding.adapter(mesh, shapes)
  abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
                          shapes, is_leaf=lambda x: isinstance(x, tuple))
  everywhere = sharding.replicated(mesh)
  moments = optax.tree.map_params(
      optimizer, lambda _, place: place,
      jax.eval_shape(optimizer.init, abstract), where,
      transform_non_params=lambda _: everywhere)
  return {'adapter': where, 'optimizer': moments, 'step': everywhere}


def init_state(adapter, optimizer, shardings):
  """Fresh training state around `adapter`, placed by `shardings`."""

  def init(adapter):
    return {'adapter': adapter, 'optimizer': optimizer.init(adapter),
            'step': jnp.zeros((), jnp.int32)}

  adapter = jax.device_put(adapter, shardings['adapter'])
  return jax.jit(init, out_shardings=shardings)(adapter)


def make_step(attach, optimizer, schedule, accumulate, shardings, mesh):
  """jitted (state, params, batch) -> (state, metrics); state is donated."""

  def step(state, params, batch):
    loss, grads, weight = gradient(state['adapter'], params, batch, attach,
                                   accumulate)
    updates, moments = optimizer.update(grads, state['optimizer'],
                                        state['adapter'])
    new = {'adapter': optax.apply_updates(state['adapter'], updates),
           'optimizer': moments, 'step': state['step'] + 1}
    metrics = {'loss': loss, 'grad_norm': optax.tree.norm(grads),
               'learning_rate': schedule(state['step']),
               'answer_weight': weight,
               'tokens': jnp.sum(batch['segments'] > 0),
               'padding': jnp.mean(batch['segments'] == 0),
               'samples': jnp.sum(batch['samples'])}
    return new, metrics

  return jax.jit(step, donate_argnums=0,
                 out_shardings=(shardings, sharding.replicated(mesh)))


def make_validation(attach, mesh):
  """jitted (adapter, params, batch) -> (loss sum, weight sum)."""
  return jax.jit(
      lambda adapter, params, batch: loss_sums(attach(params, adapter), batch),
      out_shardings=sharding.replicated(mesh))
