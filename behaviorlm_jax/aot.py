"""What a step will cost on a machine that nobody has rented yet.

  python -m behaviorlm_jax.aot --config=configs/stage1.py \
    --config.model.address=random://llama-3.1-8b --topology=v5e:4x4

compiles the training step of the config's first stage and the scoring pass for
a TPU topology, from shapes alone, and prints what they take per chip. `libtpu`
must be installed, in an environment of its own; without --topology the devices
of this machine are compiled for. --search tries meshes, micro-batches and what
is saved for the backward pass, and lists what fits, best first.
"""

import itertools
import os
import re
import tempfile
import time

import jax
from absl import app
from absl import flags
from absl import logging
from jax.experimental import topologies
from ml_collections import config_flags

from behaviorlm_jax import cli
from behaviorlm_jax import config as config_lib
from behaviorlm_jax import stages
from behaviorlm_jax import workdir as workdir_lib
from behaviorlm_jax.ahead import programs
from behaviorlm_jax.ahead import roofline
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.train import sharding

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file.')
_TOPOLOGY = flags.DEFINE_string(
    'topology', '', 'As v5e:4x4; empty: the devices of this machine.')
_SLICES = flags.DEFINE_integer(
    'slices', 1, 'How many such slices; they divide mesh.data.', 1)
_SEARCH = flags.DEFINE_bool('search', False, 'Tries meshes, micro-batches and '
                            'remat policies of the training step.')
flags.mark_flag_as_required('config')

# The e-commerce log of configs/quickstart.py, where a config names none.
_LOG = {
    'data.events': ('pypi://retentioneering==5.2.4/'
                    'retentioneering/datasets/ecom.csv.gz'),
    'data.columns.user': 'user_id', 'data.columns.time': 'timestamp',
    'data.columns.behavior': 'event'}
_GIB = 2**30


def devices_of(topology, slices):
  """The devices of a TPU topology, or InputError with what is wrong."""
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # There is no TPU to ask,
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # or to share.
  try:
    return topologies.get_topology_desc(topology, 'tpu',
                                        num_slices=slices).devices
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise InputError(
        f'--topology={topology} cannot be compiled for '
        f'({str(error).strip().splitlines()[0]}); install libtpu, in an '
        'environment of its own, and give a topology such as v5e:4x4.'
    ) from error


def prepare(config):
  """The config with what only a run of it would settle."""
  config = config.copy_and_resolve_references()
  if not config.data.events:
    logging.info('data.events is empty: the log of configs/quickstart.py '
                 'stands in for names and prompts.')
    config.update_from_flattened_dict(_LOG)
  if config.data.conversations == 'self':
    config.data.conversations = ''
  if not config.stages:
    raise InputError('stages is (): this config trains nothing.')
  config = config_lib.of_stage(config, config.stages[0])
  config.difficulty.score = 'random'  # What it draws has the same shapes.
  config.plan.selection, config.plan.noise_cut = 'weighted', 0.0
  if config.model.dtype == 'auto':
    config.model.dtype = 'bfloat16'
  if config.score.dtype == 'auto':
    config.score.dtype = config.model.dtype
  config_lib.check(config)
  return config


def compiled(lowered):
  """(jax.stages.Compiled or None, seconds, bytes that were too many)."""
  begin = time.monotonic()
  try:
    program, over = lowered.compile(), 0
  except jax.errors.JaxRuntimeError as error:
    program, over = None, _excess(str(error))
    if over is None:
      raise
  return program, time.monotonic() - begin, over


def _excess(message):
  """Bytes by which a program exceeds the memory, of XLA's refusal, or None."""
  match = re.search(r'Exceeded (?:hbm|\w+) capacity by ([\d.]+)([KMG])',
                    message)
  if 'RESOURCE_EXHAUSTED' not in message or not match:
    return None
  return float(match[1]) * 2 ** {'K': 10, 'M': 20, 'G': 30}[match[2]]


def candidates(config, count):
  """Configs with other meshes, micro-batches and remat policies."""
  sizes = [n for n in range(1, count + 1) if count % n == 0]
  for tensor, fsdp in itertools.product(sizes, sizes):
    if tensor * fsdp > count or count % (tensor * fsdp) or tensor > 8:
      continue
    for accumulate, remat in itertools.product(
        (1, 2, 4, 8), ('products', 'full')):
      other = config.copy_and_resolve_references()
      other.mesh.update({'data': count // (tensor * fsdp), 'fsdp': fsdp,
                         'tensor': tensor})
      other.train.accumulate = accumulate
      other.model.remat = remat
      yield other


def study(config, devices, folder, scoring=True):
  """Rows of (program, roofline.Cost) of a config on some devices."""
  layout = sharding.make_layout(config, devices)
  this = stages.open_run(config, workdir_lib.make(folder), layout,
                         shapes_only=True)
  plan = programs.make_plan(this)
  program, seconds, over = compiled(programs.training(this, plan))
  done, needed = programs.training_flops(this, plan)
  yield 'training step', roofline.Cost.of(program, layout, seconds, over, done,
                                          needed)
  if scoring:
    lowered, prompts = programs.scoring(this)
    program, seconds, over = compiled(lowered)
    yield (f'scoring pass of {prompts} prompts',
           roofline.Cost.of(program, layout, seconds, over))


def main(argv):
  cli.run(argv, _main)


def _main():
  config = prepare(_CONFIG.value)
  devices = (devices_of(_TOPOLOGY.value, _SLICES.value) if _TOPOLOGY.value
             else jax.devices())
  with tempfile.TemporaryDirectory() as folder:
    if not _SEARCH.value:
      for name, cost in study(config, devices, folder):
        print(f'\n{name} on {len(devices)} x {cost.chip}\n{cost.table()}')
      return
    print(search(config, devices, folder))


def search(config, devices, folder):
  """A Markdown table of what fits, best first, and a count of the rest."""
  found, refused = [], 0
  for other in candidates(config, len(devices)):
    try:
      (_, cost), = study(other, devices, folder, scoring=False)
    except InputError as error:  # A mesh that divides no batch.
      logging.info('%s: %s', _settings(other), error)
      continue
    if not cost.fits:
      refused += 1
      continue
    found.append((cost.seconds, _settings(other), cost))
  lines = [f'| {settings} | {cost.peak / _GIB:.2f} | {seconds:.3f} | '
           f'{cost.mfu(seconds):.1%} | {cost.binds} |'
           for seconds, settings, cost in sorted(found, key=lambda x: x[:2])]
  return '\n'.join([
      '| mesh, micro-batches, remat | peak, GiB | roofline s | MFU | binds |',
      '| --- | --- | --- | --- | --- |', *lines, '',
      f'{refused} more do not fit.'])


def _settings(config):
  mesh = ' x '.join(str(config.mesh[axis]) for axis in sharding.AXES)
  return f'{mesh}, {config.train.accumulate}, {config.model.remat}'


if __name__ == '__main__':
  app.run(main, flags_parser=cli.parser(_CONFIG))
