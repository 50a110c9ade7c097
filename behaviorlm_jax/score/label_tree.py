"""The label tree: exact log-probabilities of every behavior, in one pass.

All answers (name and line end, as tokens) form one tree whose root is the end
of a question (score.tree_scores runs it). A behavior's score is the sum along
its path:

  s(y) = sum_t log p(y_t | x, y_<t)

Leaves are never run: nothing follows them. Where each softmax runs over the
tokens with which some name goes on, a token without an alternative costs nothing
and says nothing, so names end where they differ from all others (`shortest`) and
of most trees little is left.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from behaviorlm_jax.errors import InputError

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


def log_softmax(scores: np.ndarray) -> np.ndarray:
  """log p(y | x) over the closed list, of s [n, Y]."""
  scores = np.asarray(scores, np.float64)  # Whose sum adds no error of its own.
  top = scores.max(axis=1, keepdims=True)
  return scores - top - np.log(np.exp(scores - top).sum(axis=1, keepdims=True))


def best(scores: np.ndarray, k: int = TOP) -> np.ndarray:
  """Ids int64 [n, min(k, Y)] by falling score; equals by id."""
  return np.argsort(-scores, axis=1, kind='stable')[:, :k]
