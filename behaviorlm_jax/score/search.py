"""Best-first search of a long list's label tree: run only nodes that matter.

For scores over the vocabulary (score.softmax); within names the tree is short.

The probability of a prefix bounds that of all names that begin with it, so what
has not been run has a known mass. Of every prompt a search knows

  known = sum of p(name | prompt) over the names it has scored
  open = sum of p(prefix | prompt) over the prefixes whose node has not run

and it is certified once nothing open can change the answer: log p over the
closed list moves by at most log(1 + open / known) for any scored name, no open
prefix is more probable than the k-th best name, and the wanted name is scored.

`Search` is the host's side of one prompt; `expand` runs chosen nodes, whose
keys and values go to slots behind those of the prompt.
"""

import heapq

import jax
import jax.numpy as jnp
import numpy as np

from behaviorlm_jax.model import attention
from behaviorlm_jax.score import label_tree


class Index:
  """Tables of a tree that all its searches share.

  Attributes:
    tree: labels.Tree.
    edges: of each node, its edges to its children.
    names: {edge: name} of the edges that end a name.
    below: of each node, the names that begin with it.
    paths: of each name, the nodes that predict its tokens but for the root.
    most: F, children of the node that has most of them, but for the root.
    root_tokens: int32 [R], tokens of the root's edges.
  """

  def __init__(self, tree):
    self.tree = tree
    count = len(tree.tokens) + 1
    self.edges = [[] for _ in range(count)]
    for edge, node in enumerate(tree.edge_nodes.tolist()):
      self.edges[node].append(edge)
    self.names, self.paths = {}, []
    self.below = [[] for _ in range(count)]
    for name, path in enumerate(tree.paths.tolist()):
      path = [edge for edge in path if edge < len(tree.edge_tokens)]
      self.names[path[-1]] = name
      self.paths.append([int(tree.edge_children[edge]) for edge in path[:-1]])
      for node in self.paths[-1]:
        self.below[node].append(name)
    self.most = max(map(len, self.edges[1:]), default=0)
    self.root_tokens = tree.edge_tokens[self.edges[0]]


class Guesses:
  """What to expect of an edge before its node runs: its mean log p so far.

  Guesses choose what runs, never what comes out of it.
  """

  def __init__(self, index):
    self.mean = np.array(
      [-np.log(len(index.edges[node])) for node in index.tree.edge_nodes]
    )
    self._count = np.ones(len(self.mean))

  def learn(self, edges, log_probs):
    """Adds one observation of log p, float [n], of each of some edges."""
    self._count[edges] += 1
    self.mean[edges] += (log_probs - self.mean[edges]) / self._count[edges]


class Search:
  """What is known of one prompt's tree, and what to run next.

  Attributes:
    slots: {node: slot} of all nodes chosen so far.
    scores: {name: s(y)} of the names scored.
    open: {node: log p of its prefix} of what can run next.
  """

  def __init__(self, index, guesses, root, tolerance, top, wanted=None):
    """Starts with the root's edges.

    Args:
      index: Index of the tree.
      guesses: Guesses, shared by searches under one model.
      root: log p float [R] of index.root_tokens.
      tolerance: nats that log p of a scored name over the list may move by.
      top: number of best names that must be certain.
      wanted: id of a name that must be scored, or None.
    """
    self.index, self.guesses = index, guesses
    self.tolerance, self.top = tolerance, min(top, len(index.paths))
    self.slots, self.scores, self.open = {}, {}, {}
    self._wanted = set() if wanted is None else set(index.paths[wanted])
    self._learn(0, 0.0, root)

  def certified(self):
    """Whether nothing that has not run can change the answer."""
    if not self.open:
      return True
    if len(self.scores) < self.top or self._wanted & self.open.keys():
      return False
    bounds = np.array(list(self.open.values()))
    scores = np.sort(list(self.scores.values()))
    if bounds.max() >= scores[-self.top]:
      return False
    gap = np.logaddexp.reduce(bounds) - np.logaddexp.reduce(scores)
    return np.logaddexp(0.0, gap) <= self.tolerance

  def choose(self, most):
    """At most this many nodes to run together, each after its parent.

    The most probable open ones and, where the guess puts them before other open
    ones, nodes below them.
    """
    item = lambda node, bound: (node not in self._wanted, -bound, node)
    heap = [item(node, bound) for node, bound in self.open.items()]
    heapq.heapify(heap)
    chosen, children = [], self.index.tree.edge_children
    while heap and len(chosen) < most:
      _, cost, node = heapq.heappop(heap)
      chosen.append(node)
      for edge in self.index.edges[node]:
        if child := int(children[edge]):
          heapq.heappush(heap, item(child, self.guesses.mean[edge] - cost))
    return chosen

  def learn(self, chosen, log_probs):
    """Takes log_probs float [n, F]: of chosen[i], of its index.edges first."""
    for node, children in zip(chosen, log_probs, strict=True):
      edges = self.index.edges[node]
      self.guesses.learn(edges, children[: len(edges)])
      self._learn(node, self.open.pop(node), children)

  def _learn(self, node, bound, log_probs):
    children = self.index.tree.edge_children
    for edge, log_p in zip(self.index.edges[node], log_probs, strict=False):
      if children[edge]:
        self.open[int(children[edge])] = bound + float(log_p)
      else:
        self.scores[self.index.names[edge]] = bound + float(log_p)

  def place(self, chosen, begin, seen, children):
    """Gives the chosen nodes the slots from `begin` on.

    Args:
      chosen: as `choose` returned them.
      begin: a slot.
      seen: bool [M, C], to be set: slots that the i-th node sees, its own and
        those of its ancestors.
      children: int32 [M, F], to be set: tokens of its edges.
    """
    for i, node in enumerate(chosen):
      self.slots[node] = begin + i
      edges = self.index.edges[node]
      children[i, : len(edges)] = self.index.tree.edge_tokens[edges]
      while node:
        seen[i, self.slots[node]] = True
        node = int(self.index.tree.parents[node])

  def result(self):
    """float32 [Y]: s(y); names below an open prefix share its mass evenly."""
    result = np.zeros(len(self.index.paths), np.float32)
    result[list(self.scores)] = list(self.scores.values())
    for node, bound in self.open.items():
      names = self.index.below[node]
      result[names] = bound - np.log(len(names))
    return result


def expand(model, tree, cache, lengths, nodes, seen, children, begin):
  """Runs nodes behind their prompts.

  Args:
    model: decoder.Decoder.
    tree: labels.Tree.
    cache: keys and values [layers, B, P + C, K, head_dim], of P tokens of the
      prompts and C slots.
    lengths: int32 [B], of the prompts.
    nodes: int32 [B, M], to run; 0 is none.
    seen: bool [B, M, C], slots that each sees.
    children: int32 [B, M, F], tokens that may follow each; -1: none.
    begin: int32, slot of nodes[:, 0]; at most C - M.

  Returns:
    log p float32 [B, M, F] of `children`, and the cache with the nodes in it.
  """
  batch, count = nodes.shape
  slots = seen.shape[-1]
  width = cache[0].shape[2] - slots
  prompt = jnp.broadcast_to(
    (jnp.arange(width) < lengths[:, None])[:, None], (batch, count, width)
  )
  earlier = seen & (jnp.arange(slots) < begin)
  now = jax.lax.dynamic_slice_in_dim(seen, begin, count, axis=2)
  mask = jnp.concatenate([prompt, earlier, now], axis=-1)[:, None]

  def attend(q, k, v, cache_k, cache_v):
    keys = jnp.concatenate([cache_k, k], axis=1)
    values = jnp.concatenate([cache_v, v], axis=1)
    return attention.grouped(attention.scaled(q), keys, values, mask)

  tokens = jnp.asarray(np.append(0, tree.tokens))[nodes]
  depths = jnp.asarray(np.append(1, tree.depths))[nodes]
  positions = lengths[:, None] + depths - 1
  hidden, new = model(tokens, positions, attend, memory=cache, keep_cache=True)
  cache = tuple(
    jax.lax.dynamic_update_slice_in_dim(old, more, width + begin, axis=2)
    for old, more in zip(cache, new, strict=True)
  )
  found = jax.lax.map(lambda x: label_tree.log_probs(model, *x), (hidden, children))
  return found, cache
