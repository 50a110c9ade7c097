"""What a model says of samples, in memory and as a table."""

import dataclasses

import numpy as np
import pyarrow as pa

from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.score import label_tree


@dataclasses.dataclass(frozen=True)
class Scored:
  """Scores of every candidate behavior at n events.

  Attributes:
    samples: int64 [n], positions of the events, each once.
    starts: int64 [n], the first event that each question shows.
    scores: float [n, Y], s(y) in nats.
  """

  samples: np.ndarray
  starts: np.ndarray
  scores: np.ndarray

  def of(self, samples: np.ndarray) -> 'Scored':
    """Those of some of the samples, in that order."""
    order = np.argsort(self.samples)
    rows = order[np.searchsorted(self.samples, samples, sorter=order)]
    return Scored(samples, self.starts[rows], self.scores[rows])

  def table(self, events: events_lib.Events) -> pa.Table:
    """Columns split, sample, start and log_p float32 [Y], normalised."""
    log_p = label_tree.log_softmax(self.scores).astype(np.float32)
    split = np.array(events_lib.SPLITS)[events.split[self.samples]]
    return pa.table(
      {
        'split': split,
        'sample': self.samples,
        'start': self.starts,
        'log_p': pa.FixedSizeListArray.from_arrays(log_p.ravel(), log_p.shape[1]),
      }
    )


def read_scored(table: pa.Table) -> Scored:
  """The Scored of a `table`; its scores are log p."""
  log_p = table['log_p'].combine_chunks()
  return Scored(
    table['sample'].to_numpy(),
    table['start'].to_numpy(),
    log_p.flatten().to_numpy().reshape(len(log_p), -1),
  )
