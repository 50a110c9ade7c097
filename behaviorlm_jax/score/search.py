"""Best-first search of a long list's label tree: run only nodes that matter.

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


class Index:
  """Tables of a tree that all its searches share."""

  def __init__(self, tree):
    self.tree = tree
    count = len(tree.tokens) + 1
    self.edges = [[] for _ in range(count)]  # Of each node, to its children.
    for edge, node in enumerate(tree.edge_nodes.tolist()):
      self.edges[node].append(edge)
    self.parents = np.zeros(count, np.int32)
    self.parents[tree.edge_children] = tree.edge_nodes
    self.names = {}  # Of the edges that end a name.
    self.below = [[] for _ in range(count)]  # Names that begin with a node.
    self.paths = []  # Nodes of each name.
    for name, path in enumerate(tree.paths.tolist()):
      path = [edge for edge in path if edge < len(tree.edge_tokens)]
      self.names[path[-1]] = name
      self.paths.append([int(tree.edge_children[edge]) for edge in path[:-1]])
      for node in self.paths[-1]:
        self.below[node].append(name)
    most = max(map(len, self.edges[1:]), default=0)
    self.child_tokens = np.zeros((count, most), np.int32)
    for node, edges in enumerate(self.edges[1:], start=1):
      self.child_tokens[node, :len(edges)] = tree.edge_tokens[edges]
    self.root_tokens = tree.edge_tokens[self.edges[0]]


class Guesses:
  """What to expect of an edge before its node runs: its mean log p so far.

  Guesses choose what runs, never what comes out of it.
  """

  def __init__(self, index):
    self.mean = np.array([-np.log(len(index.edges[node]))
                          for node in index.tree.edge_nodes])
    self._count = np.ones(len(self.mean))

  def learn(self, edges, log_probs):
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
      root: log p of index.root_tokens.
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
    if not self.open:
      return True
    if len(self.scores) < self.top or self._wanted & self.open.keys():
      return False
    bounds = np.array(list(self.open.values()))
    scores = np.sort(list(self.scores.values()))
    if bounds.max() > scores[-self.top]:
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
    """log_probs[i]: log p of chosen[i]'s children, as index.edges has them."""
    for node, children in zip(chosen, log_probs, strict=True):
      edges = self.index.edges[node]
      self.guesses.learn(edges, children[:len(edges)])
      self._learn(node, self.open.pop(node), children)

  def _learn(self, node, bound, log_probs):
    children = self.index.tree.edge_children
    for edge, log_p in zip(self.index.edges[node], log_probs, strict=False):
      if children[edge]:
        self.open[int(children[edge])] = bound + float(log_p)
      else:
        self.scores[self.index.names[edge]] = bound + float(log_p)

  def place(self, chosen, begin, seen):
    """Gives the chosen nodes the slots from `begin` on; what each then sees.

    Args:
      chosen: as `choose` returned them.
      begin: a slot.
      seen: bool [M, C], to be set: of the i-th node, its own slot and those of
        its ancestors.
    """
    for i, node in enumerate(chosen):
      self.slots[node] = begin + i
      while node:
        seen[i, self.slots[node]] = True
        node = int(self.index.parents[node])

  def result(self):
    """float32 [Y]: s(y); names below an open prefix share its mass evenly."""
    result = np.zeros(len(self.index.paths), np.float32)
    result[list(self.scores)] = list(self.scores.values())
    for node, bound in self.open.items():
      names = self.index.below[node]
      result[names] = bound - np.log(len(names))
    return result


def expand(model, index, cache, lengths, nodes, seen, begin):
  """Runs nodes behind their prompts.

  Args:
    model: decoder.Decoder.
    index: Index.
    cache: keys and values [layers, B, P + C, K, C'] of prompts and slots.
    lengths: int32 [B], of the prompts.
    nodes: int32 [B, M], to run; 0 is none.
    seen: bool [B, M, C], slots that each sees.
    begin: int32, slot of nodes[:, 0]; a multiple of M.

  Returns:
    log p float32 [B, M, F] of index.child_tokens of each node, and the cache
    with the nodes in it.
  """
  tree, (batch, count) = index.tree, nodes.shape
  slots = seen.shape[-1]
  width = cache[0].shape[2] - slots
  prompt = jnp.broadcast_to((jnp.arange(width) < lengths[:, None])[:, None],
                            (batch, count, width))
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
      for old, more in zip(cache, new, strict=True))
  children = jnp.asarray(index.child_tokens)[nodes]
  return jax.lax.map(lambda x: log_probs(model, *x), (hidden, children)), cache


def log_probs(model, hidden, tokens):
  """log p float32 [..., F] of tokens [..., F] after hidden states [..., D]."""
  logits = model.logits(hidden)
  totals = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  return jnp.take_along_axis(logits, tokens, axis=-1) - totals
