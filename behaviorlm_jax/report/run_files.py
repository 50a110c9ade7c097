"""What a work directory holds, in the form in which the report needs it.

Every stage and every file may be missing; what is read of it then is empty or
None.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behaviorlm_jax.data.events import Events, open_events
from behaviorlm_jax.evaluate import adjust, metrics
from behaviorlm_jax.evaluate.baselines import Counts
from behaviorlm_jax.evaluate.scored import read_scored

STAGES = {'base': 'untuned', 'a_tuning': 'A-Tuning', 'b_tuning': 'B-Tuning'}


@dataclasses.dataclass(frozen=True)
class StageFiles:
  """The files of one stage; None or empty where a file is missing."""

  key: str
  folder: Path
  config: dict
  evaluation: dict | None
  predictions: pa.Table | None

  @property
  def name(self) -> str:
    names = STAGES | {'sasrec': 'SASRec'}
    return 'one stage' if self.one_stage else names[self.key]

  @property
  def one_stage(self) -> bool:
    """Whether stage 'one' made it, which stands in the place of stage b."""
    return self.config.get('stage') == 'one'

  @functools.cached_property
  def steps(self) -> list[dict]:
    """The rows of metrics.jsonl, one per training step."""
    return read_json_lines(self.folder / 'metrics.jsonl')

  @functools.cached_property
  def right(self) -> np.ndarray:
    """bool[n], whether the first choice is the true behavior."""
    return self.column('behavior') == self.column('predicted')

  @functools.cached_property
  def retention(self) -> dict:
    """What the model still knows, see evaluate.retention; may be empty."""
    return read_json(self.folder / 'retention.json', {})

  def log_p(self, split: str) -> np.ndarray | None:
    """log p float[n, Y] of every behavior for the scored samples, or None."""
    if not (self.folder / 'log_p').is_dir():
      return None
    table = pq.read_table(self.folder / 'log_p')
    # Validation samples stand in the same table, of which tau was fitted.
    scored = read_scored(table.filter(pc.equal(table.column('split'), split)))
    return scored.of(np.sort(scored.samples)).scores.astype(np.float64)

  def column(self, name: str) -> np.ndarray:
    return np.array(self.predictions.column(name).to_pylist())


@dataclasses.dataclass(frozen=True)
class RunFiles:
  workdir: Path
  summary: dict
  behaviors: list[dict]  # the candidate list: name, train_count, group
  baselines: dict[str, dict]
  stages: list[StageFiles]
  sasrec: StageFiles | None = None  # The baseline that is trained.

  @functools.cached_property
  def events(self) -> Events:
    return open_events(self.workdir / 'events')

  @functools.cached_property
  def baseline_counts(self) -> Counts:
    """The free baselines, fitted as in the run: all of its stages share these."""
    config = self.predicting[-1].config
    return Counts(self.events, config['data']['history'], config['seed'])

  @functools.cached_property
  def baseline_table(self) -> pa.Table | None:
    """What the free baselines chose, a row per evaluated event; None: unknown."""
    return read_parquet(self.workdir / 'baselines.parquet')

  @functools.cached_property
  def ids(self) -> dict[str, int]:
    return {row['name']: i for i, row in enumerate(self.behaviors)}

  @functools.cached_property
  def anchor(self) -> np.ndarray:
    return np.array([b['group'] == 'anchor' for b in self.behaviors], bool)

  @functools.cached_property
  def counts(self) -> np.ndarray:
    """int64 [Y], training events of each behavior."""
    return np.array([b['train_count'] for b in self.behaviors])

  @property
  def log_prior(self) -> np.ndarray:
    """float64 [Y]: how frequent each behavior is in the training split."""
    return adjust.log_prior(self.counts)

  @property
  def by_frequency(self) -> np.ndarray:
    """Indices of the behaviors, the most frequent in training first."""
    return np.argsort(-self.counts, kind='stable')

  @property
  def scored(self) -> list[StageFiles]:
    return [s for s in self.stages if s.evaluation]

  @property
  def predicting(self) -> list[StageFiles]:
    return [s for s in self.stages if s.predictions is not None]

  def per_behavior(self, stage: StageFiles) -> np.ndarray:
    """Precision, recall, F1 and support of every behavior: float64[4, Y]."""
    true, predicted = (
      self.encode(stage.column(name)) for name in ('behavior', 'predicted')
    )
    return metrics.per_behavior(true, predicted, len(self.behaviors))

  def encode(self, names: Iterable[str]) -> np.ndarray:
    return np.array([self.ids[name] for name in names], np.int64)

  def best_baseline(self, group: str, key: str) -> tuple[float, str] | None:
    """(score, name) of the baseline that is best in this very score."""
    found = [(s[group][key], name) for name, s in self.baselines.items()]
    return max(found, key=lambda pair: pair[0], default=None)


def read_run(workdir: Path) -> RunFiles:
  behaviors = read_json(workdir / 'events/behaviors.json', [])
  stages = {
    key: StageFiles(
      key,
      folder,
      read_json(folder / 'config.json', {}),
      read_json(folder / 'evaluation.json'),
      read_parquet(folder / 'predictions.parquet'),
    )
    for key in (*STAGES, 'sasrec')
    if (folder := workdir / key).is_dir()
  }
  sasrec = stages.pop('sasrec', None)
  return RunFiles(
    workdir,
    read_json(workdir / 'events/summary.json', {}),
    # Unseen ones are the last of the list, so ids stay those of the events.
    [row for row in behaviors if row['group'] != 'unseen'],
    read_json(workdir / 'baselines.json', {}),
    list(stages.values()),
    sasrec if sasrec and sasrec.evaluation else None,  # It may still be in training.
  )


def of_equal_n(run: RunFiles) -> tuple[RunFiles, dict[str, int]]:
  """A run without the scores of other n than the final stage's.

  Macro-F1 of the tail grows with n, so those cannot be compared.

  Returns:
    (the run, {name of what lost its scores: its n}).
  """
  if not run.scored:
    return run, {}
  trained = [*run.scored, *[run.sasrec] * bool(run.sasrec)]
  scores = {stage.name: stage.evaluation for stage in trained} | run.baselines
  n = {name: found['all']['n'] for name, found in scores.items()}
  other = {name: n[name] for name in n if n[name] != n[run.scored[-1].name]}
  empty = lambda stage: dataclasses.replace(stage, evaluation=None, predictions=None)
  stages = [empty(stage) if stage.name in other else stage for stage in run.stages]
  baselines = {name: s for name, s in run.baselines.items() if name not in other}
  sasrec = None if 'SASRec' in other else run.sasrec
  kept = dataclasses.replace(run, baselines=baselines, stages=stages, sasrec=sasrec)
  return kept, other


def plan_targets(path: Path) -> np.ndarray:
  """Event positions of all targets of a plan, repeats included: int64[n]."""
  rows = pq.read_table(path, columns=['segments'])
  segments = pc.list_flatten(rows.column('segments').combine_chunks())
  # Conversations have no targets, and their start is no event.
  windows = segments.filter(pc.equal(segments.field('kind'), 'window'))
  targets = pc.list_flatten(windows.field('targets'))
  return targets.to_numpy(zero_copy_only=False).astype(np.int64)


def read_json(path: Path, missing: dict | list | None = None) -> dict | list | None:
  return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else missing


def read_json_lines(path: Path) -> list[dict]:
  if not path.is_file():
    return []
  lines = path.read_text(encoding='utf-8').splitlines()
  return [json.loads(line) for line in lines if line]


def read_parquet(path: Path) -> pa.Table | None:
  return pq.read_table(path) if path.is_file() else None
