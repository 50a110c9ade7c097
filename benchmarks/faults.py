"""A campaign of faults: after each, the run ends as if there had been none.

  python benchmarks/faults.py [--faults=66] [--only=NUMBER] [--folder=DIR]

Each is drawn from its number: what happens, to which process, at which moment
of a whole run over both stages (benchmarks/faulty.py). Then the same command
runs again without it, on the same processes or on fewer, and is held against a
run that was left alone:

  * every process ends in time and with its documented code;
  * no finished checkpoint is lost: each stage goes on right after its newest
    readable one;
  * on the same devices losses, adapters, predictions and evaluations are the
    same, bit for bit; on fewer, the rows of every step are (by hash), losses
    agree to rtol 1e-3 and adapters to 2 % of their norm.

Prints a line for each fault, and ends with 1 if one of them went wrong. On two
CPU cores a fault takes some 20 seconds. A full disk is a small tmpfs, which
only root may mount; without it these faults are left out, and a line says so.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tiny
from safetensors import numpy as safetensors_numpy

HERE = Path(__file__).parent
STAGES = ('a_tuning', 'b_tuning')
ADAPTER = 'adapter/adapter_model.safetensors'
STEPS, TIMEOUT, HEARTBEAT = tiny.STEPS, 120, 12
STOPPED, ELSEWHERE, WRONG = 75, 76, 2
# What JAX itself ends a process with when another one is lost.
ABORTED = -signal.SIGABRT
LOST = (ELSEWHERE, ABORTED)
FIELDS = {
  'difficulty.score': 'nll',
  'a.conversation_share': 0.0,
  'retention.conversations': 0.0,
  'train.batch': 4,
  'checkpoint.every': 2,
  'eval.max_samples': 40,
  'eval.validation_rows': 4,
  'eval.validation_samples': 20,
}
# (fault, processes, who is hit, processes of the run after it). 'one' of two is
# drawn. Of each line as many as its number says.
CAMPAIGN = (
  ('kill', 1, 'all', 1, 9),
  ('stop', 1, 'all', 1, 6),
  ('torn', 1, 'all', 1, 8),
  ('full', 1, 'all', 1, 6),
  ('unreadable', 1, 'all', 1, 3),
  ('nan', 1, 'all', 1, 3),
  ('kill', 2, 'one', 2, 6),
  ('kill', 2, 'all', 2, 4),
  ('stop', 2, 'one', 2, 4),
  ('stop', 2, 'all', 2, 3),
  ('freeze', 2, 'one', 2, 3),
  ('torn', 2, 'all', 2, 3),
  ('unreadable', 2, 'one', 2, 2),
  ('nan', 2, 'all', 2, 2),
  ('kill', 2, 'one', 1, 2),
  ('stop', 2, 'all', 1, 2),
)


@dataclasses.dataclass(frozen=True)
class Fault:
  number: int
  kind: str
  processes: int
  hit: tuple  # Processes that it happens to.
  after: int  # Processes of the run that goes on.
  share: float  # When: the share of the moments of a whole run.
  torn: str = ''  # What is done to the newest checkpoint, of a torn one.

  def __str__(self):
    who = '' if self.processes == 1 else (' of ' + ' and '.join(map(str, self.hit)))
    after = '' if self.after == self.processes else f', then {self.after}'
    return (
      f'{self.number:2} {self.kind + who:17} {self.processes} '
      f'process{"es" if self.processes > 1 else ""}{after}'
      f'{" (" + self.torn + ")" if self.torn else ""}'
    )


def draw():
  """All faults of the campaign, mixed."""
  faults = [line[:-1] for line in CAMPAIGN for _ in range(line[-1])]
  random.Random(0).shuffle(faults)
  drawn = []
  for number, (kind, processes, hit, after) in enumerate(faults):
    rng = random.Random(number)
    hit = range(processes) if hit == 'all' else [rng.randrange(processes)]
    drawn.append(
      Fault(
        number,
        kind,
        processes,
        tuple(hit),
        after,
        rng.random(),
        rng.choice(list(TEARS)) if kind == 'torn' else '',
      )
    )
  return drawn


# What is done to a finished checkpoint.


def _cut(folder):
  for path in folder.rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without_values(folder):
  for path in folder.rglob('*'):
    if path.is_file() and path.parent.name == 'd':
      path.unlink()


TEARS = {
  'every file cut': _cut,
  'values gone': _without_values,
  'state gone': lambda folder: shutil.rmtree(folder / 'state'),
  'facts gone': lambda folder: shutil.rmtree(folder / 'facts'),
}


class Campaign:
  """Runs faults in `folder`, against runs without any."""

  def __init__(self, folder):
    self.folder = folder
    self.log = tiny.write_log(folder / 'log.csv', users=30)
    self.whole = {}
    for processes in (1, 2):
      run = Run(self, f'whole{processes}', processes)
      codes, seconds = run()
      assert set(codes) == {0}, f'{run.output()}\nwithout a fault: {codes}'
      self.whole[processes] = run
      print(
        f'whole run, {processes} process{"es" if processes > 1 else ""}: '
        f'{seconds:.0f} s, {run.moments()[0]} moments',
        flush=True,
      )

  def __call__(self, fault):
    """(what happened, what is wrong or '')."""
    run = Run(self, f'fault{fault.number}', fault.processes)
    room = contextlib.nullcontext()
    if fault.kind == 'full':
      room = small_disk(run.workdir, int(60e3 + 1.1e6 * fault.share))
    with room as grow:
      codes, seconds = run(fault, self.moments(fault))
      what = f'{run.last_moment():28} codes {codes} in {seconds:.0f} s'
      if len(codes) > 1:
        what += f', {run.lag:.1f} s apart'
      wrong = _unexpected(fault, codes)
      if grow:
        grow()
      torn = run.tear(TEARS[fault.torn]) if fault.torn else None
      kept = run.kept(torn)
      if fault.torn and not torn:
        wrong = wrong or 'there was nothing to tear'
      if set(codes) == {STOPPED}:  # Every step that ran was saved.
        for stage, step in run.batches():
          kept[stage] = max(kept[stage], step)
      again = run if fault.after == run.processes else Run(self, run.name, fault.after)
      again.begin()
      codes, seconds = again()
      what += f'; again: {codes} in {seconds:.0f} s'
      wrong = wrong or self._difference(
        again, codes, kept, fault.after == fault.processes
      )
      if wrong:
        print(again.output()[-3000:], file=sys.stderr)
    shutil.rmtree(run.workdir, ignore_errors=True)
    return what, wrong

  def moments(self, fault):
    """{process: (fault of benchmarks/faulty.py, its moment)}."""
    kind, whole = fault.kind, self.whole[fault.processes]
    if kind == 'full':  # Happens by itself.
      return {}
    counts = whole.moments()
    if kind == 'nan':
      counts = [2 * STEPS] * fault.processes
    elif kind == 'unreadable':
      counts = whole.moments('Assembler.__call__')
    elif kind == 'torn':  # Steps before which a checkpoint was saved.
      steps = [*range(4, STEPS + 1), *range(STEPS + 4, 2 * STEPS + 1)]
      at = steps[int(fault.share * len(steps))]
      return {p: (kind, at) for p in fault.hit}
    return {p: (kind, 1 + int(fault.share * counts[p])) for p in fault.hit}

  def _difference(self, run, codes, kept, same_devices):
    """What of a run that went on is not as it was to be, or ''."""
    if set(codes) != {0}:
      return 'the run that goes on fails'
    whole, batches = self.whole[run.processes], run.batches()
    for stage, done in kept.items():
      first = min((step for name, step in batches if name == stage), default=STEPS + 1)
      if first != done + 1:
        return f'{stage} went on at step {first}, not after {done}'
    if same_devices:
      return _other_files(run, whole)
    expected = whole.batches()
    for step, rows in batches.items():
      if rows != expected[step]:
        return f'other rows in {step}'
    for stage in STAGES:
      one, other = (x.losses(stage) for x in (run, whole))
      if len(one) != STEPS or not np.allclose(one, other, rtol=1e-3):
        return f'other losses in {stage}: {one}, not {other}'
      one, other = (
        safetensors_numpy.load_file(x.workdir / stage / ADAPTER) for x in (run, whole)
      )
      if any(
        np.linalg.norm(one[name] - other[name]) > 0.02 * np.linalg.norm(other[name])
        for name in other
      ):
        return f'another adapter of {stage}'
    return ''


def _other_files(run, whole):
  """Which file of a stage is not the same to the last bit, or ''."""
  for stage in STAGES:
    if run.losses(stage) != whole.losses(stage):
      return f'other losses in {stage}'
    for name in (ADAPTER, 'evaluation.json', 'predictions.parquet'):
      one, other = ((x.workdir / stage / name).read_bytes() for x in (run, whole))
      if one != other:
        return f'another {stage}/{name}'
  return ''


def _unexpected(fault, codes):
  """Whether a process ended otherwise than is documented, or ''."""
  # Nobody looks for a stop any more in the last moments of a run.
  stopped = (STOPPED, 0) if fault.share > 0.9 else (STOPPED,)
  expected = {
    'kill': (-signal.SIGKILL,),
    'torn': (-signal.SIGKILL,),
    'stop': stopped,
    'freeze': (-signal.SIGKILL,),
    'unreadable': (WRONG,),
    'nan': (WRONG,),
    'full': (WRONG, 0),
  }
  for process, code in enumerate(codes):
    fine = expected[fault.kind]
    if process not in fault.hit:
      # A stop is everyone's; a lost one ends the others.
      fine = fine if fault.kind == 'stop' else LOST
    elif len(fault.hit) > 1 and fault.kind in ('kill', 'torn'):
      fine = (*fine, *LOST)  # The other one was quicker.
    if code is None:
      return f'process {process} hangs'
    if code not in fine:
      return f'process {process} ends with {code}, not {fine}'
  if fault.kind == 'stop' and len(set(codes)) > 1:
    return 'one process stops, the other does not'
  return ''


class Run:
  """One command of some processes, two devices in all, in a work directory."""

  def __init__(self, campaign, name, processes):
    self.campaign, self.name, self.processes = campaign, name, processes
    self.workdir = campaign.folder / name
    self.begin()

  def begin(self):
    """Notes made from now on are those of the next call."""
    self.notes, self.lag = [], 0.0

  def __call__(self, fault=None, moments=None):
    """Runs the command; exit codes (None: hung) and seconds."""
    moments = moments or {}
    with socket.create_server(('', 0)) as server:
      port = server.getsockname()[1]
    started, began = [], time.monotonic()
    call = len(list(self.campaign.folder.glob(f'{self.name}-*.err')))
    for process in range(self.processes):
      place = self.campaign.folder / f'{self.name}-{call}-{process}'
      self.notes.append(place.with_suffix('.notes'))
      kind, at = moments.get(process, ('none', 0))
      command = [
        sys.executable,
        str(HERE / 'faulty.py'),
        kind,
        str(at),
        str(self.notes[-1]),
        f'--config={tiny.__file__}',
        f'--workdir={self.workdir}',
        f'--config.data.events={self.campaign.log}',
      ]
      command += [f'--config.{name}={value}' for name, value in FIELDS.items()]
      if self.processes > 1:
        command += [
          f'--config.distributed.{name}={value}'
          for name, value in {
            'coordinator': f'localhost:{port}',
            'processes': self.processes,
            'process': process,
            'heartbeat': HEARTBEAT,
          }.items()
        ]
      with place.with_suffix('.err').open('w') as err:
        started.append(
          subprocess.Popen(command, stdout=err, stderr=err, env=self._environment())
        )
    codes = self._wait(started, began, fault)
    return codes, time.monotonic() - began

  def _environment(self):
    return os.environ | {
      'JAX_NUM_CPU_DEVICES': str(2 // self.processes),
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(HERE.parent),
      'JAX_COMPILATION_CACHE_DIR': str(self.campaign.folder / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
    }

  def _wait(self, started, began, fault):
    """Exit codes; notes how long the last one outlived the first."""
    frozen = fault.hit if fault and fault.kind == 'freeze' else ()
    waited_for = set(range(len(started))) - set(frozen)
    ends = {}
    while waited_for - set(ends) and time.monotonic() < began + TIMEOUT:
      for number in waited_for - set(ends):
        if started[number].poll() is not None:
          ends[number] = time.time()
      time.sleep(0.02)
    for process in started:  # Frozen ones never end by themselves.
      process.kill()
      process.wait()
    # A frozen one made its last note when it froze.
    ends |= {number: self.notes[number].stat().st_mtime for number in frozen}
    self.lag = max(ends.values(), default=0) - min(ends.values(), default=0)
    return [
      process.returncode if number in ends else None
      for number, process in enumerate(started)
    ]

  def output(self):
    return '\n'.join(path.with_suffix('.err').read_text() for path in self.notes)

  def _lines(self, path):
    # A process that was killed may have left half a line.
    return (
      [
        json.loads(line)
        for line in path.read_text().splitlines(True)
        if line.endswith('\n')
      ]
      if path.exists()
      else []
    )

  def moments(self, at=None):
    """How many each process had, of all or of one function."""
    return [
      sum('moment' in line and at in (None, line['at']) for line in self._lines(path))
      for path in self.notes[: self.processes]
    ]

  def last_moment(self):
    """Of process 0: where it was, for people."""
    lines = [line for line in self._lines(self.notes[0]) if 'moment' in line]
    stage = next(
      (name for name in reversed(STAGES) if (self.workdir / name).exists()), 'before'
    )
    return f'{stage}, {lines[-1]["at"]}' if lines else 'start'

  def batches(self):
    """{(stage, step): {row: hash}} of all processes."""
    found = {}
    for path in self.notes:
      for line in self._lines(path):
        if 'step' in line:
          found.setdefault((line['stage'], line['step']), {}).update(line['rows'])
    return found

  def saved(self, stage):
    """Steps of a stage's finished checkpoints."""
    folder = self.workdir / stage / 'checkpoints'
    return sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit())

  def kept(self, torn):
    """{stage: the newest step that is safe}; a torn checkpoint is not."""
    kept = {}
    for stage in STAGES:
      saved = self.saved(stage)
      if (stage, saved[-1:]) == torn:
        saved = saved[:-1]
      done = (self.workdir / stage / 'evaluation.json').exists()
      kept[stage] = STEPS if done else max(saved, default=0)
    return kept

  def tear(self, how):
    """Damages the newest checkpoint that is needed: (its stage, [its step])."""
    for stage in reversed(STAGES):
      done = (self.workdir / stage / 'evaluation.json').exists()
      if (saved := self.saved(stage)) and not done:
        how(self.workdir / stage / 'checkpoints' / str(saved[-1]))
        return stage, saved[-1:]
    return None

  def losses(self, stage):
    path = self.workdir / stage / 'metrics.jsonl'
    return [json.loads(line)['loss'] for line in path.read_text().splitlines()]


@contextlib.contextmanager
def small_disk(folder, size):
  """A file system of so many bytes; yields what makes it larger."""
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', 'tmpfs', str(folder)]
  subprocess.run([*mount, '-o', f'size={size}'], check=True)
  try:
    yield lambda: subprocess.run(
      ['mount', '-o', 'remount,size=64m', str(folder)], check=True
    )
  finally:
    subprocess.run(['umount', str(folder)], check=True)


def may_mount(folder):
  with (
    contextlib.suppress(OSError, subprocess.CalledProcessError),
    small_disk(folder / 'disk', 4096),
  ):
    return True
  return False


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--faults', type=int, default=len(draw()))
  parser.add_argument('--only', type=int, nargs='*')
  parser.add_argument('--folder', help='Keeps what the processes said.')
  arguments = parser.parse_args()
  with contextlib.ExitStack() as stack:
    folder = Path(
      arguments.folder or stack.enter_context(tempfile.TemporaryDirectory())
    ).absolute()
    folder.mkdir(parents=True, exist_ok=not arguments.folder)
    chosen = draw()[: arguments.faults]
    if arguments.only:
      chosen = [fault for fault in draw() if fault.number in arguments.only]
    if not may_mount(folder):
      left = [fault for fault in chosen if fault.kind == 'full']
      chosen = [fault for fault in chosen if fault.kind != 'full']
      print(f'no right to mount a small disk: {len(left)} faults left out')
    campaign, wrong = Campaign(folder), 0
    for fault in chosen:
      what, problem = campaign(fault)
      wrong += bool(problem)
      print(
        f'{fault!s:50} {what} {"WRONG: " + problem if problem else "ok"}', flush=True
      )
  print(f'{len(chosen)} faults, {len(chosen) - wrong} as they should be')
  sys.exit(bool(wrong))


if __name__ == '__main__':
  main()
