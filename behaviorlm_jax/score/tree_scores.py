"""Log-probabilities of every name at every question of a row.

A row of packed windows has run, and left its hidden states, keys and values. Now
the label tree hangs off the last token of each question: its inner nodes see
their own window up to that token, and their own ancestors. Neither later events
nor the nodes of another question are in sight, so the scores are those of each
question by itself. A node's hidden state gives the log-probability of each of
its children, and a name's score is the sum along its path.

Each token's softmax runs over the vocabulary or, with score.softmax = names,
over the tokens with which some name of the list goes on: the distribution of
decoding that is held to the list.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from behaviorlm_jax.model import blocked_attention, decoder
from behaviorlm_jax.score.label_tree import Tree

_BLOCK = 128  # Nodes whose attention is computed at a time.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadRows:
  """Rows that the model has read: L tokens, each with its window's number."""

  segments: jax.Array  # int32 [B, L]; 0 is padding.
  positions: jax.Array  # int32 [B, L], in the window.
  hidden: jax.Array  # [B, L, D]
  cache: decoder.Cache


def read_rows(
  model: decoder.Decoder, tokens: jax.Array, positions: jax.Array, segments: jax.Array
) -> ReadRows:
  """Runs packed rows int32 [B, L]."""
  hidden, cache = model.packed_hidden(tokens, positions, segments, keep_cache=True)
  return ReadRows(segments, positions, hidden, cache)


def question_scores(
  model: decoder.Decoder, tree: Tree, rows: ReadRows, roots: jax.Array, softmax: str
) -> jax.Array:
  """Log-probabilities float32 [B, S, Y] of a tree's answers to S questions a row.

  `roots`: int32 [B, S], where the last token of each question stands in its row;
  `softmax`: score.softmax.
  """
  batch, asked = roots.shape
  nodes = len(tree.tokens)
  at = lambda x: jnp.take_along_axis(x, roots, axis=1)
  hidden = jnp.take_along_axis(rows.hidden, roots[..., None], axis=1)
  hidden = hidden.reshape(batch * asked, 1, -1)  # Of node 0 of each question.
  if nodes:
    tokens = jnp.tile(jnp.asarray(tree.tokens), (batch, asked))
    # A child of the root, of depth 1, comes right after the question.
    positions = (at(rows.positions)[..., None] + tree.depths).reshape(batch, -1)
    seen = rows.segments[:, None] == at(rows.segments)[..., None]
    seen &= jnp.arange(rows.segments.shape[1]) <= roots[..., None]
    below, _ = model(tokens, positions, _attention(tree, seen), memory=rows.cache)
    below = below.reshape(batch * asked, nodes, -1)
    hidden = jnp.concatenate([hidden, below], axis=1)
  score = _within_names if softmax == 'names' else _over_vocabulary
  edges = score(model, tree, hidden)
  edges = jnp.pad(edges, ((0, 0), (0, 1)))  # The edge that paths pad with.
  return edges[:, tree.paths].sum(axis=-1).reshape(batch, asked, -1)


def _attention(tree: Tree, seen: jax.Array) -> decoder.Attend:
  """`attend` of S trees' nodes, to what seen bool [B, S, L] has and ancestors."""
  asked, nodes = seen.shape[1], len(tree.tokens)
  owner = np.repeat(np.arange(asked), nodes)
  # The trees stand one behind the other.
  ancestors = np.kron(np.eye(asked, dtype=bool), tree.ancestors)

  def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, row_k: jax.Array, row_v: jax.Array
  ) -> jax.Array:
    q, blocks = blocked_attention.scaled(q), []
    for begin in range(0, len(owner), _BLOCK):
      block = slice(begin, begin + _BLOCK)
      above = ancestors[block]
      # From the first ancestor of any of them to their last. A node follows its
      # ancestors closely, so that is little more than the block.
      near = slice(int(above.any(axis=0).argmax()), begin + len(above))
      above = jnp.broadcast_to(above[:, near], (len(seen), *above[:, near].shape))
      mask = jnp.concatenate([seen[:, owner[block]], above], axis=-1)[:, None]
      keys = jnp.concatenate([row_k, k[:, near]], axis=1)
      values = jnp.concatenate([row_v, v[:, near]], axis=1)
      blocks.append(blocked_attention.grouped(q[:, block], keys, values, mask))
    return jnp.concatenate(blocks, axis=1)

  return attend


def _within_names(model: decoder.Decoder, tree: Tree, hidden: jax.Array) -> jax.Array:
  """hidden [B, 1 + N, D] to log p float32 [B, E], over each node's edges."""
  nodes, count = tree.edge_nodes, hidden.shape[1]

  def score(hidden: jax.Array) -> jax.Array:
    logits = model.logits_of(hidden[nodes], jnp.asarray(tree.edge_tokens))
    # A softmax per node; without its largest logit exp could overflow.
    logits -= jax.ops.segment_max(logits, nodes, count)[nodes]
    return logits - jnp.log(jax.ops.segment_sum(jnp.exp(logits), nodes, count))[nodes]

  return jax.lax.map(score, hidden)  # A question at a time: E x D products.


def _over_vocabulary(
  model: decoder.Decoder, tree: Tree, hidden: jax.Array
) -> jax.Array:
  """hidden [B, 1 + N, D] to log p float32 [B, E], over the vocabulary."""
  batch, nodes, width = hidden.shape
  # Some rows at a time: logits of [rows, V] that leave a CPU's cache take twice
  # as long.
  rows = 64 if model.on_cpu else 512
  # Edge E, which is none, has token -1.
  children = np.append(tree.edge_tokens, -1)[tree.node_edges]
  blocks = -(-batch * nodes // rows)
  more = blocks * rows - batch * nodes  # So that the last block is full.
  hidden = jnp.pad(hidden.reshape(-1, width), ((0, more), (0, 0)))
  children = np.pad(np.tile(children, (batch, 1)), ((0, more), (0, 0)))
  found = jax.lax.map(
    lambda x: log_probs(model, *x),
    (hidden.reshape(blocks, rows, -1), children.reshape(blocks, rows, -1)),
  )
  found = found.reshape(blocks * rows, -1)[: batch * nodes]
  # Where each edge stands in [1 + N, F]: once, and E, none, sorts behind them all.
  edges = np.argsort(tree.node_edges, axis=None)[: len(tree.edge_nodes)]
  return found.reshape(batch, -1)[:, edges]


def log_probs(
  model: decoder.Decoder, hidden: jax.Array, tokens: jax.Array
) -> jax.Array:
  """log p float32 [..., F] of tokens [..., F] after hidden states [..., D].

  Token -1 is none; what is said of it means nothing.
  """
  logits = model.logits(hidden)
  chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0), axis=-1)
  return chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
