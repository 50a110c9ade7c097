"""The trainer with one fault at one moment; benchmarks/faults.py runs it.

  python benchmarks/faulty.py FAULT MOMENT NOTES [flags of behaviorlm_jax.main]

A moment is a call of one of the functions in MOMENTS, counted from 1 on; the
fault happens right before the MOMENT-th of them, or of those that it names in
FAULTS. With 0 there is none. NOTES gets a JSON line for each moment and, of
each step, the SHA-256 of every row that a device of this process was given.
"""

import errno
import hashlib
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import time

import numpy as np

from behaviorlm_jax.train import loop
from behaviorlm_jax.train import step as step_lib

ASSEMBLE = ('behaviorlm_jax.data.loader', 'Assembler.__call__')
STEP = ('behaviorlm_jax.train.step', 'the step')
MOMENTS = (
  ('behaviorlm_jax.data.log.join', '_write_events'),
  ('behaviorlm_jax.io.files', 'whole'),
  ('behaviorlm_jax.score.scorer', 'Scorer._batch'),
  ('behaviorlm_jax.train.loop', 'MetricsFile.write'),
  ('behaviorlm_jax.train.checkpoints', 'Checkpoints.save'),
  ('behaviorlm_jax.model.lora', 'export'),
  ASSEMBLE,
)


def _signal(number):
  return lambda: os.kill(os.getpid(), number)


def _kill_later():
  time.sleep(1)  # What is being saved is finished then.
  os.kill(os.getpid(), signal.SIGKILL)


def _unreadable():
  raise OSError(errno.EIO, os.strerror(errno.EIO))


# Each: what happens, and at which moments (None: all).
FAULTS = {
  'none': (None, None),
  'kill': (_signal(signal.SIGKILL), None),
  'torn': (_kill_later, STEP),
  'stop': (_signal(signal.SIGTERM), None),
  'freeze': (_signal(signal.SIGSTOP), None),
  'unreadable': (_unreadable, ASSEMBLE),
  'nan': (None, STEP),
}


class Faulty:
  """Counts moments, makes notes and lets the fault happen."""

  def __init__(self, fault, at, notes):
    self.fault, (self.happen, self.only) = fault, FAULTS[fault]
    self.at, self.calls, self.lock = at, 0, threading.Lock()
    self.notes = open(notes, 'a', buffering=1)  # noqa: SIM115

  def note(self, **values):
    self.notes.write(json.dumps(values) + '\n')

  def moment(self, place):
    """Counts; returns whether it is the one of a fault that is no call."""
    with self.lock:  # Loader threads come here, too.
      if self.only in (None, place):
        self.calls += 1
        self.note(moment=self.calls, at=place[1])
        due = self.calls == self.at
      else:
        due = False
    if due and self.happen:
      self.happen()
    return due

  def wrap(self, place):
    path, name = place
    owner = importlib.import_module(path)
    *classes, name = name.split('.')
    for part in classes:
      owner = getattr(owner, part)
    inner = getattr(owner, name)

    def counted(*arguments, **options):
      self.moment(place)
      return inner(*arguments, **options)

    setattr(owner, name, counted)

  def wrap_step(self):
    """Notes what each step is given; `nan` makes its loss one."""
    make, run, stage = step_lib.make_step, loop.run, []

    def make_step(*arguments, **options):
      step = make(*arguments, **options)

      def noted(state, params, batch):
        number = int(state['step']) + 1
        due = self.moment(STEP)
        self.note(stage=stage[-1], step=number, rows=digests(batch))
        state, metrics = step(state, params, batch)
        if due and self.fault == 'nan':
          metrics = metrics | {'loss': metrics['loss'] * np.nan}
        return state, metrics

      return noted

    def noted_run(task, *arguments):
      stage.append(task.folder.name)
      return run(task, *arguments)

    step_lib.make_step, loop.run = make_step, noted_run


def digests(batch):
  """{row of the batch: SHA-256 of its arrays}, of this process's devices."""
  rows = {}
  for name in sorted(batch):
    for shard in batch[name].addressable_shards:
      first = shard.index[0].start or 0
      for row, values in enumerate(np.asarray(shard.data), start=first):
        rows.setdefault(row, {})[name] = values.tobytes()
  return {
    row: hashlib.sha256(b''.join(parts.values())).hexdigest()[:16]
    for row, parts in sorted(rows.items())
  }


def main():
  fault, at, notes = sys.argv[1:4]
  del sys.argv[1:4]
  faulty = Faulty(fault, int(at), notes)
  for place in MOMENTS:
    faulty.wrap(place)
  faulty.wrap_step()
  runpy.run_module('behaviorlm_jax.main', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
