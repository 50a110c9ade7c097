"""What steps of large models take on TPU slices: the tables of docs/tpu.md.

  python benchmarks/tpu.py > tables.md

compiles ahead of time (cost.study), so it needs libtpu and no TPU. Rows
are of 2,048 tokens, one for each chip in each of four micro-batches; weights
are divided among all chips.
"""

import datetime
import importlib.metadata
import sys
import tempfile

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.cost import study

MODELS = {'llama-3.1-8b': 'products', 'llama-3.1-70b': 'full'}
TOPOLOGIES = ('v5e:4x4', 'v5e:8x8', 'v5p:4x4x4', 'v6e:4x4')
_GIB = 2**30
_HEAD = (
  'model',
  'slice',
  'program',
  'arguments',
  'temporaries',
  'peak, GiB',
  'to spare',
  'TFLOP',
  'memory moved, GiB',
  'from other chips, GiB',
  'products, s',
  'memory, s',
  'interconnect, s',
  'MFU',
  'MFU apart',
  'binds',
  'compiled, s',
)


def config_of(model, chips):
  """The config of one row of the table."""
  config = config_lib.default()
  config.stages = ('a',)
  config.a.content = 'anchors'  # As in docs/tpu.md.
  config.model.address = f'random://{model}'
  config.model.remat = MODELS[model]
  config.mesh.update({'data': 1, 'fsdp': chips})
  config.train.update({'batch': 4 * chips, 'accumulate': 4, 'length': 2048})
  config.a.steps = 2
  return study.settle(config)


def line(model, topology, program, cost):
  """A row of the table."""
  first = [model, topology, program]
  if cost.over:
    return [
      *first,
      f'does not fit: {cost.over / _GIB:.2f} GiB too large',
      *['-'] * (len(_HEAD) - 5),
      f'{cost.compile_seconds:.0f}',
    ]
  gib = lambda size: f'{size / _GIB:.2f}'
  traffic = received = binds = '?'
  if cost.traffic is not None:
    traffic = f'{cost.traffic / _GIB:.0f}'
    received = gib(sum(one.received for one, _ in cost.collectives))
    binds = cost.binds
  mfu = ['-'] * 2
  if cost.needed:
    mfu = [
      f'{cost.mfu(seconds):.0%}' if cost.traffic is not None else '?'
      for seconds in (cost.seconds, cost.apart)
    ]
  times = [
    f'{cost.times[name]:.3f}' if name in cost.times else '-'
    for name in ('products', 'memory', 'interconnect')
  ]
  return [
    *first,
    gib(cost.arguments),
    gib(cost.temporaries),
    gib(cost.peak),
    gib(cost.known.memory - cost.peak),
    f'{cost.flops / 1e12:.0f}' if cost.flops else '-',
    traffic,
    received,
    *times,
    *mfu,
    binds,
    f'{cost.compile_seconds:.0f}',
  ]


def main():
  versions = ', '.join(
    f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'libtpu')
  )
  print(f'{datetime.date.today()}, {versions}.\n')
  for row in (_HEAD, ['---'] * len(_HEAD)):
    print('| ' + ' | '.join(row) + ' |')
  for model in MODELS:
    for topology in TOPOLOGIES:
      devices = study.devices_of(topology, 1)
      with tempfile.TemporaryDirectory() as folder:
        config = config_of(model, len(devices))
        for program, cost in study.costs(config, devices, folder):
          row = line(model, topology, program, cost)
          print('| ' + ' | '.join(row) + ' |', flush=True)
          print(model, topology, cost.table(), sep='\n', file=sys.stderr)


if __name__ == '__main__':
  main()
