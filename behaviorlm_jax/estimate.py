"""What a run will do and about how long that takes, before its first step.

Work is counted in tokens that pass all layers once, with 2 operations
for each of the layers' parameters. Its seconds are those operations over the
speed of this machine's products, and over the share of it that passes reach.
"""

import math
from typing import NamedTuple

from behaviorlm_jax.cluster import processor
from behaviorlm_jax.config import stage_of
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.score import scorer
from behaviorlm_jax.setup import Setup

_REACHED = 0.5
_QUESTIONS = 200  # So many tell how long a question is.
# Passes that a training step is worth: forward, the gradient of activations (the
# base's weights get none), and with full what is computed a second time.
_PASSES = {'none': 2, 'products': 2, 'full': 3}
_UNITS = (('days', 86400), ('h', 3600), ('min', 60), ('s', 1))


class Part(NamedTuple):
  """What is ahead, under the name that setup.Clock will measure."""

  name: str
  what: str
  tokens: float = 0  # Each passes all layers once; 0: no work of the model.


def parts_ahead(setup: Setup) -> list[Part]:
  """What the work directory does not have yet, in the order of a run."""
  parts, steps = _arm(setup, 'base'), setup.config.sasrec.steps
  if steps and not _has(setup, 'sasrec'):
    parts.append(Part('sasrec', f'{steps:,} steps'))
  for stage in (stage_of(setup.config, name) for name in setup.config.stages):
    if not _has(setup, stage.folder):
      parts += [*_difficulty(setup, stage), *_training(setup, stage)]
    parts += _arm(setup, stage.folder)
  return [*parts, Part('report', 'tables and figures')]


def _has(setup, folder, name='evaluation.json'):
  return (setup.workspace.folder / folder / name).exists()


def _arm(setup, folder):
  """What measure.evaluate does for a model."""
  held, parts = setup.retention.conversations, []
  if _has(setup, folder):
    return parts
  if held and not _has(setup, folder, 'retention.json'):
    tokens = sum(len(conversation.tokens) for conversation in held)
    parts.append(Part(f'{folder}: retention', f'{len(held):,} conversations', tokens))
  tests, validation = len(setup.samples.test), len(setup.samples.validation)
  what = f'{tests:,} test events, {validation:,} validation events'
  tokens = (tests + validation) * event_tokens(setup)
  return [*parts, Part(f'{folder}: evaluation', what, tokens)]


def _difficulty(setup, stage):
  config, name = setup.config, f'{stage.folder}: difficulty'
  scored = stage.content == 'subset' and config.difficulty.score != 'random'
  if not scored or _has(setup, stage.folder, 'difficulty.parquet'):
    return []
  samples = samples_lib.of_split(setup.events, 'train', config.plan.min_context)
  most = max(config.difficulty.candidates, config.plan.per_behavior)
  count = int(samples.counts.clip(max=most).sum())
  return [Part(name, f'{count:,} training events', count * event_tokens(setup))]


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
  """Tokens that scoring one event takes: a padded question and the label tree."""
  samples = setup.samples.test
  some = samples[:: -(-len(samples) // _QUESTIONS)]
  lengths = [len(setup.prompts.question(sample)) for sample in some]
  padded = [scorer.round_up(length, scorer.WIDTH) for length in lengths]
  nodes = sum(len(tree.tokens) for tree in setup.scorer.trees)
  return sum(padded) / len(padded) + nodes


def ahead(setup: Setup) -> str:
  """Lines on what a run has left to do, and about how long that takes."""
  params, base = setup.model.params, setup.base.config
  layers = [x.shape for name, x in params.items() if name.startswith('layers.')]
  speed = processor.product_speed(base.embed, base.mlp, setup.config.model.dtype)
  seconds = 2 * sum(map(math.prod, layers)) / speed / _REACHED  # Of a token.
  return '\n'.join(
    f'  {name:<22}{what:<45}{about(tokens * seconds) if tokens else ""}'.rstrip()
    for name, what, tokens in parts_ahead(setup)
  )


def about(seconds: float) -> str:
  """'about 4 min', rounded up."""
  unit, size = next((u for u in _UNITS if seconds > 1.5 * u[1]), _UNITS[-1])
  step = (1 if seconds < 10 * size else 5) * size
  return f'about {max(1, math.ceil(seconds / step) * step // size)} {unit}'
