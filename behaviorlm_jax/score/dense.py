"""Scores rows of questions: log-probabilities of every name at each of them.

A row runs once and leaves its keys and values. Then the label tree hangs off
the last token of every question: its inner nodes see their own window up to that
token, and their own ancestors. Neither later events nor the nodes of another
question are in sight, so the scores are those of each question by itself.
"""

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from behaviorlm_jax.data.questions import Row
from behaviorlm_jax.model import attention, decoder, lora
from behaviorlm_jax.score import label_tree as labels_lib
from behaviorlm_jax.score.scorer import Attach, Places

_NODES = 128  # Inner nodes that a row is asked at once, about.
_BLOCK = 128  # Of these, whose attention is computed at a time.


def question_scores(
  model: decoder.Decoder,
  tree: labels_lib.Tree,
  rows: Mapping[str, jax.Array],
  roots: jax.Array,
  softmax: str,
) -> jax.Array:
  """Log-probabilities float32 [B, S, Y] of a tree's answers.

  Args:
    model: that has run the rows.
    tree: of the answers.
    rows: 'positions' and 'segments' int32 [B, L], 'hidden' [B, L, D] and the
      'cache' of keys and values.
    roots: int32 [B, S], where questions end in their rows.
    softmax: score.softmax.
  """
  batch, slots = roots.shape
  count, segments = len(tree.tokens), rows['segments']
  at = lambda x: jnp.take_along_axis(x, roots, axis=1)
  hidden = jnp.take_along_axis(rows['hidden'], roots[..., None], axis=1)
  hidden = hidden.reshape(batch * slots, 1, -1)  # Of node 0 of each question.
  if count:
    tokens = jnp.broadcast_to(
      jnp.tile(jnp.asarray(tree.tokens), slots), (batch, slots * count)
    )
    positions = at(rows['positions'])[..., None] + tree.depths
    # bool [B, S, L]
    seen = segments[:, None] == at(segments)[..., None]
    seen &= jnp.arange(segments.shape[1]) <= roots[..., None]
    below, _ = model(
      tokens,
      positions.reshape(batch, -1),
      _attention(tree, seen),
      memory=rows['cache'],
    )
    below = below.reshape(batch * slots, count, -1)
    hidden = jnp.concatenate([hidden, below], axis=1)
  scores = labels_lib.path_scores(model, tree, hidden, softmax)
  return scores.reshape(batch, slots, -1)


def _attention(tree: labels_lib.Tree, seen: jax.Array) -> decoder.Attend:
  """`attend` of S trees' nodes, to what seen bool [B, S, L] has and ancestors."""
  slots, count = seen.shape[1], len(tree.tokens)
  # bool [S N, S N]: the trees stand one behind the other.
  ancestors = np.kron(np.eye(slots, dtype=bool), tree.ancestors)

  def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, row_k: jax.Array, row_v: jax.Array
  ) -> jax.Array:
    q, blocks = attention.scaled(q), []
    for begin in range(0, slots * count, _BLOCK):
      block = ancestors[begin : begin + _BLOCK]
      nodes = slice(begin, begin + len(block))
      # From the first ancestor of any of them to their last. A node follows its
      # ancestors closely, so that is little more than the block.
      near = slice(int(block.any(axis=0).argmax()), nodes.stop)
      above = block[:, near]
      row = seen[:, np.arange(nodes.start, nodes.stop) // count]
      mask = jnp.concatenate(
        [row, jnp.broadcast_to(above, (len(row), *above.shape))], axis=-1
      )
      keys = jnp.concatenate([row_k, k[:, near]], axis=1)
      values = jnp.concatenate([row_v, v[:, near]], axis=1)
      blocks.append(attention.grouped(q[:, nodes], keys, values, mask[:, None]))
    return jnp.concatenate(blocks, axis=1)

  return attend


class Scorer:
  """s(y) of every behavior at each question of packed rows."""

  def __init__(
    self,
    attach: Attach,
    params: Mapping[str, jax.Array],
    trees: Sequence[labels_lib.Tree],
    softmax: str,
    layout: Places,
  ):
    """Compiles nothing yet.

    Args:
      attach: (params, adapter) -> decoder.
      params: base weights.
      trees: of all behaviors, some in each.
      softmax: score.softmax.
      layout: train.sharding.Layout.
    """
    self.layout, self.params = layout, params
    most = max(len(tree.tokens) for tree in trees)
    self.slots = max(1, _NODES // max(1, most))

    # The weights are an argument: what is closed over becomes a constant of the
    # program, and a copy.
    def read(adapter, params, rows):
      model = attach(params, adapter)
      hidden, cache = model.packed_hidden(
        rows['tokens'], rows['positions'], rows['segments'], keep_cache=True
      )
      return rows | {'hidden': hidden, 'cache': cache}

    def ask(adapter, params, rows, roots):
      model = attach(params, adapter)
      parts = [question_scores(model, tree, rows, roots, softmax) for tree in trees]
      return jnp.concatenate(parts, axis=-1)

    options = layout.compiler_options
    self._read = jax.jit(read, compiler_options=options)
    self._ask = jax.jit(ask, out_shardings=layout.replicated, compiler_options=options)

  def __call__(
    self, adapter: lora.Adapter | None, rows: Sequence[Row], batch: int
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields targets int64 [n] and their scores float32 [n, Y], in nats.

    Args:
      adapter: LoRA weights or None for the base model.
      rows: of one length.
      batch: rows of a pass; raised to what devices divide evenly.
    """
    parts = self.layout.row_parts
    batch = -(-batch // parts) * parts
    # Rows of as many questions come together: none waits for the others.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].roots))
    for begin in range(0, len(order), batch):
      yield self._batch(adapter, [rows[i] for i in order[begin : begin + batch]], batch)

  def _batch(self, adapter, rows, batch):
    # Empty rows complete the last batch.
    names = ('tokens', 'positions', 'segments')
    placed = {name: np.zeros((batch, len(rows[0].tokens)), np.int32) for name in names}
    most = max(len(row.roots) for row in rows)
    passes = -(-most // self.slots)
    roots = np.zeros((batch, passes * self.slots), np.int32)
    for i, row in enumerate(rows):
      for name in names:
        placed[name][i] = getattr(row, name)
      roots[i, : len(row.roots)] = row.roots
    read = self._read(adapter, self.params, self.layout.put_same(placed))
    found = [
      self._ask(adapter, self.params, read, self.layout.put_same({'r': part})['r'])
      for part in np.split(roots, passes, axis=1)
    ]
    scores = np.concatenate(list(map(np.asarray, found)), axis=1)
    targets = np.concatenate([row.targets for row in rows])
    return targets, np.concatenate(
      [scores[i, : len(row.roots)] for i, row in enumerate(rows)]
    )
