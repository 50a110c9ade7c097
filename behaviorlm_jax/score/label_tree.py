"""The label tree: exact log-probabilities of every behavior, in one pass.

All answers (name and line end, as tokens) form one tree whose root is the end
of the prompt. The prompt runs once and leaves its keys and values; then every
inner node of the tree is a query that sees the prompt and its own ancestors.
A node's hidden state gives the log-probability of each of its children, and a
behavior's score is the sum along its path:

  s(y) = sum_t log p(y_t | x, y_<t)

Leaves are never run: nothing follows them. Over the vocabulary long lists are
cut into chunks of names, each with a tree of its own, over the same keys and
values.

Each token's softmax runs over the vocabulary or, with score.softmax = names,
over the tokens with which some name of the list goes on: the distribution of
decoding that is held to the list. Then a token without an alternative costs
nothing and says nothing, so names end where they differ from all others
(`shortest`) and of most trees little is left.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import blocked_attention, decoder

TOP = 5  # Best answers that are told.


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
  """A token tree over some answers.

  Node 0 is the root (the prompt's last token, which is not run again); nodes
  1..N are inner nodes, each right before its descendants. Edges lead from a
  node to a token.
  """

  tokens: np.ndarray  # int32 [N], of nodes 1..N.
  depths: np.ndarray  # int32 [N], 1 for children of the root.
  edge_nodes: np.ndarray  # int32 [E], node that predicts the edge's token.
  edge_tokens: np.ndarray  # int32 [E].
  edge_children: np.ndarray  # int32 [E], node that the edge leads to; 0: leaf.
  paths: np.ndarray  # int32 [Y, T], edges of each answer; E: none.

  @functools.cached_property
  def node_edges(self) -> np.ndarray:
    """int32 [1 + N, F], edges of each node; E: none."""
    edges = [[] for _ in range(len(self.tokens) + 1)]
    for edge, node in enumerate(self.edge_nodes.tolist()):
      edges[node].append(edge)
    most = max(map(len, edges))
    none = len(self.edge_nodes)  # One past the last edge.
    return np.array([[*mine, *[none] * (most - len(mine))] for mine in edges], np.int32)

  def path(self, answer: int) -> np.ndarray:
    """Edges int32 [n] of an answer."""
    path = self.paths[answer]
    return path[path < len(self.edge_nodes)]

  def choices(self, answer: int) -> np.ndarray:
    """Positions int64 [n] of an answer's tokens that have an alternative.

    All, where none has: there is one answer alone.
    """
    nodes = self.edge_nodes[self.path(answer)]
    found = np.flatnonzero(self._fan_out[nodes] > 1)
    return found if len(found) else np.arange(len(nodes))

  @functools.cached_property  # Asked for with every target of a row.
  def _fan_out(self) -> np.ndarray:
    """int64 [1 + N], how many edges leave each node."""
    return np.bincount(self.edge_nodes)

  @functools.cached_property
  def ancestors(self) -> np.ndarray:
    """bool [N, N]: [i, j] says that node j + 1 is i + 1 or above it."""
    ancestors = np.eye(len(self.tokens), dtype=bool)
    for node, child in zip(self.edge_nodes, self.edge_children, strict=True):
      if node and child:  # Nodes above come first.
        ancestors[child - 1] |= ancestors[node - 1]
    return ancestors


def build(answers: Iterable[Sequence[int]]) -> Tree:
  """The Tree of a list of token sequences.

  Raises:
    InputError: two answers are equal, or one is the beginning of another.
  """
  answers = list(map(tuple, answers))
  nodes, edges = {(): 0}, {}  # {beginning of an answer: its number}.
  # Sorted, answers of one beginning lie together: a node's descendants follow it
  # at once, which `_attention` needs.
  for answer in sorted(answers):
    for i in range(len(answer)):
      nodes.setdefault(answer[:i], len(nodes))
      edges.setdefault(answer[: i + 1], len(edges))
  # An answer that is an inner node goes on as another one and ends at no leaf.
  if len(set(answers)) < len(answers) or nodes.keys() & set(answers):
    raise InputError(
      'data.events: two behavior names have the same tokens, or '
      'one begins with all of another; rename one of them.'
    )
  inner = [prefix for prefix in nodes if prefix]
  paths = np.full((len(answers), max(map(len, answers))), len(edges), np.int32)
  for y, answer in enumerate(answers):
    for i in range(len(answer)):
      paths[y, i] = edges[answer[: i + 1]]
  return Tree(
    np.array([p[-1] for p in inner], np.int32),
    np.array([len(p) for p in inner], np.int32),
    np.array([nodes[p[:-1]] for p in edges], np.int32),
    np.array([p[-1] for p in edges], np.int32),
    np.array([nodes.get(p, 0) for p in edges], np.int32),  # No edge leads to 0.
    paths,
  )


def shortest(answers: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
  """The answers as tuples, each cut behind its first token of its own."""
  beginnings = [
    [tuple(answer[:i]) for i in range(1, len(answer) + 1)] for answer in answers
  ]
  count = collections.Counter(itertools.chain.from_iterable(beginnings))
  # There is one in what `build` takes: no answer is another, or its beginning.
  return [next(one for one in mine if count[one] == 1) for mine in beginnings]


def tree_scores(
  model: decoder.Decoder,
  tree: Tree,
  last: jax.Array,
  cache: decoder.Cache,
  lengths: jax.Array,
  softmax: str,
) -> jax.Array:
  """Log-probabilities float32 [B, Y] of a tree's answers after prompts.

  Of these the model has the hidden state `last` [B, D] of the last token, keys and
  values `cache`, and `lengths` int32 [B] in tokens. `softmax`: score.softmax.
  """
  width = cache[0].shape[2]
  hidden = last[:, None]  # Of node 0.
  if len(tree.tokens):
    tokens = jnp.broadcast_to(tree.tokens, (len(last), len(tree.tokens)))
    # A child of the root, of depth 1, comes right after the prompt's last token,
    # whose position is the prompt's length less one.
    positions = lengths[:, None] + tree.depths - 1
    # The cache is as wide as the longest prompt; a shorter one ends in padding.
    prompt = jnp.arange(width) < lengths[:, None]
    below, _ = model(tokens, positions, _attention(tree, prompt), memory=cache)
    hidden = jnp.concatenate([hidden, below], axis=1)
  return path_scores(model, tree, hidden, softmax)


def path_scores(
  model: decoder.Decoder, tree: Tree, hidden: jax.Array, softmax: str
) -> jax.Array:
  """Log-probabilities float32 [B, Y] of a tree's answers.

  `hidden`: [B, 1 + N, D], of the tree's nodes; `softmax`: score.softmax.
  """
  score = _within_names if softmax == 'names' else _over_vocabulary
  edges = score(model, tree, hidden)
  edges = jnp.pad(edges, ((0, 0), (0, 1)))  # The edge that paths pad with.
  return edges[:, tree.paths].sum(axis=-1)


def _within_names(model: decoder.Decoder, tree: Tree, hidden: jax.Array) -> jax.Array:
  """hidden [B, 1 + N, D] to log p float32 [B, E], over each node's edges."""
  nodes, count = tree.edge_nodes, hidden.shape[1]

  def score(hidden: jax.Array) -> jax.Array:
    logits = model.logits_of(hidden[nodes], jnp.asarray(tree.edge_tokens))
    # A softmax per node; without its largest logit exp could overflow.
    logits -= jax.ops.segment_max(logits, nodes, count)[nodes]
    return logits - jnp.log(jax.ops.segment_sum(jnp.exp(logits), nodes, count))[nodes]

  return jax.lax.map(score, hidden)  # A prompt at a time: E x D products.


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


_BLOCK = 128  # Nodes whose attention is computed at a time.


def _attention(tree: Tree, prompt: jax.Array) -> decoder.Attend:
  """`attend` of a tree's nodes, to prompts bool [B, P] and their ancestors."""

  def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, prompt_k: jax.Array, prompt_v: jax.Array
  ) -> jax.Array:
    q, blocks = blocked_attention.scaled(q), []
    for begin in range(0, len(tree.tokens), _BLOCK):
      rows = slice(begin, begin + _BLOCK)
      above = tree.ancestors[rows]
      # From the first ancestor of any of them to their last. A node follows its
      # ancestors closely, so that is little more than the block.
      seen = slice(int(above.any(axis=0).argmax()), begin + len(above))
      keys = jnp.concatenate([prompt_k, k[:, seen]], axis=1)
      values = jnp.concatenate([prompt_v, v[:, seen]], axis=1)
      shape = (len(prompt), 1, len(above))  # Every query, whatever its head.
      masks = (prompt[:, None, None], above[:, seen])
      mask = jnp.concatenate(
        [jnp.broadcast_to(mask, (*shape, mask.shape[-1])) for mask in masks], axis=-1
      )
      blocks.append(blocked_attention.grouped(q[:, rows], keys, values, mask))
    return jnp.concatenate(blocks, axis=1)

  return attend


def log_softmax(scores: np.ndarray) -> np.ndarray:
  """log p(y | x) over the closed list, of s [n, Y]."""
  scores = np.asarray(scores, np.float64)  # Whose sum adds no error of its own.
  top = scores.max(axis=1, keepdims=True)
  return scores - top - np.log(np.exp(scores - top).sum(axis=1, keepdims=True))


def best(scores: np.ndarray, k: int = TOP) -> np.ndarray:
  """Ids int64 [n, min(k, Y)] by falling score; equals by id."""
  return np.argsort(-scores, axis=1, kind='stable')[:, :k]
