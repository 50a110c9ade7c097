"""The programs of a run, lowered from shapes: no weight is read or made.

They are lowered by what trains and scores (trainer.Trainer, scorer.Scorer), so
what is compiled here is what will run.
"""

import dataclasses

import jax
import numpy as np

from behaviorlm_jax import config as config_lib
from behaviorlm_jax import curriculum, measure, seeds
from behaviorlm_jax.cost import flops
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.setup import Setup
from behaviorlm_jax.train import step as step_lib
from behaviorlm_jax.train import trainer as trainer_lib

_SAMPLES = 200  # So many test events tell how long questions are.


def first_plan(setup: Setup) -> plan_lib.Plan:
  """The plan of the run's first stage.

  Stage b's is drawn as if no sample were more difficult than others: difficulty
  takes the model.
  """
  stage = _first_stage(setup)
  rng = seeds.stream(setup.config.seed, stage.name, 'plan')
  stream = curriculum.segments(setup, stage, 'train', rng)
  train = setup.config.train
  return plan_lib.take(stream, stage.steps * train.batch, train.length, '')


def training(setup: Setup, plan: plan_lib.Plan) -> jax.stages.Lowered:
  """The step of a run's first stage; `plan` is that of `first_plan`."""
  step, arguments = _step(setup, plan)
  return step.lower(*arguments)


def training_flops(setup: Setup, plan: plan_lib.Plan) -> tuple[int, int]:
  """Operations of the step's products, and of those that are needed.

  Attention kernels hide their products from the count, so attention in blocks
  is traced in their place: it multiplies the same. What is needed leaves out
  what the step computes twice to save memory.
  """
  counts = []
  for remat in (setup.config.model.remat, 'none'):
    config = setup.config.copy_and_resolve_references()
    config.model.update({'remat': remat, 'attention': 'blocked'})
    attach = step_lib.attacher(
      setup.base.config,
      setup.model.layout,
      config.model,
      config.train,
      config.lora.alpha,
    )
    model = dataclasses.replace(setup.model, attach=attach)
    step, arguments = _step(dataclasses.replace(setup, model=model), plan)
    # Compiler options keep a jitted function from being traced in another.
    counts.append(flops.count(step.__wrapped__, *arguments))
  return tuple(counts)


def _step(setup, plan):
  """The jitted step, and its arguments as shapes."""
  stage = _first_stage(setup)
  trainer = trainer_lib.Trainer(setup.model, stage, setup.config.train)
  lesson = curriculum.lesson(setup, stage, plan)
  return trainer.step(lesson), trainer_lib.abstract_arguments(trainer, lesson)


def _first_stage(setup):
  return config_lib.stage_of(setup.config, setup.config.stages[0])


def scoring(setup: Setup) -> dict[str, jax.stages.Lowered]:
  """What reads a batch of rows, and what asks some questions of each, by name."""
  scorer = setup.scorer
  length, _ = measure.packed(setup, setup.samples.test[:_SAMPLES])
  read, ask = scorer.lower(_adapter(setup), length)
  return {
    f'reading {scorer.batch} rows of {length} tokens': read,
    f'asking {scorer.asked} questions of each': ask,
  }


def _adapter(setup):
  shapes = setup.model.shapes
  places = setup.model.layout.adapter(shapes)
  return jax.tree.map(
    lambda place, shape: jax.ShapeDtypeStruct(shape, np.float32, sharding=place),
    places,
    shapes,
  )
