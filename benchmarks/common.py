"""What both benchmarks share: the inputs, the clock, memory and tables.

Import it before torch: it settles how torch's threads wait. With OpenMP's own
default they spin for some 10 ms after an operation and then sleep, which is
the fastest for torch; ACTIVE would take cores from JAX for ever, PASSIVE makes
torch's small operations slower. `interleave` rests longer than the spinning
before every timed call, so neither side runs beside the other's threads.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
import resource
import time
from pathlib import Path

for _name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME'):
  os.environ.pop(_name, None)

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.cluster import ownership, workspace
from behaviorlm_jax.data import conversations, loader, prepared
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import lora, weights
from behaviorlm_jax.train import sharding

THREADS = os.cpu_count()
_REST = 0.05  # Seconds between timed calls, see above.


@dataclasses.dataclass
class Inputs:
  """A real log and the pretrained model, as a run of the project opens them."""

  config: object
  base: weights.Base
  prompts: prompts_lib.Prompts
  conversations: list
  layout: sharding.Layout
  adapter_folder: str = ''  # Of a run; '': a random adapter.

  @property
  def events(self):
    return self.prompts.events

  @functools.cached_property
  def adapter(self):
    """A LoRA adapter whose B is not zero, so that checks see all of it."""
    config = self.config
    if self.adapter_folder:
      adapter, alpha = lora.read_adapter(self.adapter_folder)
      if alpha != config.lora.alpha:
        raise InputError(
          f'--adapter: {self.adapter_folder} has alpha {alpha}, '
          f'but lora.alpha is {config.lora.alpha}; set it.'
        )
      return adapter
    adapter = lora.init(
      self.base.config,
      config.lora.rank,
      config.lora.targets,
      jax.random.key(config.seed),
    )
    rng = np.random.default_rng(config.seed)
    return {
      name: {
        'a': np.asarray(ab['a']),
        'b': np.float32(1e-3 * rng.standard_normal(ab['b'].shape)),
      }
      for name, ab in adapter.items()
    }

  def params(self, dtype):
    return weights.read_params(self.base, jnp.dtype(dtype), self.layout.place)

  def export(self, folder):
    """The adapter as a PEFT folder, for the torch side."""
    lora.export(folder, self.adapter, self.config.lora.alpha, self.base.folder)
    return folder


def open_inputs(config, workdir, adapter=''):
  config_lib.check(config)
  config = ownership.pin(config, Path(workdir))
  base = weights.open_base(config.model.address)
  if base.folder is None:
    raise InputError(
      f'model.address is {config.model.address}, which torch '
      'cannot read; give a folder or a .gguf file.'
    )
  events = prepared.load_events(config, workspace.local(workdir))
  prompts = make_prompts(config, events, base)
  talks = conversations.read_conversations(
    conversations.DEFAULT, base.tokenizer, config.train.length
  )
  layout = sharding.make_layout(config.mesh, config.train).of(base.config)
  return Inputs(config, base, prompts, talks, layout, adapter)


def make_prompts(config, events, base):
  """The events as text, all of which fits in train.length."""
  data = config.data
  prompts = prompts_lib.Prompts(
    events, base.tokenizer, data.instruction, data.history, data.weekday
  )
  plan_lib.check_lengths(prompts, config.plan.min_context, config.train.length)
  return prompts


def make_windows(prompts, config):
  """Windows over all training samples."""
  plan = config.plan
  samples = samples_lib.of_split(prompts.events, 'train', plan.min_context)
  return plan_lib.Windows(
    prompts, samples, plan.window, plan.targets_per_row, config.train.length
  )


def batches(inputs, steps, share):
  """Windows over all behaviors and `share` conversations.

  Returns the plan and its batches, `steps` of them.
  """
  config = inputs.config
  rng = np.random.default_rng(config.seed)
  windows = make_windows(inputs.prompts, config)
  stream = plan_lib.tile(windows, rng)
  stream = plan_lib.mix(stream, inputs.conversations, share, rng)
  rows = steps * config.train.batch
  plan = plan_lib.take(stream, rows, config.train.length, '')
  assemble = loader.Assembler(
    inputs.prompts, inputs.conversations, config.train.length, plan.answers
  )
  return plan, list(loader.batches(plan, assemble, config.train.batch))


def interleave(sides, repeats):
  """{name: seconds float64 [repeats]}; sides are called in turn, as f(i)."""
  seconds = {name: [] for name in sides}
  for i in range(repeats):
    for name, side in sides.items():
      time.sleep(_REST)
      begin = time.perf_counter()
      side(i)
      seconds[name].append(time.perf_counter() - begin)
      if repeats > 1:
        logging.info('%s %d: %.2f s', name, i, seconds[name][-1])
  return {name: np.array(values) for name, values in seconds.items()}


def once(call):
  """Seconds of one call."""
  return interleave({'': lambda i: call()}, 1)[''][0]


def check_equal(what, ours, theirs, tolerance, relative=True):
  """Ends the benchmark unless both sides computed the same."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  difference = np.abs(ours - theirs)
  if relative:
    difference = difference / np.abs(theirs)
  print(
    f'check: {what}: largest {"relative " * relative}difference '
    f'{difference.max():.1e}, tolerance {tolerance:.0e}',
    flush=True,
  )
  if not difference.max() <= tolerance:
    raise InputError(
      f'{what} differ by {difference.max():.3g}, more than '
      f'{tolerance:g}; their times cannot be compared.'
    )


def show(title, headers, rows):
  """Prints an aligned Markdown table; numbers get three digits."""
  text = lambda x: (
    f'{x:,.3g}'
    if isinstance(x, float) and abs(x) < 1e3
    else (f'{x:,.0f}' if isinstance(x, float | int | np.integer) else str(x))
  )
  cells = [headers, *[[text(x) for x in row] for row in rows]]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  cells.insert(1, ['-' * width for width in widths])
  print(f'\n{title}\n')
  for row in cells:
    line = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    print('| ' + ' | '.join(line) + ' |')
  print(flush=True)


def show_rates(title, unit, work, seconds):
  """A table of units of work per second; returns {side: median rate}.

  Args:
    title: of the table.
    unit: what is counted.
    work: {side: amount [repeats] of each timed call}.
    seconds: as `interleave` returns them.
  """
  rates = {name: work[name] / seconds[name] for name in seconds}
  rows = [
    (
      name,
      len(rates[name]),
      float(np.min(seconds[name])),
      float(np.median(seconds[name])),
      float(np.max(rates[name])),
      float(np.median(rates[name])),
    )
    for name in rates
  ]
  show(
    title,
    ['side', 'calls', 'least s', 'median s', f'most {unit}/s', f'median {unit}/s'],
    rows,
  )
  return {name: float(np.median(rate)) for name, rate in rates.items()}


def show_machine():
  """One line: processor, threads, date and versions."""
  versions = ', '.join(
    f'{name} {importlib.metadata.version(name)}'
    for name in ('jax', 'torch', 'transformers', 'peft')
  )
  print(
    f'{processor()}, {THREADS} threads, {datetime.date.today()}, Python '
    f'{platform.python_version()}, {versions}',
    flush=True,
  )


def processor():
  path = Path('/proc/cpuinfo')
  lines = path.read_text().splitlines() if path.exists() else []
  names = [x.split(':')[1].strip() for x in lines if x.startswith('model name')]
  return names[0] if names else platform.processor()


def forget_peak():
  """Starts `peak_memory` anew, where the kernel allows it."""
  path = Path('/proc/self/clear_refs')
  if path.exists():
    path.write_text('5')


def peak_memory():
  """Most resident memory of this process so far (see forget_peak), in GB."""
  path = Path('/proc/self/status')
  if path.exists():
    line = next(x for x in path.read_text().splitlines() if 'VmHWM' in x)
    return int(line.split()[1]) / 1e6
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def best_rate(multiply, n):
  """Most GFLOP/s of some calls that multiply two n x n matrices."""
  multiply()
  return 2e-9 * n**3 / min(once(multiply) for _ in range(5))


def xla_limit(dtype, n=3072):
  """GFLOP/s of a large matrix product in XLA, results in float32."""
  x = jnp.ones((n, n), dtype)
  multiply = jax.jit(
    lambda x: jax.lax.dot_general(
      x, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
  )
  return best_rate(lambda: multiply(x).block_until_ready(), n)
