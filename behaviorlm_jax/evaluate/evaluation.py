"""Scores samples of a split and writes evaluation.json and predictions.parquet.

Every arm (base model, stages, baselines) is evaluated on the same samples: a
uniform draw of the test split, by seed. Samples whose true behavior was never
seen before the test split cannot be answered and are left out. What may be
fitted on top of a predictor is fitted on samples of the validation split.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from behaviorlm_jax import seeds
from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.evaluate import adjust, baselines, metrics
from behaviorlm_jax.evaluate.scored import Scored
from behaviorlm_jax.io import files
from behaviorlm_jax.score import label_tree


@dataclasses.dataclass(frozen=True)
class Drawn:
  """The samples of every arm of a run: positions int64, sorted."""

  test: np.ndarray  # At least one.
  validation: np.ndarray  # None of them: nothing is fitted.

  @property
  def every(self) -> np.ndarray:
    return np.sort(np.concatenate([self.validation, self.test]))


def draw_splits(
  events: events_lib.Events, settings: Mapping[str, Any], min_context: int, seed: int
) -> Drawn:
  """Draws the evaluated samples; refuses a log that has none to test on.

  `settings`: the section `eval` of the config.
  """
  test = draw_samples(events, 'test', settings['max_samples'], min_context, seed)
  if not len(test):
    raise InputError(
      'data.events: the test split has no sample with '
      f'{min_context} events before it; give users more events '
      'or lower plan.min_context.'
    )
  validation = np.zeros(0, np.int64)
  if settings['fit']:
    most = settings['validation_samples']
    validation = draw_samples(events, 'validation', most, min_context, seed)
  return Drawn(test, validation)


def draw_samples(
  events: events_lib.Events, split: str, most: int, min_context: int, seed: int
) -> np.ndarray:
  """Positions int64 of at most `most` samples (0: all), sorted."""
  found = samples_lib.of_split(events, split, min_context)
  size = int(found.counts.sum())
  if not most or size <= most:
    return found.all()
  rng = seeds.stream(seed, 'evaluation', split)
  # Ranks, which a pass finds: not every log's samples fit in memory.
  return found.at(np.sort(rng.choice(size, most, replace=False)))


def summarize(
  events: events_lib.Events, samples: np.ndarray, scores: np.ndarray
) -> dict[str, dict[str, int | float]]:
  """metrics.by_group of scores [n, Y]."""
  return metrics.by_group(
    events.behavior[samples], label_tree.best(scores), events.anchors
  )


def write_arm(
  folder: Path,
  prompts: prompts_lib.Prompts,
  counts: baselines.Counts,
  test: Scored,
  validation: Scored | None,
) -> None:
  """Writes what one arm predicted, and how good that is.

  `validation`: None where nothing is fitted, with `counts` or without.
  """
  events = prompts.events
  summary = summarize(events, test.samples, test.scores)
  table = _predictions(prompts, test)
  if validation is not None:
    summary['fitted'] = {}
    for name, (numbers, scores) in fitted(counts, test, validation).items():
      summary['fitted'][name] = {
        'validation_samples': len(validation.samples),
        **numbers,
        **summarize(events, test.samples, scores),
      }
      first = _names(events, label_tree.best(scores, 1)[:, 0])
      table = table.append_column(name, pa.array(first))
  files.write_parquet(folder / 'predictions.parquet', table)
  # Last, because its presence says that the stage is finished.
  files.write_json(folder / 'evaluation.json', summary)


def fitted(
  counts: baselines.Counts, test: Scored, validation: Scored
) -> dict[str, tuple[dict[str, float], np.ndarray]]:
  """{name: (numbers, scores of the test samples)} of adjust.NAMES."""
  # markov: of the count models the one whose scores are log-probabilities.
  counted = [counts.scores('markov', part.samples) for part in (validation, test)]
  log_p = [label_tree.log_softmax(part.scores) for part in (validation, test)]
  true = counts.events.behavior[validation.samples]
  numbers = adjust.fit(log_p[0], counted[0], counts.log_prior, true)
  return {
    name: (found, adjust.apply(found, log_p[1], counted[1], counts.log_prior))
    for name, found in numbers.items()
  }


def _predictions(prompts: prompts_lib.Prompts, test: Scored) -> pa.Table:
  events, samples = prompts.events, test.samples
  true, top = events.behavior[samples], label_tree.best(test.scores)
  log_p = label_tree.log_softmax(test.scores)
  top_log_p = np.take_along_axis(log_p, top, axis=1)
  asked = list(zip(test.starts, samples, strict=True))
  tokens = [prompts.question(p, start).tolist() for start, p in asked]
  return pa.table(
    {
      'sample': pa.array(samples, pa.int64()),
      'user': [events.users[u] for u in events.user[samples]],
      'time': pa.array(events.time[samples], pa.timestamp('s')),
      'group': [events.behaviors[b].group for b in true],
      'behavior': _names(events, true),
      'predicted': _names(events, top[:, 0]),
      'log_prob': pa.array(log_p[np.arange(len(true)), true], pa.float32()),
      'top5': [_names(events, row) for row in top],
      'top5_log_prob': pa.array(top_log_p.tolist(), pa.list_(pa.float32())),
      'prompt_tokens': pa.array(tokens, pa.list_(pa.int32())),
      'in_context': [_in_context(events, start, p) for start, p in asked],
    }
  )


def _names(events: events_lib.Events, behaviors: np.ndarray) -> list[str]:
  return [events.behaviors[b].name for b in behaviors]


def _in_context(events: events_lib.Events, start: int, position: int) -> bool:
  """Whether the true behavior stands among those that its question shows."""
  # The log may know more of the user's past.
  return bool((events.behavior[start:position] == events.behavior[position]).any())


def write_baselines(path: Path, counts: baselines.Counts, samples: np.ndarray) -> None:
  """Writes the metrics of every free baseline on the same samples."""
  result = {
    name: summarize(counts.events, samples, counts.scores(name, samples))
    for name in baselines.NAMES
  }
  files.write_json(path, result)


def write_labels(path: Path, prompts: prompts_lib.Prompts) -> None:
  """labels.json: name, group and answer tokens of every candidate, by id."""
  events = prompts.events
  files.write_json(
    path,
    [  # Unseen behaviors, the last of the list, have no label.
      {'name': b.name, 'group': b.group, 'tokens': tokens.tolist()}
      for b, tokens in zip(events.behaviors, prompts.labels, strict=False)
    ],
  )
