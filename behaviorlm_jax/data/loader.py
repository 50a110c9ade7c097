"""The Grain pipeline: a plan in, batches out, and the step is its only state.

    MapDataset.source(plan).map(assemble).batch(rows) -> prefetching iterator

A host reads only its own rows of each global batch. A batch is a dict of numpy
arrays, B rows, L = train.length, A = the plan's answer capacity:

  tokens, segments, positions: int32 [B, L]; segment 0 is padding
  answer_positions: int32 [B, A], where the hidden state that predicts stands
  answer_tokens: int32 [B, A]; answer_weights: float32 [B, A], 0 is padding
  answer_nodes: int32 [B, A], node of the tree of names that the token follows;
    -1 of conversations, and of all where there is no tree
  samples: int32 [B], targets of the row
"""

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np

from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data.conversations import Conversation
from behaviorlm_jax.data.prompts import Prompts

Row = list[plan_lib.Segment]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Assembler:
  """Turns a plan's row into arrays."""

  prompts: Prompts
  conversations: Sequence[Conversation]
  length: int  # Tokens of a row.
  answers: int  # Answer tokens of a row, at most.
  tree: plan_lib.NameTree | None = None  # What is taught of names; None: all of it.

  def __call__(self, row: Row) -> Arrays:
    arrays = {
      'tokens': np.zeros(self.length, np.int32),
      'segments': np.zeros(self.length, np.int32),
      'positions': np.zeros(self.length, np.int32),
      'answer_positions': np.zeros(self.answers, np.int32),
      'answer_tokens': np.zeros(self.answers, np.int32),
      'answer_nodes': np.full(self.answers, -1, np.int32),
      'answer_weights': np.zeros(self.answers, np.float32),
      'samples': np.int32(sum(len(segment.targets) for segment in row)),
    }
    begin = filled = 0
    for number, segment in enumerate(row, start=1):  # 0 is padding.
      tokens, where, nodes, weights = self._segment(segment)
      end = begin + len(tokens)
      arrays['tokens'][begin:end] = tokens
      arrays['segments'][begin:end] = number
      arrays['positions'][begin:end] = np.arange(len(tokens))
      answers = slice(filled, filled + len(where))
      # The state before a token predicts it. No segment begins with an answer, so
      # that is never a state of the segment before.
      arrays['answer_positions'][answers] = begin + where - 1
      arrays['answer_tokens'][answers] = tokens[where]
      arrays['answer_nodes'][answers] = nodes
      arrays['answer_weights'][answers] = weights
      begin, filled = end, answers.stop
    return arrays

  def _segment(self, segment: plan_lib.Segment) -> tuple[np.ndarray, ...]:
    """Tokens, the indices of its answer tokens, their nodes and weights."""
    if segment.kind == plan_lib.CONVERSATION:
      conversation = self.conversations[segment.start]
      where = np.flatnonzero(conversation.answers)
      return conversation.tokens, where, np.array(-1), np.array(1.0)
    tokens, spans = self.prompts.window(segment.start, segment.stop)
    where, nodes, weights = [], [], []
    for target, weight in zip(segment.targets, segment.weights, strict=True):
      begin, end = spans[target - segment.start]
      taught, own = np.arange(end - begin), np.full(end - begin, -1)
      if self.tree:
        behavior = self.prompts.events.behavior[target]
        taught = self.tree.choices(behavior)
        own = self.tree.edge_nodes[self.tree.path(behavior)[taught]]
      where.append(begin + taught)
      nodes.append(own)
      weights.append(np.full(len(taught), weight))
    return tokens, *map(np.concatenate, (where, nodes, weights))


def batches(
  plan: plan_lib.Plan,
  assemble: Callable[[Row], Arrays],
  batch: int,
  step: int = 0,
  own: Sequence[int] | None = None,
  threads: int = 1,
) -> grain.DatasetIterator:
  """An iterator over this host's batches, from `step` (0 is the first) on.

  `own`: the rows of a batch that this host reads, in that order; None: all. The
  iterator ends with the plan; its state is the step alone.
  """
  own = range(batch) if own is None else own
  firsts = range(0, len(plan.rows), batch)
  mine = [plan.rows[first + row] for first in firsts for row in own]
  dataset = grain.MapDataset.source(mine).map(assemble).batch(len(own))
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  iterator = iter(dataset.to_iter_dataset(options))
  # Random access, so a run that goes on reads nothing of the steps before.
  grain.experimental.set_next_index(iterator, step)
  return iterator
