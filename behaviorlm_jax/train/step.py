"""The jitted LoRA update and the validation loss.

The loss is a weighted sum over answer tokens divided by the global sum of
weights, so micro-batches and devices cannot change the gradient. Hidden states
are gathered at answer positions before the output head: logits exist for
answers alone, never [B, L, V]. Only the adapter is differentiated, and
optimizer state exists for it alone.

The answer tokens of behaviors may be taught within the list of names (train.loss).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from behaviorlm_jax.model import attention
from behaviorlm_jax.model import lora


@dataclasses.dataclass(frozen=True, eq=False)
class Names:
  """What may follow each node of the tree of names (score.label_tree).

  Attributes:
    tokens: int32 [nodes, F]; -1 is none.
    bonus: float32 [nodes, F], added to the logits of these tokens.
  """

  tokens: np.ndarray
  bonus: np.ndarray

  def losses(self, logits, tokens, nodes):
    """Negative log-likelihoods float32 [...] of tokens int32 [...].

    Of a token at a node int32 [...] the softmax runs over what may follow that,
    logits [..., V] with their bonus; at node -1 over the vocabulary.
    """
    options = jnp.asarray(self.tokens)[nodes]
    chosen = jnp.take_along_axis(logits, jnp.maximum(options, 0), axis=-1)
    chosen = chosen + jnp.asarray(self.bonus)[nodes]
    own = jnp.sum(jnp.where(options == tokens[..., None], chosen, 0), axis=-1)
    chosen = jnp.where(options >= 0, chosen, -jnp.inf)
    within = jax.nn.logsumexp(chosen, axis=-1) - own
    return jnp.where(nodes >= 0, within, _over_vocabulary(logits, tokens))


# Of kept's share, what a name that is never drawn is given: next to nothing,
# but with a logarithm.
_NEVER = 1e-3


def names_of(tree, drawn=None, kept=None):
  """The Names of a label_tree.Tree.

  Teaching moves scores towards how often each name is drawn, in `drawn`, float
  [Y] of any sum. The bonus of a token, log drawn - log kept of the names below
  it, moves the softmax there instead, and the logits alone are left those of
  names that come as often as in `kept`, positive float [Y]: the logit-adjusted
  loss of Menon et al. (Long-tail learning via logit adjustment, ICLR 2021) for
  the prior drawn / kept, and with equal ones in `kept` the balanced softmax of
  Ren et al. (Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS
  2020). Both at every node: where drawn / kept differs among the names below a
  token, their sums are used, whatever the context says of which it will be.
  Without `drawn` there is no bonus.
  """
  bonus = np.zeros(len(tree.edge_tokens))
  if drawn is not None:
    kept = np.asarray(kept, np.float64) / np.sum(kept)
    drawn = np.maximum(np.asarray(drawn) / np.sum(drawn), _NEVER * kept)
    bonus = np.log(_below(tree, drawn)) - np.log(_below(tree, kept))
  pick = lambda values, none: np.append(values, none)[tree.node_edges]
  return Names(
    pick(tree.edge_tokens, -1).astype(np.int32), pick(bonus, 0).astype(np.float32)
  )


def _below(tree, values):
  """Sums float64 [E] of the names' values [Y] below each edge."""
  below = np.zeros(len(tree.edge_tokens))
  for name, value in enumerate(values):
    below[tree.path(name)] += value
  return below


def _over_vocabulary(logits, tokens):
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens)


def make_optimizer(train):
  """AdamW with linear warm-up, cosine decay to zero and clipping."""
  warmup = max(1, round(train.warmup * train.steps))
  schedule = optax.warmup_cosine_decay_schedule(
    train.learning_rate / warmup,
    train.learning_rate,
    warmup,
    max(train.steps, warmup + 1),
  )
  adam = optax.adamw(schedule, weight_decay=train.weight_decay)
  if train.clip:
    return optax.chain(optax.clip_by_global_norm(train.clip), adam), schedule
  return adam, schedule


def loss_sums(model, batch, groups=1, answers=None, names=None):
  """Weighted negative log-likelihood of the answer tokens, and the weights.

  It is that over the vocabulary, or within `names`.

  Args:
    model: decoder.Decoder.
    batch: see data.loader.
    groups: G, of rows as they lie on devices; each keeps its own answers.
    answers: N, the most of some weight that a group has (plan.most_answers).
      Rows differ in how many they have, and the head runs on G x N of them.
      None: on all B x A.
    names: Names, or None.

  Returns:
    Two float32 scalars, sums and not means.
  """
  hidden, _ = model.packed_hidden(
    batch['tokens'], batch['positions'], batch['segments']
  )
  where, tokens, nodes, weights = _chosen(batch, groups, answers)
  logits = model.logits(_at(hidden, where))
  losses = (
    names.losses(logits, tokens, nodes) if names else _over_vocabulary(logits, tokens)
  )
  return jnp.sum(losses * weights), jnp.sum(weights)


def _chosen(batch, groups, most):
  """Positions, tokens, nodes and weights [G, N] of answers of some weight."""
  most = most or batch['answer_weights'].size // groups
  split = lambda x: x.reshape(groups, -1, *x.shape[1:])
  compact = functools.partial(_compact, length=batch['tokens'].shape[1], most=most)
  names = ('positions', 'tokens', 'nodes', 'weights')
  return jax.vmap(compact)(*(split(batch[f'answer_{name}']) for name in names))


def _at(hidden, where):
  """Hidden states [G, N, D] of [B, L, D], at `where` [G, N] of _chosen."""
  hidden = hidden.reshape(len(where), -1, hidden.shape[-1])
  return jnp.take_along_axis(hidden, where[..., None], axis=1)


def _compact(where, tokens, nodes, weights, length, most):
  """Those of some weight of a group's answers [rows, A], as [most] each.

  `where` becomes positions in all rows of the group, one after the other.
  """
  where = where + length * jnp.arange(len(where))[:, None]
  (chosen,) = jnp.nonzero(weights.ravel(), size=most, fill_value=weights.size)
  pick = lambda x: x.ravel().at[chosen].get(mode='fill', fill_value=0)
  return pick(where), pick(tokens), pick(nodes), pick(weights)


def gradient(
  adapter, params, batch, attach, accumulate, groups=1, answers=None, names=None
):
  """Loss (mean over the batch's weights), its gradient and the weight sum.

  `answers` and `names`: see loss_sums, of a micro-batch.
  """

  def sums(adapter, part):
    return loss_sums(attach(params, adapter), part, groups, answers, names)

  if accumulate == 1:
    (loss, weight), grads = jax.value_and_grad(sums, has_aux=True)(adapter, batch)
  else:
    loss, weight, grads = _accumulated(sums, adapter, batch, accumulate)
  grads = jax.tree.map(lambda g: g / weight, grads)
  return loss / weight, grads, weight


def _accumulated(sums, adapter, batch, parts):
  # Row i goes to part i % parts, so every device keeps its own rows.
  split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

  def add(totals, part):
    (loss, weight), grads = jax.value_and_grad(sums, has_aux=True)(adapter, part)
    return jax.tree.map(jnp.add, totals, (loss, weight, grads)), None

  zero = jnp.zeros((), jnp.float32)
  start = (zero, zero, jax.tree.map(jnp.zeros_like, adapter))
  return jax.lax.scan(add, start, jax.tree.map(split, batch))[0]


def attacher(base_config, config, layout, dtype, wanted=None):
  """attach(params, adapter) -> Decoder, as fast as the layout's devices allow.

  `dtype`: of the params to come; attention kernels serve only some. `wanted`:
  another attention than model.attention.
  """
  train = config.train
  shape = (train.batch, train.length, base_config.kv_heads, base_config.head_dim)
  where = layout.sharding(('batch', None, 'kv_heads', None), shape, 'attention')
  rows = train.batch // train.accumulate // layout.row_parts
  name = attention.choose_implementation(
    wanted or config.model.attention,
    layout.device,
    base_config,
    dtype,
    rows,
    train.length,
  )
  packed = functools.partial(
    attention.packed_attention, implementation=name, where=where
  )
  options = dict(
    remat=config.model.remat,
    packed=packed,
    backend=layout.device.platform,
    constrain=layout.constrain,
  )

  def attach(params, adapter):
    return lora.attach(base_config, params, adapter, config.lora.alpha, **options)

  return attach


def state_shardings(layout, shapes, optimizer):
  """Shardings of {'adapter', 'optimizer', 'step'}; moments lie as weights."""
  where = layout.adapter(shapes)
  abstract = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  everywhere = layout.replicated
  moments = optax.tree.map_params(
    optimizer,
    lambda _, place: place,
    jax.eval_shape(optimizer.init, abstract),
    where,
    transform_non_params=lambda _: everywhere,
  )
  return {'adapter': where, 'optimizer': moments, 'step': everywhere}


def init_state(adapter, optimizer, shardings):
  """Fresh training state around `adapter`, placed by `shardings`."""

  def init(adapter):
    return {
      'adapter': adapter,
      'optimizer': optimizer.init(adapter),
      'step': jnp.zeros((), jnp.int32),
    }

  adapter = jax.device_put(adapter, shardings['adapter'])
  return jax.jit(init, out_shardings=shardings)(adapter)


def abstract_state(shapes, optimizer, shardings):
  """What init_state returns, as jax.ShapeDtypeStruct with shardings."""
  adapter = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  state = {
    'adapter': adapter,
    'optimizer': jax.eval_shape(optimizer.init, adapter),
    'step': jax.ShapeDtypeStruct((), jnp.int32),
  }
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    state,
    shardings,
  )


def make_step(
  attach,
  optimizer,
  schedule,
  accumulate,
  shardings,
  layout,
  answers=None,
  names=None,
):
  """jitted (state, params, batch) -> (state, metrics); state is donated.

  `answers`: the most in a device's rows of a micro-batch; it and `names`: see
  loss_sums.
  """
  groups = layout.row_parts

  def step(state, params, batch):
    loss, grads, weight = gradient(
      state['adapter'], params, batch, attach, accumulate, groups, answers, names
    )
    updates, moments = optimizer.update(grads, state['optimizer'], state['adapter'])
    new = {
      'adapter': optax.apply_updates(state['adapter'], updates),
      'optimizer': moments,
      'step': state['step'] + 1,
    }
    metrics = {
      'loss': loss,
      'grad_norm': optax.tree.norm(grads),
      'learning_rate': schedule(state['step']),
      'answer_weight': weight,
      'tokens': jnp.sum(batch['segments'] > 0),
      'padding': jnp.mean(batch['segments'] == 0),
      'samples': jnp.sum(batch['samples']),
    }
    return new, metrics

  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(shardings, layout.replicated),
    compiler_options=layout.compiler_options,
  )


def make_validation(attach, layout, answers=None, names=None):
  """jitted (adapter, params, batch) -> (loss sum, weight sum)."""
  groups = layout.row_parts

  def sums(adapter, params, batch):
    return loss_sums(attach(params, adapter), batch, groups, answers, names)

  return jax.jit(sums, out_shardings=layout.replicated)
