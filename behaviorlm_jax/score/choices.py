"""What runs chose, kept beside their rows, for runs of other days and machines.

A difference of two predictors is a paired one and needs what both chose for
each test event, but the folder of a run stays where it ran. So some kilobytes
of it go along with the rows: FOLDER/LOG/seedS/METHOD.parquet. They hold
positions of test events, ids of what was predicted and log p of what happened,
nothing else of a log. What happened, and to whom, is read from a run at hand
of the same log and seed, whose test events are the same.
"""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
from absl import logging
from pyarrow import parquet

from behaviorlm_jax import files

FOLDER = 'choices'  # In the folder of the rows.


def write(folder, job, found):
  """Keeps the choices of a run's own predictors (results.Finished)."""
  columns = {'sample': pa.array(found.samples, pa.int32())}
  for name in sorted(found.own):
    arm = found.arms[name]
    columns[name] = pa.array(arm.predicted, pa.int16())
    if arm.log_p is not None:
      columns[f'{name} log p'] = pa.array(arm.log_p, pa.float32())
    if name in found.choices:
      columns[f'{name} by tau'] = pa.array(
          found.choices[name].T.tolist(), pa.list_(pa.int16()))
  path = _path(folder, job)
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_parquet(path, pa.table(columns), {'settings': job.settings})


def read(folder, job, at_hand):
  """({name: compare.Arm}, {name: choices int64 [T, n]}) of a run elsewhere.

  Both are empty where nothing was kept of a run of these settings.

  Args:
    folder: of the rows.
    job: of the run.
    at_hand: results.Finished of a run of the same log and seed.
  """
  path, arms, chosen = _path(folder, job), {}, {}
  if not path.is_file():
    return arms, chosen
  table = parquet.read_table(path)
  if table.schema.metadata[b'settings'].decode() != job.settings:
    return arms, chosen
  table = table.to_pydict()
  if not np.array_equal(table.pop('sample'), at_hand.samples):
    logging.warning('%s holds choices for other test events than this log '
                    'has: it is left out.', path)
    return arms, chosen
  like = at_hand.arms['markov']
  for name in table:
    if not name.endswith((' log p', ' by tau')):
      log_p = table.get(f'{name} log p')
      arms[name] = dataclasses.replace(
          like, predicted=np.array(table[name], np.int64),
          log_p=log_p if log_p is None else np.array(log_p))
      if f'{name} by tau' in table:
        chosen[name] = np.array(table[f'{name} by tau'], np.int64).T
  return arms, chosen


def _path(folder, job):
  return pathlib.Path(
      folder, FOLDER, job.log, f'seed{job.seed}', f'{job.name}.parquet')
