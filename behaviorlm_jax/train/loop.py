"""The train loop: step, note, validate, save.

Metrics of a step are read while the next one runs, so dispatch never waits.
Every row of metrics.jsonl up to step s is kept before checkpoint s is, and a
resumed run drops the rows after its checkpoint: each step stands there once. Of
several hosts the first one writes them.
"""

import json
import math
import time

import tensorboardX
import tqdm
from absl import logging

from behaviorlm_jax.cluster import preemption
from behaviorlm_jax.cluster import processes
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import bucket
from behaviorlm_jax.io import files


class MetricsFile:
  """metrics.jsonl and TensorBoard, cut back to the step resumed from."""

  def __init__(self, folder, step):
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

  def write(self, row):
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    for name, value in row.items():
      if name != 'step':
        self._board.add_scalar(name, value, row['step'])

  def flush(self):
    """What was written is on disk, and nothing is on its way there."""
    self._file.flush()
    self._board.flush()

  def close(self):
    self._file.close()
    self._board.close()


class _Clock:
  """Rates from one step's end to the next.

  The first step's are not known: it holds the compilation. What stands in its
  row is the time until its end.
  """

  def __init__(self):
    self._begin = time.monotonic()
    self._then = None

  def reset(self):
    """The time until now counts for no step."""
    self._then = time.monotonic()

  def rates(self, row):
    then, now = self._then, time.monotonic()
    self._then = now
    if then is None:
      return {'seconds_to_first_step': round(now - self._begin, 2)}
    seconds = max(now - then, 1e-9)
    return {
      'seconds': round(seconds, 4),
      'tokens_per_second': round(row['tokens'] / seconds, 1),
      'samples_per_second': round(row['samples'] / seconds, 3),
    }


def run(folder, config, state, step_fn, params, batches, checkpoints, validate):
  """Trains to config.train.steps and returns the state.

  Args:
    folder: of the stage.
    config: the whole config.
    state: as restored; its 'step' says where to go on.
    step_fn: step.make_step's function.
    params: frozen base weights.
    batches: iterator of global batches on the devices, from that step on.
    checkpoints: Checkpoints of the stage.
    validate: adapter -> {'val_loss': float}, or {}.

  Raises:
    InputError: the loss is not finite; the last checkpoint stays.
    preemption.Preempted: after saving, when SIGTERM came.
  """
  steps, done = config.train.steps, int(state['step'])
  metrics_file = MetricsFile(folder, done) if processes.is_primary() else None
  clock = _Clock()
  bar = tqdm.tqdm(
    total=steps,
    initial=done,
    desc=folder.name,
    unit='step',
    mininterval=1.0,
    disable=not processes.is_primary(),
  )

  def note(step, metrics, validate=None):
    row = {'step': step, **{k: float(v) for k, v in metrics.items()}}
    row |= clock.rates(row)
    if 'seconds_to_first_step' in row:
      logging.info(
        '%s: first step after %.1f s, compilation included.',
        folder.name,
        row['seconds_to_first_step'],
      )
    if validate:
      row |= validate()
      clock.reset()
    for name in ('loss', 'grad_norm', 'val_loss'):
      if not math.isfinite(row.get(name, 0.0)):
        checkpoints.wait()  # The one that stays may still be on its way.
        raise InputError(
          f'{folder.name}: {name} of step {step} is {row[name]}; the '
          f'checkpoint of step {checkpoints.latest_step()} stays. Use another'
          ' --workdir and a lower train.learning_rate, or '
          'train.balanced_learning_rate in stage b (it is '
          f'{config.train.learning_rate}).'
        )
    if metrics_file:
      metrics_file.write(row)
    bar.set_postfix_str(_postfix(row), refresh=False)
    bar.update()
    return row

  def save(state, loss=None):
    if metrics_file:
      metrics_file.flush()
      bucket.push()
    checkpoints.save(state, loss)

  pending = None
  try:
    for step in range(done + 1, steps + 1):
      state, metrics = step_fn(state, params, next(batches))
      if pending:
        note(*pending)
      pending = (step, metrics)
      stop = preemption.requested()
      if step % config.checkpoint.every == 0 or step == steps:
        adapter = state['adapter']
        row = note(step, metrics, lambda adapter=adapter: validate(adapter))
        pending = None
        save(state, row.get('val_loss'))
      elif stop:
        note(*pending)
        pending = None
        save(state)
      if stop and step < steps:
        checkpoints.wait()
        logging.info('%s: saved at step %d.', folder.name, step)
        preemption.check()
  finally:
    bar.close()
    if metrics_file:
      metrics_file.close()
  checkpoints.wait()
  return state


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
