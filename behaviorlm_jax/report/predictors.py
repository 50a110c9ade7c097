"""Every predictor of a run in one form, whether it is trained or counts.

Its scores stand in an evaluation. What it said of each event stands in a table,
in columns of one prefix, and is missing where an older version wrote it or where
nothing was fitted on validation samples.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from behaviorlm_jax.report import compare
from behaviorlm_jax.report.run_files import RunFiles

COUNTING = 'markov'  # The baseline that stands for counting.
_WORDS = {
  'untuned': 'the untuned model',
  'A-Tuning': 'the model after stage 1',
  'B-Tuning': 'the model after stage 2',
  'one stage': 'the model tuned in one stage',
}


@dataclasses.dataclass(frozen=True)
class PredictorFiles:
  """Scores and choices of one predictor."""

  name: str  # in a table
  words: str  # in a sentence
  evaluation: dict
  arms: dict[str, compare.Arm]  # by operating point; empty: unknown
  trained: bool = True


def list_predictors(run: RunFiles) -> list[PredictorFiles]:
  """Count baselines, SASRec, then the stages, each before its mix with counts."""
  found = []
  for name, scores in run.baselines.items():
    arms = _arms(run, run.baseline_table, f'{name}_')
    found.append(PredictorFiles(name, name, scores, arms, trained=False))
  for stage in [run.sasrec] * bool(run.sasrec) + run.scored:
    words, scores = _WORDS.get(stage.name, stage.name), stage.evaluation
    table = stage.predictions
    found.append(PredictorFiles(stage.name, words, scores, _arms(run, table, '')))
    if mixed := scores.get('fitted', {}).get('mixed'):
      name, words = f'{stage.name}, with counts', f'{words} mixed with counts'
      found.append(PredictorFiles(name, words, mixed, _arms(run, table, 'mixed_')))
  return found


def _arms(run: RunFiles, table: pa.Table | None, prefix: str) -> dict[str, compare.Arm]:
  """Of the points that the first screen compares, for the final stage's events."""
  columns = {point: f'{prefix}point_{point}' for point in ('accuracy', 'macro_f1')}
  log_p = f'{prefix}log_prob'
  if not table or not {log_p, *columns.values()} <= set(table.column_names):
    return {}
  final = run.predicting[-1] if run.predicting else None
  if not final or table['sample'].to_pylist() != final.column('sample').tolist():
    return {}
  chosen = lambda column: run.encode(table[column].to_pylist())
  log_p = np.array(table[log_p].to_pylist())
  arms = {point: compare.arm(run, final, chosen(c)) for point, c in columns.items()}
  return {p: dataclasses.replace(arm, log_p=log_p) for p, arm in arms.items()}


def main_ones(predictors: Sequence[PredictorFiles]) -> list[PredictorFiles]:
  """Those to look at first: what is trained, counting, and its best rival."""
  known = [one for one in predictors if one.arms]
  # What is adjusted for frequency comes back as markov once it is calibrated.
  others = [o for o in known if not (o.trained or o.name.startswith(COUNTING))]
  best = max(others, key=mean_log_p, default=None)
  return [o for o in known if o.trained or o.name == COUNTING or o is best]


def mean_log_p(one: PredictorFiles) -> float:
  return one.arms['accuracy'].value('log p')
