"""What a run will do and about how long that takes, before its first step.

Work is counted in tokens that pass all layers once, of 2 operations a parameter; its
seconds are those over the share that passes reach of the speed of this machine's
products. Compiling is not counted.
"""

import math
from typing import NamedTuple

from behaviorlm_jax import measure
from behaviorlm_jax.cluster import processor
from behaviorlm_jax.config import stage_of
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.setup import Setup

# SmolLM2-135M in bfloat16 on two CPU cores reached 0.8 where it scored one question a
# row and 0.3 where it trained: batches of configs/quickstart.py and products, timed in
# turn. So a step is worth 3 passes; `full` goes forward once more. Not measured on
# accelerators, nor with many questions a row.
_REACHED = 0.75
_PASSES = {'none': 3, 'products': 3, 'full': 4}
_UNITS = (('days', 86400), ('h', 3600), ('min', 60), ('s', 1))


class Part(NamedTuple):
  """What is ahead, under the name that setup.Clock will measure."""

  name: str
  what: str
  tokens: float = 0  # Each passes all layers once; 0: no work of the model.


def parts_ahead(setup: Setup) -> list[Part]:
  """What the work directory does not have yet, in the order of a run."""
  each, steps = event_tokens(setup), setup.config.sasrec.steps
  parts = _arm(setup, 'base', each)
  if steps and not _has(setup, 'sasrec'):
    parts.append(Part('sasrec', f'{steps:,} steps'))
  for stage in (stage_of(setup.config, name) for name in setup.config.stages):
    if not _has(setup, stage.folder):
      parts += [*_difficulty(setup, stage, each), *_training(setup, stage)]
    parts += _arm(setup, stage.folder, each)
  return [*parts, Part('report', 'tables and figures')]


def _has(setup, folder, name='evaluation.json'):
  return (setup.workspace.folder / folder / name).exists()


def _arm(setup, folder, each):
  """What measure.evaluate does for a model; `each`: tokens of an event."""
  if _has(setup, folder):
    return []
  held, parts = setup.retention.conversations, []
  if held and not _has(setup, folder, 'retention.json'):
    # At an answer three products go over the vocabulary, one of them for p0.
    head = 3 * 2 * setup.model.params['embed'].size / token_operations(setup)
    tokens = sum(len(c.tokens) + head * int(c.answers.sum()) for c in held)
    parts.append(Part(f'{folder}: retention', f'{len(held):,} conversations', tokens))
  tests, validation = len(setup.samples.test), len(setup.samples.validation)
  what = f'{tests:,} test events, {validation:,} validation events'
  tokens = (tests + validation) * each
  return [*parts, Part(f'{folder}: evaluation', what, tokens)]


def _difficulty(setup, stage, each):
  config = setup.config
  scored = stage.content == 'subset' and config.difficulty.score != 'random'
  if not scored or _has(setup, stage.folder, 'difficulty.parquet'):
    return []
  samples = samples_lib.of_split(setup.events, 'train', config.plan.min_context)
  most = max(config.difficulty.candidates, config.plan.per_behavior)
  count = int(samples.counts.clip(max=most).sum())
  name, what = f'{stage.folder}: difficulty', f'{count:,} training events'
  return [Part(name, what, count * each)]


def _training(setup, stage):
  """What is left of it after the last checkpoint."""
  config, folder = setup.config, setup.workspace.folder / stage.folder
  saved = setup.workspace.place(folder / 'checkpoints')
  names = [path.name for path in saved.iterdir()] if saved.exists() else []
  steps = stage.steps - max((int(name) for name in names if name.isdigit()), default=0)
  rows, length = steps * config.train.batch, config.train.length
  checks = -(-steps // config.checkpoint.every) * config.eval.validation_rows
  tokens = (rows * _PASSES[config.model.remat] + checks) * length
  what = f'{steps:,} steps, {rows * length:,} tokens'
  return [Part(f'{stage.folder}: training', what, tokens)] if steps else []


def event_tokens(setup: Setup) -> float:
  """Tokens that scoring one event takes: its share of a row, and the label tree."""
  samples = setup.samples.every
  length, rows = measure.packed(setup, samples)
  trees = sum(len(tree.tokens) for tree in setup.scorer.trees)
  return length * len(rows) / len(samples) + trees


def token_operations(setup: Setup) -> int:
  """Of a token that passes all layers once."""
  params = setup.model.params.items()
  return 2 * sum(math.prod(x.shape) for name, x in params if name.startswith('layers.'))


def ahead(setup: Setup) -> str:
  """Lines on what a run has left to do, and about how long that takes."""
  base = setup.base.config
  speed = processor.product_speed(base.embed, base.mlp, setup.config.model.dtype)
  seconds = token_operations(setup) / speed / _REACHED
  return '\n'.join(
    f'  {name:<22}{what:<45}{about(tokens * seconds) if tokens else ""}'.rstrip()
    for name, what, tokens in parts_ahead(setup)
  )


def about(seconds: float) -> str:
  """'about 4 min', rounded up."""
  unit, size = next((u for u in _UNITS if seconds > 1.5 * u[1]), _UNITS[-1])
  step = (1 if seconds < 10 * size else 5) * size
  return f'about {max(1, math.ceil(seconds / step) * step // size)} {unit}'
