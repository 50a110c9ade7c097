"""Scores prompts in batches of similar length, one compilation per width.

A list is scored whole (score.label_tree). Over the vocabulary, of one whose tree is
long, only what matters is run (score.search), and a prompt whose search is not
certified within its slots is scored whole after all.
"""

import jax
import jax.numpy as jnp
import numpy as np

from behaviorlm_jax.score import label_tree as labels_lib
from behaviorlm_jax.score import search

WIDTH = 32  # Prompts are padded to a multiple of this many tokens.
_ROUND = 32  # Nodes of each prompt that run together.
_SLOTS = 12 * _ROUND  # Nodes that a search may run.
_LONG = 640  # Nodes from which on a search beats the whole tree.


class Scorer:
  """s(y) of every behavior after each prompt.

  Attributes:
    searches: whether prompts are searched, and not scored whole.
  """

  def __init__(self, attach, params, labels, score, layout, long=None):
    """Compiles nothing yet.

    Args:
      attach: (params, adapter) -> decoder.
      params: base weights.
      labels: answer tokens of each behavior.
      score: the config's section.
      layout: train.sharding.Layout.
      long: nodes of a tree from which on it is searched; None: where that is
        faster.
    """
    self.layout, self.params = layout, params
    rows = layout.row_parts
    self.batch = -(-score.batch // rows) * rows
    self.tolerance = score.tolerance
    softmax, step = score.softmax, score.names_per_pass
    tree = labels_lib.build(labels)  # Refuses clashes.
    if softmax == 'names':  # Over all names, so they stay together.
      tree = labels_lib.build(labels_lib.shortest(labels))
      step = len(labels)
    trees = (
      [tree]
      if step >= len(labels)
      else [labels_lib.build(labels[i : i + step]) for i in range(0, len(labels), step)]
    )
    self.index = search.Index(tree)
    self.searches = (
      bool(self.tolerance)
      and softmax == 'vocabulary'
      and (len(tree.tokens) >= (_LONG if long is None else long))
    )

    def whole(adapter, params, tokens, lengths):
      model = attach(params, adapter)
      last, cache = model.prefill(tokens, lengths)
      parts = [
        labels_lib.tree_scores(model, tree, last, cache, lengths, softmax)
        for tree in trees
      ]
      return jnp.concatenate(parts, axis=1)

    def start(adapter, params, tokens, lengths):
      model = attach(params, adapter)
      last, cache = model.prefill(tokens, lengths)
      root = jnp.broadcast_to(
        self.index.root_tokens, (len(last), len(self.index.root_tokens))
      )
      room = [(0, 0)] * 2 + [(0, _SLOTS)] + [(0, 0)] * 2
      return labels_lib.log_probs(model, last, root), tuple(
        jnp.pad(x, room) for x in cache
      )

    def expand(adapter, params, cache, *arguments):
      return search.expand(attach(params, adapter), tree, cache, *arguments)

    everywhere = layout.replicated
    self._whole = jax.jit(
      whole, out_shardings=everywhere, compiler_options=layout.compiler_options
    )
    # The cache of a prompt stays with it.
    rows = layout.sharding((None, 'batch', None, None, None), (1, self.batch, 1, 1, 1))
    outputs = (everywhere, (rows, rows))
    self._start = jax.jit(start, out_shardings=outputs)
    self._expand = jax.jit(expand, donate_argnums=2, out_shardings=outputs)

  def __call__(self, adapter, prompts, wanted=None, progress=lambda n: None):
    """Scores all prompts.

    Args:
      adapter: LoRA weights or None for the base model.
      prompts: list of int32 arrays.
      wanted: id of the behavior of each prompt that must be scored, or None.
      progress: called with the number of prompts of each finished batch.

    Returns:
      float32 [n, Y]: s(y), in nats. Where a search was certified, those of
        `wanted` and the best five are exact, and log p over the list follows
        from them to score.tolerance; names that were not scored share the mass
        of the prefix that was left out.
      bool [n]: prompts whose search was not certified, and that were scored
        whole; None where nothing was searched.
    """
    scores = [None] * len(prompts)
    left = list(range(len(prompts)))
    if self.searches:
      guesses = search.Guesses(self.index)

      def searched(chosen):
        return self._search(
          adapter,
          [prompts[i] for i in chosen],
          guesses,
          [None if wanted is None else int(wanted[i]) for i in chosen],
        )

      self._batches(prompts, left, searched, scores, progress)
      left = [i for i in left if scores[i] is None]
    uncertified = np.isin(np.arange(len(prompts)), left)
    self._batches(
      prompts,
      left,
      lambda chosen: self._batch(adapter, [prompts[i] for i in chosen]),
      scores,
      progress,
    )
    return np.stack(scores), uncertified if self.searches else None

  def lower(self, adapter, width):
    """jax.stages.Lowered of one pass over a whole list.

    Args:
      adapter: as of a call, or jax.ShapeDtypeStruct of that.
      width: tokens of the longest prompt.
    """
    width = -(-width // WIDTH) * WIDTH
    tokens = self.layout.abstract_rows((self.batch, width), np.int32)
    lengths = self.layout.abstract_rows((self.batch,), np.int32)
    return self._whole.lower(adapter, self.params, tokens, lengths)

  def _batches(self, prompts, left, score, scores, progress):
    """scores[i] of the prompts `left`, by length, where `score` has one."""
    order = sorted(left, key=lambda i: len(prompts[i]))
    for begin in range(0, len(order), self.batch):
      chosen = order[begin : begin + self.batch]
      found = score(chosen)
      for i, row in zip(chosen, found, strict=False):
        scores[i] = row
      progress(sum(row is not None for row in found[: len(chosen)]))

  def _pad(self, prompts):
    width = -(-len(prompts[-1]) // WIDTH) * WIDTH
    tokens = np.zeros((self.batch, width), np.int32)
    lengths = np.ones(self.batch, np.int32)
    for row, prompt in enumerate(prompts):
      tokens[row, : len(prompt)] = prompt
      lengths[row] = len(prompt)
    placed = self.layout.put_same({'t': tokens, 'n': lengths})
    return placed['t'], placed['n']

  def _batch(self, adapter, prompts):
    """s(y) [batch, Y] by the whole tree."""
    return np.asarray(self._whole(adapter, self.params, *self._pad(prompts)))

  def _search(self, adapter, prompts, guesses, wanted):
    """s(y) of each prompt, or None where the search was not certified."""
    tokens, lengths = self._pad(prompts)
    root, cache = self._start(adapter, self.params, tokens, lengths)
    root = np.asarray(root)
    searches = [
      search.Search(
        self.index, guesses, root[row], self.tolerance, labels_lib.TOP, wanted[row]
      )
      for row in range(len(prompts))
    ]
    for begin in range(0, _SLOTS, _ROUND):
      chosen = [[] if one.certified() else one.choose(_ROUND) for one in searches]
      if not any(chosen):
        break
      nodes = np.zeros((self.batch, _ROUND), np.int32)
      seen = np.zeros((self.batch, _ROUND, _SLOTS), bool)
      children = np.full((self.batch, _ROUND, self.index.most), -1, np.int32)
      for row, (one, some) in enumerate(zip(searches, chosen, strict=True)):
        nodes[row, : len(some)] = some
        one.place(some, begin, seen[row], children[row])
      placed = self.layout.put_same(
        {'nodes': nodes, 'seen': seen, 'children': children}
      )
      found, cache = self._expand(
        adapter,
        self.params,
        cache,
        lengths,
        placed['nodes'],
        placed['seen'],
        placed['children'],
        np.int32(begin),
      )
      found = np.asarray(found)
      for row, (one, some) in enumerate(zip(searches, chosen, strict=True)):
        one.learn(some, found[row, : len(some)])
    return [one.result() if one.certified() else None for one in searches]
