"""SASRec, the small model trained from nothing that a tuned one must beat.

Causal self-attention over a user's last events (Kang and McAuley, ICDM 2018),
trained with softmax cross-entropy over the whole behavior list: with it SASRec
is ahead of BERT4Rec (Klenitskiy and Vasilev, RecSys 2023). The model is told
what a prompt tells the language model, too: the hour, and where lines name it
the weekday, of the event to predict.

Its past is that of the count baselines: every earlier event of the user,
whatever its split; the events that it learns are those of the training split.

Shapes: B windows, L events of each, Y known behaviors.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from behaviorlm_jax import seeds
from behaviorlm_jax.data import events as events_lib

CHECKS = 10  # How often the validation loss is taken.
CHECKED = 2000  # Validation events behind it, at most.
SCORED = 256  # Samples per pass.
HOURS, DAYS = 24, 7


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What the model is made of, what it is told, and how it is trained."""

  steps: int
  width: int  # Of its hidden states.
  weekday: bool  # Whether it is told of it, as prompts are.
  min_context: int  # Events before every target, at least.
  seed: int
  layers: int = 2
  heads: int = 2  # They divide the width.
  history: int = 48  # Events of a window.
  batch: int = 64  # Windows per step.
  dropout: float = 0.3  # Of hidden states and attention.
  learning_rate: float = 3e-3


class Block(nnx.Module):
  """Attention and two dense layers, norms before and residuals around."""

  def __init__(self, recipe: Recipe, rngs: nnx.Rngs):
    width = recipe.width
    self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
    # Flax would drop the same weights for all windows of a batch: worse.
    self.attention = nnx.MultiHeadAttention(
      recipe.heads,
      width,
      dropout_rate=recipe.dropout,
      broadcast_dropout=False,
      decode=False,
      rngs=rngs,
    )
    self.inner = nnx.Linear(width, width, rngs=rngs)
    self.outer = nnx.Linear(width, width, rngs=rngs)
    self.dropout = nnx.Dropout(recipe.dropout, rngs=rngs)

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    y = self.norms[0](x)
    x = x + self.dropout(self.attention(y, mask=mask))
    y = self.outer(self.dropout(jax.nn.relu(self.inner(self.norms[1](x)))))
    return x + self.dropout(y)


class SasRec(nnx.Module):
  """Logits float32 [B, L, Y] of the behavior after each event."""

  def __init__(self, recipe: Recipe, known: int, rngs: nnx.Rngs):
    width = recipe.width
    spread = nnx.initializers.normal(width**-0.5)
    embed = lambda count: nnx.Embed(count, width, rngs=rngs, embedding_init=spread)
    self.known = known
    self.behaviors = embed(known + 1)  # The last: those not known.
    self.places, self.hours, self.days = map(embed, (recipe.history, HOURS, DAYS))
    self.blocks = nnx.List([Block(recipe, rngs) for _ in range(recipe.layers)])
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.dropout = nnx.Dropout(recipe.dropout, rngs=rngs)

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
  events: events_lib.Events, ends: np.ndarray, recipe: Recipe
) -> dict[str, np.ndarray]:
  """What stands before positions int64 [B], at most L events, right-aligned.

  Returns:
    {'behavior', 'hour', 'day': int32 [B, L], of an event and of the time of
    the next one; 'real': bool [B, L]; 'next': positions int64 [B, L]}.
  """
  at = ends[:, None] - np.arange(recipe.history, 0, -1)  # L, ..., 1 before.
  real = at >= np.asarray(events.first[ends])[:, None]
  # Before a user's first event any that exists will do: `real` hides it.
  at = np.where(real, at, ends[:, None] - 1)
  # Of the event to predict, whose time a prompt shows, too.
  seconds = np.asarray(events.time[at + 1], np.int64)
  day = seconds // 86400 % DAYS if recipe.weekday else 0 * seconds
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
  recipe: Recipe,
  progress: Callable[[int], None] = lambda n: None,
) -> SasRec:
  """Trains a model; returns it as it was when it did best in validation.

  `progress`: called with the number of steps done since the last call; may raise.
  """
  model = SasRec(recipe, events.known, nnx.Rngs(recipe.seed))
  model.train()
  optimizer = nnx.Optimizer(model, optax.adam(recipe.learning_rate), wrt=nnx.Param)
  draw, held = (_ends(events, split, recipe) for split in ('train', 'validation'))
  rng = seeds.stream(recipe.seed, 'sasrec', 'batches')
  checks = rng.choice(held, min(len(held), CHECKED), replace=False)
  # A step gives the model's variables, which `nnx.state` shares, new arrays.
  copy = lambda: jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
  best, kept = np.inf, copy()
  every = -(-recipe.steps // CHECKS)
  for step in range(1, recipe.steps + 1):
    ends = rng.choice(draw, recipe.batch)
    _train(model, optimizer, targets(events, windows(events, ends, recipe), 'train'))
    if step % every == 0 or step == recipe.steps:
      found = _validation(model, events, checks, recipe)
      # With nothing to check on the last state is the one to keep.
      if found < best or not len(checks):
        best, kept = found, copy()
    progress(1)
  nnx.update(model, kept)
  model.eval()
  return model


def _ends(events, split, recipe):
  """Positions int64 with a past and a known behavior."""
  chosen = events.split == events_lib.SPLITS.index(split)
  positions = np.flatnonzero(chosen & (events.behavior < events.known))
  return positions[positions - events.first[positions] >= recipe.min_context]


@nnx.jit
def _train(model, optimizer, batch):
  optimizer.update(model, nnx.grad(loss)(model, batch))


@nnx.jit
def _logits(model, batch):
  return model(batch)[:, -1]  # Right-aligned: the last place asks for the sample.


def _validation(model, events, ends, recipe):
  """Mean -log p of the events at `ends`; 0 without any."""
  if not len(ends):
    return 0.0
  model.eval()  # Without dropout.
  found = predict_log_p(model, events, ends, recipe)
  model.train()
  return -float(found[np.arange(len(ends)), events.behavior[ends]].mean())


def predict_log_p(
  model: SasRec, events: events_lib.Events, samples: np.ndarray, recipe: Recipe
) -> np.ndarray:
  """log p float32 [n, Y] of what happens at positions int64 [n]."""
  found = []
  for begin in range(0, len(samples), SCORED):
    ends = samples[begin : begin + SCORED]
    more = SCORED - len(ends)  # One shape, one compilation.
    batch = windows(events, np.pad(ends, (0, more), 'edge'), recipe)
    del batch['next']
    logits = np.asarray(_logits(model, batch))[: len(ends)]
    found.append(logits - np.logaddexp.reduce(logits, 1, keepdims=True))
  return np.concatenate(found).astype(np.float32)
