"""SASRec, the small model trained from nothing that a tuned one must beat.

Causal self-attention over a user's last events (Kang and McAuley, ICDM 2018),
trained with softmax cross-entropy over the whole behavior list: with it SASRec
is ahead of BERT4Rec (Klenitskiy and Vasilev, RecSys 2023). The model is told
what a prompt tells the language model, too: the hour, and where lines name it
the weekday, of the event to predict.

Its past is that of the count baselines: every earlier event of the user,
whatever its split; the events that it learns are those of the training split.

Shapes: B windows, L = sasrec.history events, Y known behaviors, D the width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from behaviorlm_jax import seeds
from behaviorlm_jax.data import events as events_lib

CHECKS = 10  # How often the validation loss is taken.
CHECKED = 2000  # Validation events behind it, at most.
SCORED = 256  # Samples per pass.
HOURS, DAYS = 24, 7


class Block(nnx.Module):
  """Attention and two dense layers, norms before and residuals around."""

  def __init__(self, sasrec: ConfigDict, rngs: nnx.Rngs):
    width = sasrec.width
    self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
    # Flax would drop the same weights for all windows of a batch: worse.
    self.attention = nnx.MultiHeadAttention(
      sasrec.heads,
      width,
      dropout_rate=sasrec.dropout,
      broadcast_dropout=False,
      decode=False,
      rngs=rngs,
    )
    self.inner = nnx.Linear(width, width, rngs=rngs)
    self.outer = nnx.Linear(width, width, rngs=rngs)
    self.dropout = nnx.Dropout(sasrec.dropout, rngs=rngs)

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    y = self.norms[0](x)
    x = x + self.dropout(self.attention(y, mask=mask))
    y = self.outer(self.dropout(jax.nn.relu(self.inner(self.norms[1](x)))))
    return x + self.dropout(y)


class SasRec(nnx.Module):
  """Logits float32 [B, L, Y] of the behavior after each event."""

  def __init__(self, sasrec: ConfigDict, known: int, rngs: nnx.Rngs):
    embed = lambda count: nnx.Embed(
      count,
      sasrec.width,
      rngs=rngs,
      embedding_init=nnx.initializers.normal(sasrec.width**-0.5),
    )
    self.known = known
    self.behaviors = embed(known + 1)  # The last: those not known.
    self.places, self.hours, self.days = map(embed, (sasrec.history, HOURS, DAYS))
    self.blocks = nnx.List([Block(sasrec, rngs) for _ in range(sasrec.layers)])
    self.norm = nnx.LayerNorm(sasrec.width, rngs=rngs)
    self.dropout = nnx.Dropout(sasrec.dropout, rngs=rngs)

  def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
    real, places = batch['real'], jnp.arange(batch['real'].shape[1])
    x = self.behaviors(batch['behavior']) + self.places(places)
    x = self.dropout(x + self.hours(batch['hour']) + self.days(batch['day']))
    # No event sees a later one or what stands before the user's first. One mask
    # for all heads: [B, 1, L, L].
    mask = (places[:, None] >= places) & real[:, None, None]
    for block in self.blocks:
      x = block(x, mask)
    # Scored by the embeddings that are read, as in the paper.
    return self.norm(x) @ self.behaviors.embedding[: self.known].T


def windows(
  events: events_lib.Events, ends: np.ndarray, config: ConfigDict
) -> dict[str, np.ndarray]:
  """What stands before events, at most L of their user, right-aligned.

  Args:
    events: data.events.Events.
    ends: positions int64 [B].
    config: the whole config.

  Returns:
    {'behavior', 'hour', 'day': int32 [B, L], of an event and of the time of
    the next one; 'real': bool [B, L]; 'next': positions int64 [B, L]}.
  """
  at = ends[:, None] - np.arange(config.sasrec.history, 0, -1)  # L, ..., 1 before.
  real = at >= np.asarray(events.first[ends])[:, None]
  # Before a user's first event any that exists will do: `real` hides it.
  at = np.where(real, at, ends[:, None] - 1)
  # Of the event to predict, whose time a prompt shows, too.
  seconds = np.asarray(events.time[at + 1], np.int64)
  day = seconds // 86400 % DAYS if config.data.weekday else 0 * seconds
  behavior = np.where(real, events.behavior[at], 0)
  return {
    # Those that training does not know share the last embedding.
    'behavior': np.minimum(behavior, events.known).astype(np.int32),
    'hour': (seconds // 3600 % HOURS).astype(np.int32),
    'day': day.astype(np.int32),
    'real': real,
    'next': at + 1,
  }


def targets(
  events: events_lib.Events, batch: dict[str, np.ndarray], split: str
) -> dict[str, np.ndarray]:
  """Which next events of `windows` are learned or checked.

  Returns the batch without their positions, with `target` int32 [B, L] and
  `weight` float32 [B, L], 1 or 0.
  """
  place = batch['next']
  behavior = events.behavior[place]
  chosen = (
    batch['real']
    & (behavior < events.known)
    & (events.split[place] == events_lib.SPLITS.index(split))
  )
  rest = {name: value for name, value in batch.items() if name != 'next'}
  return rest | {
    'target': np.where(chosen, behavior, 0).astype(np.int32),
    'weight': chosen.astype(np.float32),
  }


def loss(model: SasRec, batch: dict[str, jax.Array]) -> jax.Array:
  """Mean cross-entropy of the targets, in nats."""
  losses = optax.softmax_cross_entropy_with_integer_labels(
    model(batch), batch['target']
  )
  weight = batch['weight']
  # At least 1: a batch may hold no target, and is then no loss.
  return jnp.sum(losses * weight) / jnp.maximum(jnp.sum(weight), 1)


def fit_model(
  events: events_lib.Events,
  config: ConfigDict,
  progress: Callable[[int], None] = lambda n: None,
) -> SasRec:
  """Trains a model; returns it as it was when it did best in validation.

  Args:
    events: data.events.Events.
    config: the whole config.
    progress: called with the number of steps done since the last call; may
      raise.
  """
  sasrec = config.sasrec
  model = SasRec(sasrec, events.known, nnx.Rngs(config.seed))
  model.train()
  optimizer = nnx.Optimizer(model, optax.adam(sasrec.learning_rate), wrt=nnx.Param)
  draw = _ends(events, 'train', config)
  held = _ends(events, 'validation', config)
  rng = seeds.stream(config.seed, 'sasrec', 'batches')
  checks = rng.choice(held, min(len(held), CHECKED), replace=False)
  # A step gives the model's variables, which `nnx.state` shares, new arrays.
  copy = lambda: jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
  best, kept = np.inf, copy()
  every = -(-sasrec.steps // CHECKS)
  for step in range(1, sasrec.steps + 1):
    ends = rng.choice(draw, sasrec.batch)
    _train(model, optimizer, targets(events, windows(events, ends, config), 'train'))
    if step % every == 0 or step == sasrec.steps:
      found = _validation(model, events, checks, config)
      # With nothing to check on the last state is the one to keep.
      if found < best or not len(checks):
        best, kept = found, copy()
    progress(1)
  nnx.update(model, kept)
  model.eval()
  return model


def _ends(events: events_lib.Events, split: str, config: ConfigDict) -> np.ndarray:
  """Positions int64 with a past and a known behavior."""
  chosen = (events.split == events_lib.SPLITS.index(split)) & (
    events.behavior < events.known
  )
  positions = np.flatnonzero(chosen)
  return positions[positions - events.first[positions] >= config.plan.min_context]


@nnx.jit
def _train(
  model: SasRec, optimizer: nnx.Optimizer, batch: dict[str, jax.Array]
) -> None:
  optimizer.update(model, nnx.grad(loss)(model, batch))


@nnx.jit
def _logits(model: SasRec, batch: dict[str, jax.Array]) -> jax.Array:
  return model(batch)[:, -1]  # Right-aligned: the last place asks for the sample.


def _validation(
  model: SasRec, events: events_lib.Events, ends: np.ndarray, config: ConfigDict
) -> float:
  """Mean -log p of the events at `ends`; 0 without any."""
  if not len(ends):
    return 0.0
  model.eval()  # Without dropout.
  found = predict_log_p(model, events, ends, config)
  model.train()
  return -float(found[np.arange(len(ends)), events.behavior[ends]].mean())


def predict_log_p(
  model: SasRec, events: events_lib.Events, samples: np.ndarray, config: ConfigDict
) -> np.ndarray:
  """log p float32 [n, Y] of what happens at positions int64 [n]."""
  found = []
  for begin in range(0, len(samples), SCORED):
    ends = samples[begin : begin + SCORED]
    more = SCORED - len(ends)  # One shape, one compilation.
    batch = windows(events, np.pad(ends, (0, more), 'edge'), config)
    del batch['next']
    logits = np.asarray(_logits(model, batch))[: len(ends)]
    found.append(logits - np.logaddexp.reduce(logits, 1, keepdims=True))
  return np.concatenate(found).astype(np.float32)
