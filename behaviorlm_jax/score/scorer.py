"""Scores prompts in batches of similar length, one compilation per width."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from behaviorlm_jax.model import decoder, lora
from behaviorlm_jax.score import label_tree as labels_lib

WIDTH = 32  # Prompts are padded to a multiple of this many tokens.
# (base weights, an adapter or None) -> the decoder that runs them.
Attach = Callable[[Mapping[str, jax.Array], lora.Adapter | None], decoder.Decoder]


class Places(Protocol):
  """What is asked of a train.sharding.Layout; train and score do not meet."""

  @property
  def row_parts(self) -> int: ...

  @property
  def replicated(self) -> jax.sharding.Sharding: ...

  @property
  def compiler_options(self) -> dict[str, str] | None: ...

  def abstract_rows(
    self, shape: tuple[int, ...], dtype: np.dtype
  ) -> jax.ShapeDtypeStruct: ...

  def put_same(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]: ...


class Scorer:
  """s(y) of every behavior after each prompt.

  Attributes:
    batch: prompts of a pass.
    trees: label_tree.Tree of each pass over the names.
  """

  def __init__(
    self,
    attach: Attach,
    params: Mapping[str, jax.Array],
    labels: Sequence[Sequence[int]],
    score: ConfigDict,
    layout: Places,
  ):
    """Compiles nothing yet.

    Args:
      attach: (params, adapter) -> decoder.
      params: base weights.
      labels: answer tokens of each behavior.
      score: the config's section.
      layout: train.sharding.Layout.
    """
    self.layout, self.params = layout, params
    rows = layout.row_parts
    self.batch = -(-score.batch // rows) * rows  # Up: devices divide it evenly.
    softmax, step = score.softmax, score.names_per_pass
    labels_lib.build(labels)  # Refuses clashes, of names of different passes, too.
    if softmax == 'names':  # Over all names, so they stay together.
      labels, step = labels_lib.shortest(labels), len(labels)
    self.trees = [
      labels_lib.build(labels[i : i + step]) for i in range(0, len(labels), step)
    ]

    # The weights are an argument: what is closed over becomes a constant of the
    # program, and a copy.
    def run(
      adapter: lora.Adapter | None,
      params: Mapping[str, jax.Array],
      tokens: jax.Array,
      lengths: jax.Array,
    ) -> jax.Array:
      model = attach(params, adapter)
      last, cache = model.prefill(tokens, lengths)  # Once for all trees.
      parts = [
        labels_lib.tree_scores(model, tree, last, cache, lengths, softmax)
        for tree in self.trees
      ]
      return jnp.concatenate(parts, axis=1)

    self._score = jax.jit(
      run, out_shardings=layout.replicated, compiler_options=layout.compiler_options
    )

  def __call__(
    self,
    adapter: lora.Adapter | None,
    prompts: Sequence[np.ndarray],
    progress: Callable[[int], None] = lambda n: None,
  ) -> np.ndarray:
    """Scores all prompts.

    Args:
      adapter: LoRA weights or None for the base model.
      prompts: list of int32 arrays.
      progress: called with the number of prompts of each finished batch.

    Returns:
      float32 [n, Y]: s(y), in nats.
    """
    scores = [None] * len(prompts)
    # By length: neighbors need little padding, and a width is compiled for once.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for begin in range(0, len(order), self.batch):
      chosen = order[begin : begin + self.batch]
      found = self._batch(adapter, [prompts[i] for i in chosen])
      # The last batch has rows without a prompt, at its end.
      for i, row in zip(chosen, found, strict=False):
        scores[i] = row
      progress(len(chosen))
    return np.stack(scores)

  def lower(self, adapter: lora.Adapter | None, width: int) -> jax.stages.Lowered:
    """jax.stages.Lowered of what scores one batch.

    Args:
      adapter: as of a call, or jax.ShapeDtypeStruct of that.
      width: tokens of the longest prompt.
    """
    width = -(-width // WIDTH) * WIDTH
    tokens = self.layout.abstract_rows((self.batch, width), np.int32)
    lengths = self.layout.abstract_rows((self.batch,), np.int32)
    return self._score.lower(adapter, self.params, tokens, lengths)

  def _pad(self, prompts: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 [B, L] and lengths int32 [B]; the last is the longest."""
    width = -(-len(prompts[-1]) // WIDTH) * WIDTH
    tokens = np.zeros((self.batch, width), np.int32)
    # Rows without a prompt have one token: a state is read at length - 1.
    lengths = np.ones(self.batch, np.int32)
    for row, prompt in enumerate(prompts):
      tokens[row, : len(prompt)] = prompt
      lengths[row] = len(prompt)
    placed = self.layout.put_same({'t': tokens, 'n': lengths})
    return placed['t'], placed['n']

  def _batch(
    self, adapter: lora.Adapter | None, prompts: Sequence[np.ndarray]
  ) -> np.ndarray:
    """s(y) [batch, Y]."""
    return np.asarray(self._score(adapter, self.params, *self._pad(prompts)))
