"""Draws samples, and writes what each arm predicts and how good that is.

Every arm (base model, stages, baselines) is evaluated on the same samples: a
uniform draw of the test split, by seed. Samples whose true behavior was never
seen before the test split cannot be answered and are left out. What is calibrated,
decided or fitted on top of a predictor is settled on samples of the validation
split, the same for all, too.
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
from behaviorlm_jax.evaluate import adjust, baselines, predictor
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
  most, validation = settings['validation_samples'], np.zeros(0, np.int64)
  if most:  # 0 draws all, but means none here.
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


def truth_of(
  counts: baselines.Counts, drawn: Drawn, tolerance: float
) -> predictor.Truth:
  """What the predictors of drawn samples are assessed by."""
  events = counts.events
  return predictor.Truth(
    events.behavior[drawn.test],
    events.behavior[drawn.validation],
    events.anchors,
    counts.log_prior,
    tolerance,
  )


def write_arm(
  folder: Path,
  prompts: prompts_lib.Prompts,
  counts: baselines.Counts,
  test: Scored,
  validation: Scored | None,
  tolerance: float,
) -> None:
  """Writes what one arm predicted, and how good that is.

  `validation`: None where nothing is calibrated or fitted; `tolerance`: see
  predictor.Truth.
  """
  events, none = prompts.events, np.zeros(0, np.int64)
  drawn = Drawn(test.samples, none if validation is None else validation.samples)
  truth = truth_of(counts, drawn, tolerance)
  held = None if validation is None else validation.scores
  own = predictor.assess(truth, test.scores, held)
  summary, columns = own.summary, _predictions(prompts, test) | _columns(events, own)
  if validation is not None:
    summary['fitted'], more = _fitted(truth, counts, test, validation)
    columns |= more
  files.write_parquet(folder / 'predictions.parquet', pa.table(columns))
  # Last, because its presence says that the stage is finished.
  files.write_json(folder / 'evaluation.json', summary)


def _fitted(truth, counts, test, validation):
  """The part `fitted` of evaluation.json, and its columns of predictions."""
  summary, columns = {}, {}
  for name, (numbers, *scores) in fitted(counts, test, validation).items():
    if name == 'mixed':
      mixed = predictor.assess(truth, *scores)
      found, more = mixed.summary, _columns(counts.events, mixed, 'mixed_')
    else:  # What is adjusted is no distribution, and tau is its point.
      found, more = predictor.rank(truth, scores[0]), {}
    summary[name] = {'validation_samples': len(truth.validation), **numbers, **found}
    best = label_tree.best(scores[0], 1)[:, 0]
    columns |= {name: _names(counts.events, best), **more}
  return summary, columns


def _columns(events, assessed, prefix=''):
  """Columns of a predictor: log p of the true name, and what its points choose."""
  columns = {
    f'{prefix}point_{point}': _names(events, chosen)
    for point, chosen in assessed.chosen.items()
  }
  if assessed.log_prob is not None:
    columns[f'{prefix}log_prob'] = pa.array(assessed.log_prob, pa.float32())
  return columns


def fitted(
  counts: baselines.Counts, test: Scored, validation: Scored
) -> dict[str, tuple[dict[str, float], np.ndarray, np.ndarray]]:
  """{name: (numbers, scores of test and of validation samples)} of adjust.NAMES."""
  # markov: of the count models the one whose scores are log-probabilities.
  counted = [counts.scores('markov', part.samples) for part in (test, validation)]
  log_p = [label_tree.log_softmax(part.scores) for part in (test, validation)]
  true, prior = counts.events.behavior[validation.samples], counts.log_prior
  numbers = adjust.fit(log_p[1], counted[1], prior, true)
  apply = lambda found, split: adjust.apply(found, log_p[split], counted[split], prior)
  return {
    name: (found, apply(found, 0), apply(found, 1)) for name, found in numbers.items()
  }


def _lists(rows):
  """Arrow lists float32 of an array [n, k]; by way of Python's they take memory."""
  ends = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
  return pa.ListArray.from_arrays(ends, pa.array(rows.ravel(), pa.float32()))


def _predictions(prompts, test):
  """{column: values} of what stands there of any arm."""
  events, samples = prompts.events, test.samples
  true, top = events.behavior[samples], label_tree.best(test.scores)
  log_p = label_tree.log_softmax(test.scores)
  top_log_p = np.take_along_axis(log_p, top, axis=1)
  asked = list(zip(test.starts, samples, strict=True))
  tokens = [prompts.question(p, start) for start, p in asked]
  return {
    'sample': pa.array(samples, pa.int64()),
    'user': [events.users[u] for u in events.user[samples]],
    'time': pa.array(events.time[samples], pa.timestamp('s')),
    'group': [events.behaviors[b].group for b in true],
    'behavior': _names(events, true),
    'predicted': _names(events, top[:, 0]),
    'top5': [_names(events, row) for row in top],
    'top5_log_prob': _lists(top_log_p),
    'prompt_tokens': pa.array(tokens, pa.list_(pa.int32())),
    'in_context': [_in_context(events, start, p) for start, p in asked],
  }


def _names(events: events_lib.Events, behaviors: np.ndarray) -> list[str]:
  return [events.behaviors[b].name for b in behaviors]


def _in_context(events: events_lib.Events, start: int, position: int) -> bool:
  """Whether the true behavior stands among those that its question shows."""
  # The log may know more of the user's past.
  return bool((events.behavior[start:position] == events.behavior[position]).any())


def write_baselines(
  path: Path, counts: baselines.Counts, drawn: Drawn, tolerance: float
) -> None:
  """Writes the free baselines' scores on the same samples, and their choices.

  The choices and log p stand beside `path`, baselines.json, in baselines.parquet.
  """
  truth, summaries = truth_of(counts, drawn, tolerance), {}
  columns = {'sample': pa.array(drawn.test, pa.int64())}
  for name in baselines.NAMES:
    held = counts.scores(name, drawn.validation) if len(drawn.validation) else None
    scores, likely = counts.scores(name, drawn.test), name == 'markov'
    found = predictor.assess(truth, scores, held, likely)
    summaries[name] = found.summary
    columns |= _columns(counts.events, found, f'{name}_')
  files.write_parquet(path.with_suffix('.parquet'), pa.table(columns))
  # Last, because its presence says that both are there.
  files.write_json(path, summaries)


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
