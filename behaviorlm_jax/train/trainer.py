"""The training of one stage: a plan and a first adapter in, the last one out."""

import dataclasses
from collections.abc import Callable

import jax
from absl import logging
from ml_collections import ConfigDict

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
  """A frozen base on its devices, and how an adapter is put on it.

  Attributes:
    attach: (params, adapter) -> decoder.Decoder.
    params: weights of the base.
    layout: where they lie.
    shapes: of the adapter, {name: {'a': shape, 'b': shape}}.
  """

  attach: Callable
  params: dict
  layout: sharding.Layout
  shapes: dict


@dataclasses.dataclass(frozen=True)
class Lesson:
  """Rows to learn from, what makes arrays of them, and within which names."""

  plan: plan_lib.Plan
  assemble: loader.Assembler
  names: Names | None


class Trainer:
  """Trains the adapter of a model for a stage."""

  def __init__(self, model: Model, stage: config_lib.Stage, train: ConfigDict):
    """`train`: the config's section."""
    self.model, self.stage, self.train = model, stage, train
    self.optimizer, self._schedule = step_lib.make_optimizer(stage, train)
    self.places = step_lib.state_shardings(model.layout, model.shapes, self.optimizer)

  def step(self, lesson: Lesson) -> Callable:
    """step.make_step of what a lesson teaches."""
    return step_lib.make_step(
      self._loss(lesson, self.train.accumulate),
      self.optimizer,
      self._schedule,
      self.train.accumulate,
      self.places,
      self.model.layout,
    )

  def _loss(self, lesson, accumulate):
    parts = self.model.layout.row_parts
    # Of the whole plan, so that one compilation serves all of its batches.
    answers = plan_lib.most_answers(lesson.plan, self.train.batch, accumulate, parts)
    return Loss(self.model.attach, parts, answers, lesson.names)

  def fit(
    self,
    lesson: Lesson,
    adapter: dict,
    validation: Lesson | None,
    workspace: Workspace,
    checkpoint: ConfigDict,
  ) -> dict:
    """Trains, or goes on, in the stage's folder; returns the adapter at the end.

    `checkpoint`: the config's section.
    """
    folder = workspace.folder / self.stage.folder
    state = step_lib.init_state(adapter, self.optimizer, self.places)
    saved = checkpoints_lib.Checkpoints(
      workspace.place(folder / 'checkpoints'),
      checkpoint.keep,
      plan_lib.content_hash(lesson.plan),
    )
    state = saved.restore_latest(state, checkpoint.every)
    section = 'b' if self.stage.name == 'b' else 'a'
    rate = f'{section}.learning_rate (it is {self.stage.learning_rate})'
    state = loop.run(
      loop.Task(workspace, folder, self.stage.steps, checkpoint.every, rate),
      state,
      self._advance(lesson),
      self._batches(lesson, int(state['step']), self.train.workers),
      saved,
      self._validator(validation, folder.name),
    )
    # From the disk, as a run has it that finds the stage trained.
    adapter = saved.restore_adapter(saved.latest_step(), state)
    saved.close()
    return adapter

  def _advance(self, lesson):
    step = self.step(lesson)
    return lambda state, batch: step(state, self.model.params, batch)

  def _batches(self, lesson, step, threads=1):
    """Batches on the devices, from a step on."""
    rows, layout = self.train.batch, self.model.layout
    found = loader.batches(
      lesson.plan, lesson.assemble, rows, step, layout.host_rows(rows), threads
    )
    return (layout.put_rows(batch, rows) for batch in found)

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
        one, w = sums(adapter, self.model.params, batch)
        loss, weight = loss + float(one), weight + float(w)
      return {'val_loss': loss / weight}

    return validate


def abstract_arguments(trainer: Trainer, lesson: Lesson) -> tuple:
  """(state, params, batch) of a step, as jax.ShapeDtypeStruct."""
  model = trainer.model
  state = step_lib.abstract_state(model.shapes, trainer.optimizer, trainer.places)
  # All rows of a plan have the shapes of its first.
  row = lesson.assemble(lesson.plan.rows[0])
  batch = jax.tree.map(
    lambda x: model.layout.abstract_rows((trainer.train.batch, *x.shape), x.dtype), row
  )
  return state, model.params, batch
