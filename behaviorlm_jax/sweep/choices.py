"""What runs chose, kept beside their rows, for runs of other days and machines.

A difference of two predictors is a paired one and needs what both chose for
each test event, but the folder of a run stays where it ran. So some kilobytes
of it go along with the rows: FOLDER/LOG/seedS/METHOD.parquet, a row per
predictor, with ids of behaviors and log p. What happened, and to whom, is not
in it: that is read from a run at hand of the same log and seed, and `digest`
says whether its test events are the same.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import files
from behaviorlm_jax.report import compare

if TYPE_CHECKING:  # These import this module.
  from behaviorlm_jax.sweep import jobs, results

FOLDER = 'choices'  # In the folder of the rows.
Choices = tuple[dict[str, compare.Arm], dict[str, np.ndarray]]  # See `read_choices`.
_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
  [
    ('predictor', pa.string()),
    ('predicted', _IDS),
    ('log_p', pa.list_(pa.float32())),
    ('by_tau', pa.list_(_IDS)),
  ]
)


def digest(
  names: Sequence[str], anchor: np.ndarray, samples: np.ndarray, true: np.ndarray
) -> str:
  """Of what test events are: hex digits.

  Args:
    names: of the behaviors, by id.
    anchor: bool [Y].
    samples: positions int64 [n].
    true: ids int64 [n].
  """
  # No name holds a line end (data.log.names), so the joined text is unambiguous.
  found = hashlib.sha256('\n'.join(names).encode())
  for array in (anchor, samples, true):
    found.update(np.ascontiguousarray(array).tobytes())
  return found.hexdigest()


def write_choices(folder: Path, job: 'jobs.Job', found: 'results.Finished') -> None:
  """Keeps the choices of a run's own predictors (results.Finished)."""
  rows = [
    {
      'predictor': name,
      'predicted': found.arms[name].predicted.tolist(),
      'log_p': _list(found.arms[name].log_p),
      'by_tau': _list(found.by_tau.get(name)),
    }
    for name in sorted(found.own)  # A set: the same file every time.
  ]
  path = _path(folder, job)
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_parquet(
    path,
    pa.Table.from_pylist(rows, _SCHEMA),
    {'settings': job.settings, 'digest': found.digest},
  )


def read_choices(
  folder: Path, job: 'jobs.Job', at_hand: Mapping[str, compare.Arm]
) -> Choices:
  """({name: compare.Arm}, {name: ids int64 [T, n]}) of a run elsewhere.

  The second has first choices at each tau. Both are empty where nothing was
  kept of a run of these settings, or no run at hand has its test events.

  Args:
    folder: of the rows.
    job: of the run.
    at_hand: {digest: compare.Arm}, one of each finished run, whichever.

  Raises:
    InputError: the file is damaged.
  """
  path = _path(folder, job)
  if not path.is_file():
    return {}, {}
  try:
    table = parquet.read_table(path)
  except pa.ArrowException as error:
    raise InputError(
      f'{path} cannot be read ({error}); delete it, or copy it '
      'again from where it was written.'
    ) from error
  facts = table.schema.metadata or {}
  like = at_hand.get(facts.get(b'digest', b'').decode())
  if like is None or facts.get(b'settings', b'').decode() != job.settings:
    return {}, {}
  rows = {row['predictor']: row for row in table.to_pylist()}
  arms = {
    name: dataclasses.replace(  # Of `like` what is the same for all predictors.
      like,
      predicted=np.array(row['predicted'], np.int64),
      # None stays None: there is no log p of what is adjusted.
      log_p=row['log_p'] and np.array(row['log_p']),
    )
    for name, row in rows.items()
  }
  return arms, {
    name: np.array(row['by_tau'], np.int64)
    for name, row in rows.items()
    if row['by_tau']
  }


def _list(array: np.ndarray | None) -> list | None:
  return None if array is None else array.tolist()


def _path(folder: Path, job: 'jobs.Job') -> Path:
  return Path(folder, FOLDER, job.log, f'seed{job.seed}', f'{job.name}.parquet')
