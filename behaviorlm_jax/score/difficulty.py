"""Difficulty: how hard each candidate sample is for the model so far.

`nll` is -log p(true behavior) over the closed list, under the model that
stage b starts from. The table is an artifact: it carries the fingerprint of the
events, the model and the candidates that made it, a finished one is reused, and
one of another origin is refused.
"""

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from behaviorlm_jax import files
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.score import labels


def nll(scores, true):
  """-log p(true | prompt) [n] over the list, of s [n, Y]; in nats."""
  rows = np.arange(len(true))
  return -labels.log_softmax(scores)[rows, true]


def write(path, events, positions, difficulty, made_from):
  """Writes the table: sample, behavior, group, score."""
  behaviors = [events.behaviors[b] for b in events.behavior[positions]]
  table = pa.table({
      'sample': pa.array(positions, pa.int64()),
      'behavior': [b.name for b in behaviors],
      'group': [b.group for b in behaviors],
      'score': pa.array(difficulty, pa.float32()),
  })
  files.write_parquet(path, table, {'made_from': made_from})


def read(path, made_from):
  """{sample: score} of a finished table.

  Raises:
    InputError: other events, another model or config made it.
  """
  table = parquet.read_table(path)
  found = (table.schema.metadata or {}).get(b'made_from', b'none').decode()
  if found != made_from:
    raise InputError(
        f'{path} was made from other events, another model or config '
        f'(fingerprint {found[:12]}, now {made_from[:12]}); delete it or use '
        'another --workdir.')
  return dict(zip(table['sample'].to_pylist(), table['score'].to_pylist(),
                  strict=True))
