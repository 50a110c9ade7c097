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

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import files
from behaviorlm_jax.report import compare
from behaviorlm_jax.sweep.job import Job

FOLDER = 'choices'  # In the folder of the rows.
Score = tuple[str, str, float, int]  # group, metric, value, n
_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
  [
    ('predictor', pa.string()),
    ('predicted', _IDS),
    ('log_p', pa.list_(pa.float32())),
    ('by_tau', pa.list_(_IDS)),
  ]
)


@dataclasses.dataclass
class Predictor:
  """What one predictor chose for the test events of a run, and its scores."""

  arm: compare.Arm | None = None  # None: it is compared with nothing.
  by_tau: np.ndarray | None = None  # ids int64 [T, n], adjust.first_choices.
  scores: list[Score] = dataclasses.field(default_factory=list)  # Of finished runs.


def matched(control: compare.Arm, own: compare.Arm, by_tau: np.ndarray) -> compare.Arm:
  """`own`, a predictor, as far towards the tail as anchors stay as good.

  Of its first choices at ever larger tau, int64 [T, n] (adjust.first_choices),
  the last ones whose anchor macro-F1 on these very samples is that of `control`
  or better; where none is, those of the best anchors. No predictor to use, but
  what two are to be compared at.
  """
  arms = [dataclasses.replace(own, predicted=best, log_p=None) for best in by_tau]
  anchors = [arm.value('anchor macro-F1') for arm in arms]
  goal = min(control.value('anchor macro-F1'), max(anchors))  # One arm reaches it.
  return [arm for arm, f1 in zip(arms, anchors, strict=True) if f1 >= goal][-1]


def digest(
  names: Sequence[str], anchor: np.ndarray, samples: np.ndarray, true: np.ndarray
) -> str:
  """Of what test events are: hex digits.

  `names`: of behaviors, by id; `anchor`: bool [Y]; `samples`: positions int64
  [n]; `true`: ids int64 [n].
  """
  # No name holds a line end (data.log.names), so the joined text is unambiguous.
  found = hashlib.sha256('\n'.join(names).encode())
  for array in (anchor, samples, true):
    found.update(np.ascontiguousarray(array).tobytes())
  return found.hexdigest()


def write_choices(
  folder: Path, job: Job, own: Mapping[str, Predictor], events: str
) -> None:
  """Keeps the choices of a run's own predictors; `events`: their digest."""
  listed = lambda array: None if array is None else array.tolist()
  rows = [
    {
      'predictor': name,
      'predicted': own[name].arm.predicted.tolist(),
      'log_p': listed(own[name].arm.log_p),
      'by_tau': listed(own[name].by_tau),
    }
    for name in sorted(own)
  ]
  path = _path(folder, job)
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_parquet(
    path,
    pa.Table.from_pylist(rows, _SCHEMA),
    {'settings': job.settings, 'digest': events},
  )


def read_choices(
  folder: Path, job: Job, at_hand: Mapping[str, compare.Arm]
) -> dict[str, Predictor]:
  """The predictors of a run elsewhere, of which `folder` has rows.

  None where nothing was kept of a run of these settings, or no run at hand has
  its test events; `at_hand`: {digest: any of its arms}. A damaged file is an
  InputError.
  """
  path = _path(folder, job)
  if not path.is_file():
    return {}
  try:
    table = parquet.read_table(path)
  except pa.ArrowException as error:
    raise InputError(
      f'{path} cannot be read ({error}); delete it, or copy it again from where it was '
      'written.'
    ) from error
  facts = table.schema.metadata or {}
  like = at_hand.get(facts.get(b'digest', b'').decode())
  if like is None or facts.get(b'settings', b'').decode() != job.settings:
    return {}
  array = lambda values, kind=None: values and np.array(values, kind)  # Or None.
  return {
    row['predictor']: Predictor(
      dataclasses.replace(  # Of `like` what is the same for all predictors.
        like,
        predicted=np.array(row['predicted'], np.int64),
        # There is no log p of what is adjusted.
        log_p=array(row['log_p']),
      ),
      array(row['by_tau'], np.int64),
    )
    for row in table.to_pylist()
  }


def _path(folder: Path, job: Job) -> Path:
  return Path(folder, FOLDER, job.log, f'seed{job.seed}', f'{job.name}.parquet')
