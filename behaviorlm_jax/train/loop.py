"""The train loop: step, note, validate, save.

Metrics of a step are read while the next one runs, so dispatch never waits.
Every row of metrics.jsonl up to step s is kept before checkpoint s is, and a
resumed run drops the rows after its checkpoint: each step stands there once. Of
several hosts the first one writes them.
"""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorboardX
import tqdm
from absl import logging

from behaviorlm_jax.cluster import preemption, processes
from behaviorlm_jax.cluster.workspace import Workspace
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import files
from behaviorlm_jax.train import checkpoints as checkpoints_lib


@dataclasses.dataclass(frozen=True)
class Task:
  """What a stage's loop has to do."""

  workspace: Workspace
  folder: Path  # of the stage
  steps: int
  every: int  # steps between checkpoints
  learning_rate: str  # the field and its value: to lower, if a loss is not finite


def run(
  task: Task,
  state: dict,
  advance: Callable[[dict, dict], tuple[dict, dict]],
  batches: Iterator[dict],
  checkpoints: checkpoints_lib.Checkpoints,
  validate: Callable[[dict], dict],
) -> dict:
  """Trains to the last step and returns the state.

  Args:
    task: what to do.
    state: as restored; its 'step' says where to go on.
    advance: (state, batch) -> (state, metrics), step.make_step's with the base.
    batches: global batches on the devices, from that step on.
    checkpoints: of the stage.
    validate: adapter -> {'val_loss': float}, or {}.

  Raises:
    InputError: the loss is not finite; the last checkpoint stays.
    preemption.Preempted: after saving, when SIGTERM came.
  """
  done = int(state['step'])
  pending = None  # Step and metrics that are not noted yet.
  with contextlib.closing(_Notes(task, done, checkpoints)) as notes:
    for step in range(done + 1, task.steps + 1):
      # Dispatched, not done: what is read of it is the step before's.
      state, metrics = advance(state, next(batches))
      if pending:
        notes.add(*pending)
      pending = step, metrics
      # Every host asks at every step, so that they agree on the one to stop at.
      stop = preemption.requested()
      due = step % task.every == 0 or step == task.steps
      if due or stop:
        check = functools.partial(validate, state['adapter']) if due else None
        notes.add(step, metrics, check)
        pending = None
        notes.flush()  # Rows first: each step of a checkpoint stands there.
        checkpoints.save(state)
      if stop and step < task.steps:  # After the last there is no more to do.
        checkpoints.wait()
        logging.info('%s: saved at step %d.', task.folder.name, step)
        preemption.check()
  checkpoints.wait()
  return state


class _Notes:
  """Tells what steps gave: a row of metrics.jsonl each, and a progress bar."""

  def __init__(self, task, done, checkpoints):
    self._task, self._checkpoints = task, checkpoints
    primary = processes.is_primary()
    self._file = MetricsFile(task.folder, done) if primary else None
    self._clock = _Clock()
    self._bar = tqdm.tqdm(
      total=task.steps,
      initial=done,
      desc=task.folder.name,
      unit='step',
      mininterval=1.0,
      disable=not primary,
    )

  def add(
    self, step: int, metrics: dict, validate: Callable[[], dict] | None = None
  ) -> None:
    """Waits for a step, whose `metrics` are on the devices, and notes it."""
    row = {'step': step, **{name: float(value) for name, value in metrics.items()}}
    row |= self._clock.rates(row)
    if 'seconds_to_first_step' in row:
      logging.info(
        '%s: first step after %.1f s, compilation included.',
        self._task.folder.name,
        row['seconds_to_first_step'],
      )
    if validate:
      row |= validate()
      self._clock.reset()  # Its time is no step's.
    self._check_finite(row)
    if self._file:
      self._file.write(row)
    self._bar.set_postfix_str(_postfix(row), refresh=False)
    self._bar.update()

  def _check_finite(self, row):
    for name in ('loss', 'grad_norm', 'val_loss'):
      if not math.isfinite(row.get(name, 0.0)):
        self._checkpoints.wait()  # The one that stays may still be on its way.
        raise InputError(
          f'{self._task.folder.name}: {name} of step {row["step"]} is {row[name]}; '
          f'the checkpoint of step {self._checkpoints.latest_step()} stays. Use '
          f'another --workdir and a lower {self._task.learning_rate}.'
        )

  def flush(self) -> None:
    if self._file:
      self._file.flush()
      self._task.workspace.upload()

  def close(self) -> None:
    self._bar.close()
    if self._file:
      self._file.close()


class MetricsFile:
  """metrics.jsonl and TensorBoard, cut back to the step resumed from."""

  def __init__(self, folder: Path, step: int):
    path = folder / 'metrics.jsonl'
    kept = []
    if path.exists():
      for line in path.read_text().splitlines(keepends=True):
        # A line that a crash cut short can only be the last one.
        if line.endswith('\n') and json.loads(line)['step'] <= step:
          kept.append(line)
    files.write_text(path, ''.join(kept))
    self._file = path.open('a')
    self._board = tensorboardX.SummaryWriter(
      str(folder / 'tensorboard'), purge_step=step + 1
    )

  def write(self, row: dict) -> None:
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    for name, value in row.items():
      if name != 'step':
        self._board.add_scalar(name, value, row['step'])

  def flush(self) -> None:
    """What was written is on disk, and nothing is on its way there."""
    self._file.flush()
    self._board.flush()

  def close(self) -> None:
    self._file.close()
    self._board.close()


class _Clock:
  """Rates from one step's end to the next."""

  def __init__(self):
    self._begin = time.monotonic()
    self._then = None

  def reset(self) -> None:
    """The time until now counts for no step."""
    self._then = time.monotonic()

  def rates(self, row: dict) -> dict:
    then, now = self._then, time.monotonic()
    self._then = now
    if then is None:  # The first step's are not known: it holds the compilation.
      return {'seconds_to_first_step': round(now - self._begin, 2)}
    seconds = max(now - then, 1e-9)
    return {
      'seconds': round(seconds, 4),
      'tokens_per_second': round(row['tokens'] / seconds, 1),
      'samples_per_second': round(row['samples'] / seconds, 3),
    }


def _postfix(row):
  text = f'loss {row["loss"]:.3f}'
  if 'tokens_per_second' in row:
    text += (
      f', {row["samples_per_second"]:.1f} samples/s, '
      f'{row["tokens_per_second"]:.0f} tokens/s'
    )
  if 'val_loss' in row:
    text += f', validation {row["val_loss"]:.3f}'
  return text
