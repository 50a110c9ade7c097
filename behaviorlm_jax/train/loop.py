"""The train loop: step, note, validate, save.

Metrics of a step are read while the next one runs, so dispatch never waits.
Every row of metrics.jsonl up to step s is on disk before checkpoint s is, and a
resumed run drops the rows after its checkpoint: each step stands there once.
"""

import json
import math
import time

import jax
import tensorboardX
import tqdm
from absl import logging

from behaviorlm_jax import files
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.train import preemption


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
        str(folder / 'tensorboard'), purge_step=step + 1)

  def write(self, row):
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    for name, value in row.items():
      if name != 'step':
        self._board.add_scalar(name, value, row['step'])

  def close(self):
    self._file.close()
    self._board.close()


class _Clock:
  """Rates since the last look, compilation left out."""

  def __init__(self):
    self._then = None

  def rates(self, tokens, rows):
    now = time.monotonic()
    then, self._then = self._then, now
    if then is None:
      return {}
    seconds = max(now - then, 1e-9)
    return {'seconds': round(seconds, 4),
            'tokens_per_second': round(tokens / seconds, 1),
            'rows_per_second': round(rows / seconds, 3)}


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
    validate: adapter -> dict of floats with 'score' (higher is better), or {}.

  Raises:
    InputError: the loss is not finite; the last checkpoint stays.
    preemption.Preempted: after saving, when SIGTERM came.
  """
  steps, done = config.train.steps, int(state['step'])
  metrics_file = MetricsFile(folder, done)
  clock = _Clock()
  bar = tqdm.tqdm(total=steps, initial=done, desc=folder.name, unit='step',
                  mininterval=1.0)

  def note(step, metrics, extra=None):
    row = {'step': step, **{k: float(v) for k, v in metrics.items()}}
    if not math.isfinite(row['loss']):
      raise InputError(
          f'{folder.name}: the loss of step {step} is {row["loss"]}; the '
          f'checkpoint of step {checkpoints.latest_step()} stays. Lower '
          f'train.learning_rate ({config.train.learning_rate}).')
    row |= clock.rates(row['tokens'], config.train.batch) | (extra or {})
    metrics_file.write(row)
    bar.set_postfix_str(_postfix(row), refresh=False)
    bar.update()

  pending = None
  try:
    for step in range(done + 1, steps + 1):
      state, metrics = step_fn(state, params, next(batches))
      if pending:
        note(*pending)
      pending = (step, metrics)
      stop = preemption.requested()
      if step % config.checkpoint.every == 0 or step == steps:
        jax.block_until_ready(metrics)
        scores = validate(state['adapter'])
        note(step, metrics, scores)
        pending = None
        checkpoints.save(state, scores.get('score'))
      elif stop:
        note(*pending)
        pending = None
        checkpoints.save(state)
      if stop and step < steps:
        checkpoints.wait()
        logging.info('%s: saved at step %d.', folder.name, step)
        preemption.check()
  finally:
    bar.close()
    metrics_file.close()
  checkpoints.wait()
  return state


def _postfix(row):
  text = f'loss {row["loss"]:.3f}'
  if 'tokens_per_second' in row:
    text += (f', {row["rows_per_second"]:.1f} rows/s, '
             f'{row["tokens_per_second"]:.0f} tokens/s')
  if 'val_loss' in row:
    text += f', validation {row["val_loss"]:.3f}'
  return text
