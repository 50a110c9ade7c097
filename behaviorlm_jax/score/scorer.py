"""Scores prompts in batches of similar length, one compilation per width."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from behaviorlm_jax.model import decoder, lora
from behaviorlm_jax.score import label_tree as labels_lib

WIDTH = 32  # Prompts are padded to a multiple of this many tokens.
NAMES_PER_PASS = 256  # Whose label tree is run at once, over the vocabulary.
# (base weights, an adapter or None) -> the decoder that runs them.
Attach = Callable[[Mapping[str, jax.Array], lora.Adapter | None], decoder.Decoder]
Batch = dict[str, np.ndarray]  # tokens int32 [B, L] and lengths int32 [B].


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

  def put_same(self, batch: Batch) -> dict[str, jax.Array]: ...


class Scorer:
  """s(y) of every behavior after each prompt."""

  def __init__(
    self,
    attach: Attach,
    params: Mapping[str, jax.Array],
    labels: Sequence[Sequence[int]],
    score: Mapping[str, Any],
    layout: Places,
    names_per_pass: int = NAMES_PER_PASS,
  ):
    """Compiles nothing yet.

    `labels`: answer tokens of each behavior; `score`: the config's section. Fewer
    `names_per_pass` change no score, and take less memory.
    """
    self.layout, self.params = layout, params
    self.batch = round_up(score['batch'], layout.row_parts)  # Devices share it evenly.
    softmax, step = score['softmax'], names_per_pass
    labels_lib.build(labels)  # Refuses clashes, of names of different passes, too.
    if softmax == 'names':  # Over all names, so they stay together.
      labels, step = labels_lib.shortest(labels), len(labels)
    self.trees = [
      labels_lib.build(labels[i : i + step]) for i in range(0, len(labels), step)
    ]

    # The weights are an argument: what is closed over becomes a constant of the
    # program, and a copy.
    def run(
      adapter: lora.Adapter | None, params: Mapping[str, jax.Array], batch: Batch
    ) -> jax.Array:
      model, lengths = attach(params, adapter), batch['lengths']
      last, cache = model.prefill(batch['tokens'], lengths)  # Once for all trees.
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
    """s(y) float32 [n, Y] of all prompts, in nats; adapter None: the base model.

    `progress`: called with the number of prompts of each finished batch.
    """
    scores = [None] * len(prompts)
    for chosen, batch in padded_batches(prompts, self.batch):
      # The last batch has rows without a prompt, at its end.
      for i, row in zip(chosen, self._batch(adapter, batch), strict=False):
        scores[i] = row
      progress(len(chosen))
    return np.stack(scores)

  def _batch(self, adapter, batch):
    """s(y) [batch, Y]."""
    return np.asarray(self._score(adapter, self.params, self.layout.put_same(batch)))

  def lower(self, adapter: lora.Adapter | None, width: int) -> jax.stages.Lowered:
    """What scores a batch whose longest prompt has `width` tokens, lowered.

    `adapter`: as of a call, or jax.ShapeDtypeStruct of that.
    """
    abstract = self.layout.abstract_rows
    batch = {
      'tokens': abstract((self.batch, round_up(width, WIDTH)), np.int32),
      'lengths': abstract((self.batch,), np.int32),
    }
    return self._score.lower(adapter, self.params, batch)


def padded_batches(
  prompts: Sequence[np.ndarray], size: int
) -> Iterator[tuple[list[int], Batch]]:
  """Yields batches of `size` rows, and the indices of the prompts in each.

  By length: neighbors need little padding, and a width is compiled for once.
  """
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  for begin in range(0, len(order), size):
    chosen = order[begin : begin + size]
    tokens = np.zeros((size, round_up(len(prompts[chosen[-1]]), WIDTH)), np.int32)
    # Rows without a prompt have one token: a state is read at length - 1.
    lengths = np.ones(size, np.int32)
    for row, i in enumerate(chosen):
      lengths[row] = len(prompts[i])
      tokens[row, : lengths[row]] = prompts[i]
    yield chosen, {'tokens': tokens, 'lengths': lengths}


def round_up(count: int, unit: int) -> int:
  """The next multiple of `unit`."""
  return -(-count // unit) * unit
