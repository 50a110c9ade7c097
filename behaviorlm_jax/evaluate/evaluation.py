"""Scores samples of a split and writes evaluation.json and predictions.parquet.

Every arm (base model, stages, baselines) is evaluated on the same samples: a
uniform draw of the test split, by seed. Samples whose true behavior was never
seen before the test split cannot be answered and are left out. What may be
fitted on top of a predictor is fitted on samples of the validation split.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
from ml_collections import ConfigDict

from behaviorlm_jax import seeds
from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.evaluate import adjust, baselines, metrics
from behaviorlm_jax.io import files
from behaviorlm_jax.score import label_tree


@dataclasses.dataclass(frozen=True)
class Scored:
  """What a model says of samples of one split."""

  samples: np.ndarray  # Positions int64 [n].
  scores: np.ndarray  # s(y), float [n, Y].
  questions: list[np.ndarray]  # Token ids of each prompt.


def draw_samples(
  events: events_lib.Events, split: str, most: int, config: ConfigDict
) -> np.ndarray:
  """Positions int64 of at most `most` samples (0: all), sorted."""
  samples = samples_lib.of_split(events, split, config.plan.min_context)
  size = int(samples.counts.sum())
  if not most or size <= most:
    return samples.all()
  rng = seeds.stream(config.seed, 'evaluation', split)
  # Ranks, which a pass finds: not every log's samples fit in memory.
  ranks = np.sort(rng.choice(size, most, replace=False))
  return samples.at(ranks)


def test_samples(events: events_lib.Events, config: ConfigDict) -> np.ndarray:
  """The evaluated samples; refuses a log that has none."""
  samples = draw_samples(events, 'test', config.eval.max_samples, config)
  if not len(samples):
    raise InputError(
      'data.events: the test split has no sample with '
      f'{config.plan.min_context} events before it; give users more events '
      'or lower plan.min_context.'
    )
  return samples


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
  test: Scored,
  validation: Scored | None,
  config: ConfigDict,
) -> None:
  """Writes what one arm predicted, and how good that is.

  Args:
    folder: of the stage.
    prompts: data.prompts.Prompts.
    test: Scored.
    validation: Scored, or None: nothing is fitted.
    config: the whole config.
  """
  events = prompts.events
  summary = summarize(events, test.samples, test.scores)
  table = _predictions(prompts, test.samples, test.questions, test.scores)
  if validation is not None:
    summary['fitted'] = {}
    for name, (numbers, scores) in fitted(events, test, validation, config).items():
      summary['fitted'][name] = {
        'validation_samples': len(validation.samples),
        **numbers,
        **summarize(events, test.samples, scores),
      }
      first = [events.behaviors[b].name for b in label_tree.best(scores, 1)[:, 0]]
      table = table.append_column(name, pa.array(first))
    # All of log p: reports and sweeps draw curves over tau from it.
    files.write_parquet(
      folder / 'log_probs.parquet',
      pa.concat_tables(
        [_log_probs('validation', validation), _log_probs('test', test)]
      ),
    )
  files.write_parquet(folder / 'predictions.parquet', table)
  # Last, because its presence says that the stage is finished.
  files.write_json(folder / 'evaluation.json', summary)


def fitted(
  events: events_lib.Events, test: Scored, validation: Scored, config: ConfigDict
) -> dict[str, tuple[dict[str, float], np.ndarray]]:
  """{name: (numbers, scores of the test samples)} of adjust.NAMES."""
  # markov: of the count models the one whose scores are log-probabilities.
  counted = [
    baselines.scores('markov', events, part.samples, config.data.history, config.seed)
    for part in (validation, test)
  ]
  prior = adjust.log_prior(events.train_counts)
  numbers = adjust.fit(
    label_tree.log_softmax(validation.scores),
    counted[0],
    prior,
    events.behavior[validation.samples],
  )
  log_p = label_tree.log_softmax(test.scores)
  return {
    name: (found, adjust.apply(found, log_p, counted[1], prior))
    for name, found in numbers.items()
  }


def _log_probs(split: str, scored: Scored) -> pa.Table:
  log_p = label_tree.log_softmax(scored.scores)
  return pa.table(
    {
      'split': [split] * len(scored.samples),
      'sample': pa.array(scored.samples, pa.int64()),
      'log_p': pa.array(log_p.tolist(), pa.list_(pa.float32())),
    }
  )


def _predictions(
  prompts: prompts_lib.Prompts,
  samples: np.ndarray,
  questions: list[np.ndarray],
  scores: np.ndarray,
) -> pa.Table:
  events = prompts.events
  true = events.behavior[samples]
  log_probs = label_tree.log_softmax(scores)
  top = label_tree.best(scores)
  name = lambda b: events.behaviors[b].name
  return pa.table(
    {
      'sample': pa.array(samples, pa.int64()),
      'user': [events.users[u] for u in events.user[samples]],
      'time': pa.array(events.time[samples], pa.timestamp('s')),
      'group': [events.behaviors[b].group for b in true],
      'behavior': [name(b) for b in true],
      'predicted': [name(b) for b in top[:, 0]],
      'log_prob': pa.array(log_probs[np.arange(len(true)), true], pa.float32()),
      'top5': [[name(b) for b in row] for row in top],
      'top5_log_prob': pa.array(
        np.take_along_axis(log_probs, top, axis=1).tolist(), pa.list_(pa.float32())
      ),
      'prompt_tokens': pa.array([q.tolist() for q in questions], pa.list_(pa.int32())),
      'in_context': [in_context(prompts, p) for p in samples],
    }
  )


def in_context(prompts: prompts_lib.Prompts, position: int) -> bool:
  """Whether the true behavior stands in its question's context."""
  behavior = prompts.events.behavior
  # What the question shows; the log may know more of the user's past.
  past = behavior[prompts.question_start(position) : position]
  return bool((past == behavior[position]).any())


def write_baselines(
  path: Path, events: events_lib.Events, samples: np.ndarray, config: ConfigDict
) -> None:
  """Writes the metrics of every free baseline on the same samples."""
  result = {
    name: summarize(
      events,
      samples,
      baselines.scores(name, events, samples, config.data.history, config.seed),
    )
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
