"""The programs of a run, lowered from shapes: no weight is read or made.

They are lowered by what trains and scores (run.trainer, scorer.Scorer), so
what is compiled here is what will run.
"""

import dataclasses

import jax
import numpy as np

from behaviorlm_jax import curriculum
from behaviorlm_jax import run as run_lib
from behaviorlm_jax import seeds
from behaviorlm_jax import setup
from behaviorlm_jax.cost import flops
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.evaluate import evaluation
from behaviorlm_jax.model import lora
from behaviorlm_jax.train import step as step_lib

_PROMPTS = 200  # So many test prompts tell how long prompts are.


def training(this: setup.Run, plan: plan_lib.Plan) -> jax.stages.Lowered:
  """The step of a run's first stage: jax.stages.Lowered.

  Args:
    this: of shapes only.
    plan: from first_plan.
  """
  return _step(this, plan)[0].lower(*_arguments(this, plan))


def training_flops(this: setup.Run, plan: plan_lib.Plan) -> list[int]:
  """Operations of the step's products, and of those that are needed.

  Attention kernels hide their products from the count, so attention in blocks
  is traced in their place: it multiplies the same. What is needed leaves out
  what the step computes twice to save memory.
  """
  counts = []
  for remat in (this.config.model.remat, 'none'):
    config = this.config.copy_and_resolve_references()
    config.model.update({'remat': remat, 'attention': 'blocked'})
    attach = step_lib.attacher(
      this.base.config, config, this.layout, config.model.dtype
    )
    other = dataclasses.replace(this, config=config, attach=attach)
    # Compiler options keep a jitted function from being traced in another.
    step = _step(other, plan)[0].__wrapped__
    counts.append(flops.count(step, *_arguments(other, plan)))
  return counts


def first_plan(this: setup.Run) -> plan_lib.Plan:
  """The plan of the run's first stage.

  Stage b's is drawn as if no sample were more difficult than others: difficulty
  takes the model.
  """
  stage, config = this.config.stages[0], this.config
  rng = seeds.stream(config.seed, stage, 'plan')
  stream = curriculum.segments(this, stage, 'train', rng)
  return plan_lib.take(stream, config, config.train.steps, '')


def scoring(this: setup.Run) -> tuple[jax.stages.Lowered, int]:
  """The pass that scores a batch of the longest prompts: Lowered, prompts."""
  return this.scorer.lower(_adapter(this), _width(this)), this.scorer.batch


def _width(this: setup.Run) -> int:
  samples = evaluation.test_samples(this.events, this.config)[:_PROMPTS]
  return max(len(this.prompts.question(sample)) for sample in samples)


def _step(this: setup.Run, plan: plan_lib.Plan) -> tuple:
  return run_lib.trainer(this, this.config.stages[0], plan)


def _arguments(this: setup.Run, plan: plan_lib.Plan) -> tuple:
  """(state, params, batch) of a step, as jax.ShapeDtypeStruct."""
  _, optimizer, places = _step(this, plan)
  lora_config = this.config.lora
  state = step_lib.abstract_state(
    lora.shapes(this.base.config, lora_config.rank, lora_config.targets),
    optimizer,
    places,
  )
  row = run_lib.assembler(this, plan)(plan.rows[0])
  batch = {
    name: this.layout.abstract_rows(
      (this.config.train.batch, *np.shape(x)), np.asarray(x).dtype
    )
    for name, x in row.items()
  }
  return state, this.params, batch


def _adapter(this: setup.Run) -> dict:
  lora_config = this.config.lora
  shapes = lora.shapes(this.base.config, lora_config.rank, lora_config.targets)
  places = this.layout.adapter(shapes)
  return jax.tree.map(
    lambda place, shape: jax.ShapeDtypeStruct(shape, np.float32, sharding=place),
    places,
    shapes,
  )
