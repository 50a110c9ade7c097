"""What preparing, planning and loading take of logs that grow tenfold.

  python benchmarks/data.py --sizes=1,10,100

Of every size, in millions of events, a log is made up (generated_log) and goes
the way of a run, each phase in a fresh process:

  prepare    log -> events
  plan       events opened and checked; the plans of both stages, without the
             model: stage b draws uniformly, as by default
  load       batches of stage a's plan, nothing but loading them

Memory is that of the phase's process: anonymous memory, which a machine has to
have, and all that was resident, with mapped files that the kernel may take back
at any time. CPU seconds are those of all threads.

What a step needs is rows a second of one host; see --need.
"""

import datetime
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import common
import generated_log
from absl import app, flags

from behaviorlm_jax import config as config_lib
from behaviorlm_jax import curriculum, seeds, setup
from behaviorlm_jax.cluster import workspace
from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.data import loader, prepared
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.model import weights

SIZES = flags.DEFINE_list('sizes', ['1', '10'], 'Millions of events.')
FOLDER = flags.DEFINE_string('folder', '', 'Where logs stay, to be used again.')
WORKERS = flags.DEFINE_list('workers', ['0', '1', '2', '4'], 'Loader threads.')
# Llama-3.1-8B on v6e:4x4, the most that docs/tpu.md has: 64 rows of 2,048
# tokens in no less than 0.570 s, on four hosts.
NEED = flags.DEFINE_float('need', 28.1, 'Rows/s of a step, of one host.', 0)
STEPS = flags.DEFINE_integer('steps', 100, 'Of each stage.', 1)
BATCH = flags.DEFINE_integer('batch', 64, 'Rows of a step.', 1)
LENGTH = flags.DEFINE_integer('length', 2048, 'Tokens of a row.', 16)
MODEL = flags.DEFINE_string('model', '', 'Whose tokenizer; the default one.')
SHARDS = flags.DEFINE_integer('shards', 0, 'Prepare in so many, then join.', 0)
_PHASE = flags.DEFINE_string('phase', '', 'Of a child: prepare|plan.')
_SAMPLED = 0.02  # Seconds between looks at memory.


class Meter:
  """Seconds, CPU seconds and memory of what happens within."""

  def __enter__(self):
    self._peak, self._done = 0.0, threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    self._begin = time.perf_counter(), _cpu()
    return self

  def __exit__(self, *error):
    self.seconds = time.perf_counter() - self._begin[0]
    self.cpu = _cpu() - self._begin[1]
    self._done.set()
    self._thread.join()

  def _watch(self):
    while True:
      self._peak = max(self._peak, _memory('RssAnon'))
      if self._done.wait(_SAMPLED):
        return

  @property
  def found(self):
    return {
      'seconds': self.seconds,
      'cpu': self.cpu,
      'anonymous': self._peak,
      'resident': _memory('VmHWM'),
    }


def _cpu():
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


def _memory(name):
  """GB of this process, by the kernel's name for it."""
  text = Path('/proc/self/status').read_text()
  return int(re.search(rf'{name}:\s+(\d+) kB', text)[1]) * 1024 / 1e9


def config_of(log):
  config = config_lib.default()
  config.data.events = str(log)
  # As in docs/benchmarks.md.
  config.a.content, config.plan.neighbours = 'anchors', 0.0
  config.a.steps = STEPS.value
  config.train.update(batch=BATCH.value, length=LENGTH.value)
  if MODEL.value:
    config.model.address = MODEL.value
  return config


def prepare(log, workdir):
  """Facts of preparing the log, in `workdir`."""
  config = config_of(log)
  workdir, facts = Path(workdir), {}
  for i in range(SHARDS.value):
    config.data.shard = f'{i}/{SHARDS.value}'
    with Meter() as meter:
      prepared.prepare_part(config, workdir)
    if not i:
      facts[f'shard 0 of {SHARDS.value}'] = meter.found
  config.data.shard = ''
  with Meter() as meter:
    prepared.load_events(config, workspace.local(workdir))
  facts['join' if SHARDS.value else 'prepare'] = meter.found
  summary = json.loads((workdir / 'events' / 'summary.json').read_text())
  size = sum(p.stat().st_size for p in (workdir / 'events').iterdir())
  return facts | {
    'rows': summary['rows'],
    'events': summary['events'],
    'users': summary['users'],
    'log': log.stat().st_size / 1e9,
    'folder': size / 1e9,
    'print': summary['fingerprint'],
  }


def plan(log, workdir):
  """Facts of planning both stages, and of loading stage a's batches."""
  whole = config_of(log)
  # Conversations are the same few whatever the log is.
  whole.a.conversation_share = whole.b.conversation_share = 0.0
  base = weights.open_base(whole.model.address)
  facts, plans = {}, {}
  with Meter() as meter:
    space = workspace.local(workdir)
    events = events_lib.open_events(space.folder / 'events')
    prompts = common.make_prompts(whole, events, base)
    prompts.check_lengths(1 << 20, whole.train.length)
    # No model: plans need none.
    this = setup.Setup(whole, space, base, prompts, [], None, None, None)
    assert len(this.samples.test)
    assert this.tree and this.anchor_tree  # Built here, and not with the first plan.
  facts['open and check'] = meter.found
  for stage in whole.stages:
    one = config_lib.stage_of(whole, stage)
    with Meter() as meter:
      for split in ('train', 'validation'):
        rng = seeds.stream(whole.seed, stage, split)
        stream = curriculum.segments(this, one, split, rng)
        steps = STEPS.value if split == 'train' else 1
        plans[stage, split] = plan_lib.take(
          stream, steps * whole.train.batch, whole.train.length, ''
        )
    facts[f'plan {stage}'] = meter.found
  facts['hash'] = plan_lib.content_hash(plans['a', 'train'])
  return facts | {'load': load(this, plans['a', 'train'])}


def load(this, plan):
  """{threads: facts} of nothing but loading a plan's batches."""
  stage, found = config_lib.stage_of(this.config, 'a'), {}
  assemble = curriculum.lesson(this, stage, plan).assemble
  for workers in map(int, WORKERS.value):
    batches = loader.batches(plan, assemble, BATCH.value, threads=workers)
    next(batches)
    with Meter() as meter:
      rows = sum(len(batch['samples']) for batch in batches)
    found[workers] = meter.found | {'rows': rows}
  return found


def child(phase, log, workdir):
  """Facts of one phase in a process of its own."""
  command = [sys.executable, __file__, f'--phase={phase}', str(log), str(workdir)]
  command += [
    f'--{flag.name}={flag.value}' for flag in (STEPS, BATCH, LENGTH, MODEL, SHARDS)
  ]
  command.append('--workers=' + ','.join(WORKERS.value))
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def growth(title, sizes, facts):
  """A table of phases, a row for each size, the ratio to the one before."""
  print(f'\n{title}\n')
  head = [
    'phase',
    'million events',
    'seconds',
    'CPU seconds',
    'grows',
    'anonymous GB',
    'resident GB',
  ]
  rows = [head, ['---'] * len(head)]
  names = [
    name
    for name, value in facts[0].items()
    if isinstance(value, dict) and 'seconds' in value
  ]
  for name in names:
    last = None
    for size, fact in zip(sizes, facts, strict=True):
      one = fact[name]
      ratio = (
        ''
        if last is None
        else (
          f'x {one["seconds"] / last["seconds"]:.1f} '
          f'(CPU x {one["cpu"] / last["cpu"]:.1f})'
        )
      )
      rows.append(
        [
          name,
          f'{size:g}',
          f'{one["seconds"]:.1f}',
          f'{one["cpu"]:.1f}',
          ratio,
          f'{one["anonymous"]:.2f}',
          f'{one["resident"]:.2f}',
        ]
      )
      last = one
  for row in rows:
    print('| ' + ' | '.join(row) + ' |')


def measure(size, folder):
  """Facts of all phases for a log of `size` million events."""
  log = folder / f'{size:g}m.parquet'
  if not log.exists():
    begin = time.perf_counter()
    generated_log.write(log, int(size * 1e6))
    print(
      f'{size:g} million events written in {time.perf_counter() - begin:.0f} s',
      file=sys.stderr,
    )
  with tempfile.TemporaryDirectory(dir=folder) as workdir:
    facts = child('prepare', log, workdir) | child('plan', log, workdir)
  print(json.dumps(facts), file=sys.stderr, flush=True)
  return facts


def report(sizes, facts):
  """Prints the tables."""
  print(f'{common.processor()}, {os.cpu_count()} cores, {datetime.date.today()}')
  growth('Time and memory', sizes, facts)
  print(
    '\n| million events | events kept | users | log, GB | events, GB | '
    'rows/s prepared |\n|' + ' --- |' * 6
  )
  for size, fact in zip(sizes, facts, strict=True):
    seconds = fact.get('prepare', {}).get('seconds', float('nan'))
    print(
      f'| {size:g} | {fact["events"]:,} | {fact["users"]:,} | '
      f'{fact["log"]:.2f} | {fact["folder"]:.2f} | '
      f'{fact["rows"] / seconds:,.0f} |'
    )
  print(
    '\n| million events | loader threads | rows/s | of what a step needs | '
    'anonymous GB |\n|' + ' --- |' * 5
  )
  for size, fact in zip(sizes, facts, strict=True):
    for workers, one in fact['load'].items():
      rate = one['rows'] / one['seconds']
      print(
        f'| {size:g} | {workers} | {rate:,.0f} | x {rate / NEED.value:.1f} '
        f'| {one["anonymous"]:.2f} |'
      )


def main(argv):
  if _PHASE.value:
    phase = {'prepare': prepare, 'plan': plan}[_PHASE.value]
    print(json.dumps(phase(*map(Path, argv[1:]))))
    return
  sizes = [float(size) for size in SIZES.value]
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(FOLDER.value or temporary)
    folder.mkdir(parents=True, exist_ok=True)
    report(sizes, [measure(size, folder) for size in sizes])


if __name__ == '__main__':
  app.run(main)
