"""Difficulty: how hard each candidate sample is for the model so far.

Under the model that stage b starts from, with s(y) the scores of the closed
list after a prompt x and log p(y | x) their log-softmax:

  nll      -log p(y | x) of the true behavior y, in nats
  error    1 - p(y | x)
  margin   max over y' != y of s(y') - s(y), in nats; negative where y leads

The table is an artifact: it carries the fingerprint of the events, the models
and the candidates that made it, a finished one is reused, and one of another
origin is refused.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import files
from behaviorlm_jax.score import label_tree


def compute(name: str, scores: np.ndarray, true: np.ndarray) -> np.ndarray:
  """The difficulty float64 [n] of the module's `name`, of s(y) [n, Y] and ids [n]."""
  match name:
    case 'nll':
      return nll(scores, true)
    case 'error':
      # 1 - p, with the digits of a p near 1, too.
      return -np.expm1(-nll(scores, true))
    case 'margin':
      return _margin(scores, true)
  raise AssertionError(name)


def nll(scores: np.ndarray, true: np.ndarray) -> np.ndarray:
  """-log p(true | prompt) [n] over the list, of s [n, Y]; in nats."""
  return -label_tree.log_softmax(scores)[np.arange(len(true)), true]


def _margin(scores, true):
  rows = np.arange(len(true))
  rivals = np.array(scores, np.float64)  # A copy: the caller's stay as they are.
  rivals[rows, true] = -np.inf
  best = rivals.max(axis=1)
  # A list of one behavior has no rival, and no sample is hard.
  return np.where(np.isfinite(best), best - np.asarray(scores)[rows, true], 0.0)


def write_difficulty(
  path: Path,
  events: events_lib.Events,
  positions: np.ndarray,
  difficulty: np.ndarray,
  made_from: str,
) -> None:
  # Name and group are for readers and the report; `read_difficulty` needs neither.
  behaviors = [events.behaviors[b] for b in events.behavior[positions]]
  table = pa.table(
    {
      'sample': pa.array(positions, pa.int64()),
      'behavior': [b.name for b in behaviors],
      'group': [b.group for b in behaviors],
      # The model's scores are float32: further digits would say nothing.
      'score': pa.array(difficulty, pa.float32()),
    }
  )
  # Inside the file, so that table and origin cannot come apart.
  files.write_parquet(path, table, {'made_from': made_from})


def read_difficulty(path: Path, made_from: str) -> dict[int, float]:
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
      'another --workdir.'
    )
  return dict(zip(table['sample'].to_pylist(), table['score'].to_pylist(), strict=True))
