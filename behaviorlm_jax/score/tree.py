"""The token tree of a closed list of answers.

Node 0 is the root, the end of the prompt; nodes 1..N are inner nodes, in
depth-first preorder: what is below a node follows it without a gap. Edges lead
from a node to a token, and so to an inner node or to the end of an answer.
"""

import dataclasses
import functools

import numpy as np

from behaviorlm_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
  """A token tree over Y answers; arrays of nodes begin with node 1.

  An answer's path is as long as the answer, its tail is none: E.
  """
  tokens: np.ndarray  # int32 [N].
  depths: np.ndarray  # int32 [N], 1 for children of the root.
  ends: np.ndarray  # int32 [N], the node after all that are below.
  edge_nodes: np.ndarray  # int32 [E], node that predicts the edge's token.
  edge_tokens: np.ndarray  # int32 [E].
  paths: np.ndarray  # int32 [Y, T], edges of each answer; E: none.

  @functools.cached_property
  def ancestors(self):
    """bool [N, N], [i, j]: node j + 1 is node i + 1 or above it."""
    nodes = np.arange(1, len(self.tokens) + 1)
    return (nodes <= nodes[:, None]) & (nodes[:, None] < self.ends)

  @functools.cached_property
  def into(self):
    """int32 [N]: the edge that leads to each node."""
    edges = np.zeros(len(self.tokens), np.int32)
    for here, after in zip(self.paths.T, self.paths.T[1:], strict=False):
      inner = after < len(self.edge_nodes)
      edges[self.edge_nodes[after[inner]] - 1] = here[inner]
    return edges

  @functools.cached_property
  def last(self):
    """int32 [Y]: the last edge of each answer's path."""
    lengths = (self.paths < len(self.edge_nodes)).sum(axis=1)
    return self.paths[np.arange(len(lengths)), lengths - 1]

  @functools.cached_property
  def levels(self):
    """Edges of each depth, from the root's on, as int arrays."""
    depths = np.concatenate([[0], self.depths])[self.edge_nodes]
    return [np.flatnonzero(depths == d) for d in range(depths.max() + 1)]

  @functools.cached_property
  def shares(self):
    """float64 [E]: share of the answers below an edge's node that it leads to.
    """
    answers = np.bincount(self.paths.ravel())[:len(self.edge_nodes)]
    below = np.concatenate([[len(self.paths)], answers[self.into]])
    return answers / below[self.edge_nodes]

  def sums(self, values):
    """[.., E]: sums of `values` [.., E] of edges along the way to each edge."""
    result = values.copy()
    for edges in self.levels[1:]:
      before = self.into[self.edge_nodes[edges] - 1]
      result[..., edges] += result[..., before]
    return result


def build(answers):
  """The Tree of a list of token sequences.

  Raises:
    InputError: two answers are equal, or one is the beginning of another.
  """
  nodes, edges = {(): 0}, {}
  for answer in sorted(map(tuple, answers)):
    for i in range(len(answer)):
      if i:
        nodes.setdefault(answer[:i], len(nodes))
      edges.setdefault(answer[:i + 1], len(edges))
  whole = set(map(tuple, answers))
  if len(whole) < len(answers) or whole & set(nodes):
    raise InputError('data.events: two behavior names have the same tokens, or '
                     'one begins with all of another; rename one of them.')
  inner = [prefix for prefix in nodes if prefix]
  ends = np.arange(2, len(nodes) + 1, dtype=np.int32)
  for prefix in reversed(inner):
    if len(prefix) > 1:
      above = nodes[prefix[:-1]] - 1
      ends[above] = max(ends[above], ends[nodes[prefix] - 1])
  paths = np.full((len(answers), max(map(len, answers))), len(edges), np.int32)
  for y, answer in enumerate(map(tuple, answers)):
    for i in range(len(answer)):
      paths[y, i] = edges[answer[:i + 1]]
  return Tree(
      np.array([p[-1] for p in inner], np.int32),
      np.array([len(p) for p in inner], np.int32), ends,
      np.array([nodes[p[:-1]] for p in edges], np.int32),
      np.array([p[-1] for p in edges], np.int32), paths)
