"""The training of one stage: a plan and a first adapter in, the last one out."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
from absl import logging

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.cluster.workspace import Workspace
from behaviorlm_jax.data import loader
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.train import checkpoints as checkpoints_lib
from behaviorlm_jax.train import loop, sharding
from behaviorlm_jax.train import step as step_lib
from behaviorlm_jax.train.loss import Loss, Names


@dataclasses.dataclass(frozen=True)
class Model:
  """A frozen base on its devices, and how an adapter is put on it."""

  attach: Callable  # (params, adapter) -> decoder.Decoder
  params: dict  # Weights of the base.
  layout: sharding.Layout  # Where they lie.
  shapes: dict  # Of the adapter: {name: {'a': shape, 'b': shape}}.


@dataclasses.dataclass(frozen=True)
class Lesson:
  """Rows to learn from, what makes arrays of them, and within which names."""

  plan: plan_lib.Plan
  assemble: loader.Assembler
  names: Names | None


class Trainer:
  """Trains the adapter of a model for a stage."""

  def __init__(
    self, model: Model, stage: config_lib.Stage, train: Mapping[str, int | float]
  ):
    """`train`: the config's section."""
    self.model, self.stage = model, stage
    self.batch, self.accumulate = train['batch'], train['accumulate']
    self.tuner = step_lib.Tuner(stage, train, model.layout, model.shapes)

  def step(self, lesson: Lesson) -> Callable:
    """step.make_step of what a lesson teaches."""
    loss = self._loss(lesson, self.accumulate)
    return step_lib.make_step(loss, self.tuner, self.accumulate)

  def _loss(self, lesson, accumulate):
    parts = self.model.layout.row_parts
    # Of the whole plan, so that one compilation serves all of its batches.
    answers = plan_lib.most_answers(lesson.plan, self.batch, accumulate, parts)
    return Loss(self.model.attach, parts, answers, lesson.names)

  def fit(
    self,
    lesson: Lesson,
    adapter: dict,
    validation: Lesson | None,
    workspace: Workspace,
    every: int,
  ) -> dict:
    """Trains, or goes on, in the stage's folder; returns the adapter at the end.

    `every`: steps between checkpoints, each of which is validated.
    """
    folder = workspace.folder / self.stage.folder
    saved = checkpoints_lib.Checkpoints(
      workspace.place(folder / 'checkpoints'), plan_lib.content_hash(lesson.plan)
    )
    state = saved.restore_latest(self.tuner.begin(adapter), every)
    section = 'b' if self.stage.name == 'b' else 'a'
    rate = f'{section}.learning_rate (it is {self.stage.learning_rate})'
    step = self.step(lesson)
    state = loop.run(
      loop.Task(workspace, folder, self.stage.steps, every, rate),
      state,
      lambda state, batch: step(state, self.model.params, batch),
      self._batches(lesson, int(state['step'])),
      saved,
      self._validator(validation, folder.name),
    )
    # From the disk, as a run has it that finds the stage trained.
    adapter = saved.restore_adapter(state)
    saved.close()
    return adapter

  def _batches(self, lesson, step):
    """Batches on the devices, from a step on."""
    layout = self.model.layout
    found = loader.batches(
      lesson.plan, lesson.assemble, self.batch, step, layout.host_rows(self.batch)
    )
    return (layout.put_rows(batch, self.batch) for batch in found)

  def _validator(self, lesson, name):
    """adapter -> {'val_loss'}, or {} where there is nothing to validate on."""
    if lesson is None:
      logging.warning('%s: the validation split has no sample for it.', name)
      return lambda adapter: {}
    # Whole batches: without a gradient they need no micro-batches.
    sums = step_lib.make_validation(self._loss(lesson, 1), self.model.layout)

    def validate(adapter: dict) -> dict:
      loss = weight = 0.0
      for batch in self._batches(lesson, 0):
        one, its_weight = sums(adapter, self.model.params, batch)
        loss, weight = loss + float(one), weight + float(its_weight)
      return {'val_loss': loss / weight}

    return validate


def abstract_arguments(trainer: Trainer, lesson: Lesson) -> tuple:
  """(state, params, batch) of a step, as jax.ShapeDtypeStruct."""
  model = trainer.model
  # All rows of a plan have the shapes of its first.
  row = lesson.assemble(lesson.plan.rows[0])
  batch = jax.tree.map(
    lambda x: model.layout.abstract_rows((trainer.batch, *x.shape), x.dtype), row
  )
  return trainer.tuner.abstract(), model.params, batch
