"""Scores samples of a split and writes evaluation.json and predictions.parquet.

Every arm (base model, stages, baselines) is evaluated on the same samples: a
uniform draw of the test split, by seed. Samples whose true behavior was never
seen before the test split cannot be answered and are left out.
"""

import numpy as np
import pyarrow as pa

from behaviorlm_jax import files
from behaviorlm_jax import seeds
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.score import baselines
from behaviorlm_jax.score import labels
from behaviorlm_jax.score import metrics


def draw_samples(events, split, most, config):
  """Positions int64 of at most `most` samples (0: all), sorted."""
  samples = plan_lib.eligible(events, split, config.plan.min_context)
  if most and len(samples) > most:
    rng = seeds.stream(config.seed, 'evaluation', split)
    samples = np.sort(rng.choice(samples, most, replace=False))
  return samples


def test_samples(events, config):
  """The evaluated samples; refuses a log that has none."""
  samples = draw_samples(events, 'test', config.eval.max_samples, config)
  if not len(samples):
    raise InputError(
        'data.events: the test split has no sample with '
        f'{config.plan.min_context} events before it; give users more events '
        'or lower plan.min_context.')
  return samples


def summarize(events, samples, scores):
  """metrics.evaluate of scores [n, Y]."""
  return metrics.evaluate(events.behavior[samples], labels.best(scores),
                          plan_lib.anchor_mask(events))


def write(folder, prompts, samples, questions, scores, uncertified=None):
  """Writes what one arm predicted, and how good that is.

  Args:
    folder: of the stage.
    prompts: data.prompts.Prompts.
    samples: positions int64 [n].
    questions: token ids of each prompt.
    scores: s(y), float [n, Y].
    uncertified: bool [n] or None, see scorer.Scorer.
  """
  events = prompts.events
  summary = summarize(events, samples, scores)
  if uncertified is not None:
    summary['uncertified'] = float(uncertified.mean())
  files.write_parquet(folder / 'predictions.parquet',
                      _predictions(prompts, samples, questions, scores))
  # Last, because its presence says that the stage is finished.
  files.write_json(folder / 'evaluation.json', summary)


def _predictions(prompts, samples, questions, scores):
  events = prompts.events
  true = events.behavior[samples]
  log_probs = labels.log_softmax(scores)
  top = labels.best(scores)
  name = lambda b: events.behaviors[b].name
  return pa.table({
      'sample': pa.array(samples, pa.int64()),
      'user': [events.users[u] for u in events.user[samples]],
      'time': pa.array(events.time[samples], pa.timestamp('s')),
      'group': [events.behaviors[b].group for b in true],
      'behavior': [name(b) for b in true],
      'predicted': [name(b) for b in top[:, 0]],
      'log_prob': pa.array(log_probs[np.arange(len(true)), true],
                           pa.float32()),
      'top5': [[name(b) for b in row] for row in top],
      'top5_log_prob': pa.array(
          np.take_along_axis(log_probs, top, axis=1).tolist(),
          pa.list_(pa.float32())),
      'prompt_tokens': pa.array([q.tolist() for q in questions],
                                pa.list_(pa.int32())),
      'in_context': [in_context(prompts, p) for p in samples],
  })


def in_context(prompts, position):
  """Whether the true behavior stands in its question's context."""
  behavior = prompts.events.behavior
  past = behavior[prompts.question_start(position):position]
  return bool((past == behavior[position]).any())


def write_baselines(path, events, samples, config):
  """Writes the metrics of every free baseline on the same samples."""
  result = {
      name: summarize(events, samples,
                      baselines.scores(name, events, samples,
                                       config.data.history, config.seed))
      for name in baselines.NAMES
  }
  files.write_json(path, result)


def write_labels(path, prompts):
  """labels.json: name, group and answer tokens of every behavior, by id."""
  events = prompts.events
  files.write_json(path, [
      {'name': b.name, 'group': b.group, 'tokens': tokens.tolist()}
      for b, tokens in zip(events.behaviors, prompts.labels, strict=False)
  ])
