"""Scores rows of questions in batches; two programs, each compiled once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from behaviorlm_jax.data.questions import QuestionRow
from behaviorlm_jax.model import decoder, lora
from behaviorlm_jax.score import label_tree, tree_scores

NAMES_PER_PASS = 256  # Whose label tree is run at once, over the vocabulary.
_NODES = 128  # Inner nodes that are asked of a row at once, about.
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
  """s(y) of every behavior at each question of packed rows."""

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
    self.attach, self.params, self.layout = attach, params, layout
    self.batch = round_up(score['batch'], layout.row_parts)  # Devices share it evenly.
    softmax, step = score['softmax'], names_per_pass
    label_tree.build(labels)  # Refuses clashes, of names of different passes, too.
    if softmax == 'names':  # Over all names, so they stay together.
      labels, step = label_tree.shortest(labels), len(labels)
    self.trees = [
      label_tree.build(labels[i : i + step]) for i in range(0, len(labels), step)
    ]
    # Where trees are long, fewer questions: memory stays bounded.
    nodes = max(len(tree.tokens) for tree in self.trees)
    self.asked = max(1, _NODES // max(nodes, 1))

    # The weights are an argument: what is closed over becomes a constant of the
    # program, and a copy.
    def read(
      adapter: lora.Adapter | None,
      params: Mapping[str, jax.Array],
      rows: dict[str, jax.Array],
    ) -> tree_scores.ReadRows:
      return tree_scores.read_rows(attach(params, adapter), **rows)

    def ask(
      adapter: lora.Adapter | None,
      params: Mapping[str, jax.Array],
      rows: tree_scores.ReadRows,
      roots: jax.Array,
    ) -> jax.Array:
      model = attach(params, adapter)
      parts = [
        tree_scores.question_scores(model, tree, rows, roots, softmax)
        for tree in self.trees
      ]
      return jnp.concatenate(parts, axis=-1)

    options = layout.compiler_options
    self._read = jax.jit(read, compiler_options=options)
    self._ask = jax.jit(ask, out_shardings=layout.replicated, compiler_options=options)

  def __call__(
    self,
    adapter: lora.Adapter | None,
    rows: Sequence[QuestionRow],
    progress: Callable[[int], None] = lambda n: None,
  ) -> list[np.ndarray]:
    """s(y) float32 [n, Y] of each row's questions, in nats.

    Args:
      adapter: None: the base model.
      rows: of one length.
      progress: called with the number of questions of each finished batch.
    """
    scores = [np.zeros(0)] * len(rows)
    # Rows of as many questions come together: none waits for the others.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].roots))
    for begin in range(0, len(order), self.batch):
      chosen = order[begin : begin + self.batch]
      found = self._batch(adapter, [rows[i] for i in chosen])
      for i, row in zip(chosen, found, strict=True):
        scores[i] = row
      progress(sum(map(len, found)))
    return scores

  def _batch(self, adapter, rows):
    """s(y) of each row's questions; empty rows fill up the batch."""

    def fill(name: str, width: int) -> np.ndarray:
      filled = np.zeros((self.batch, width), np.int32)
      for i, row in enumerate(rows):
        values = getattr(row, name)
        filled[i, : len(values)] = values
      return filled

    length = len(rows[0].tokens)
    placed = {name: fill(name, length) for name in ('tokens', 'positions', 'segments')}
    passes = -(-max(len(row.roots) for row in rows) // self.asked)
    roots = fill('roots', passes * self.asked)
    read = self._read(adapter, self.params, self.layout.put_same(placed))
    # All are on their way before the first is waited for.
    found = [
      self._ask(adapter, self.params, read, self.layout.put_same({'': part})[''])
      for part in np.split(roots, passes, axis=1)
    ]
    scores = np.concatenate(list(map(np.asarray, found)), axis=1)
    return [scores[i, : len(row.roots)] for i, row in enumerate(rows)]

  def lower(
    self, adapter: lora.Adapter | None, length: int
  ) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """What reads a batch of rows of `length` tokens, and what asks them, lowered.

    `adapter`: as of a call, or jax.ShapeDtypeStruct of that.
    """
    abstract = lambda width: self.layout.abstract_rows((self.batch, width), np.int32)
    rows = dict.fromkeys(('tokens', 'positions', 'segments'), abstract(length))
    read = self._read.lower(adapter, self.params, rows)
    # Where the compiler leaves what was read decides how it is asked.
    state = jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      jax.eval_shape(self._read, adapter, self.params, rows),
      read.compile().output_shardings,
    )
    return read, self._ask.lower(adapter, self.params, state, abstract(self.asked))


def round_up(count: int, unit: int) -> int:
  """The next multiple of `unit`."""
  return -(-count // unit) * unit
