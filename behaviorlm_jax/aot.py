"""What a step will cost on a machine that nobody has rented yet.

  python -m behaviorlm_jax.aot --config=configs/stage1.py \
    --config.model.address=random://llama-3.1-8b --topology=v5e:4x4

compiles the training step of the config's first stage and what scores rows for
a TPU topology, from shapes alone, and prints what they take per chip. That
needs the extra `tpu` (libtpu), in an environment of its own; without --topology
the devices of this machine are compiled for. --search tries meshes,
micro-batches and what is saved for the backward pass, and lists what fits, best
first.
"""

import tempfile

import jax
from absl import app, flags
from ml_collections import config_flags

from behaviorlm_jax import cli
from behaviorlm_jax.cost import study

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file.')
_TOPOLOGY = flags.DEFINE_string(
  'topology', '', 'As v5e:4x4; empty: the devices of this machine.'
)
_SLICES = flags.DEFINE_integer(
  'slices', 1, 'How many such slices; they divide mesh.data.', 1
)
_SEARCH = flags.DEFINE_bool(
  'search',
  False,
  'Tries meshes, micro-batches and remat policies of the training step.',
)
flags.mark_flag_as_required('config')


def main(argv: list[str]) -> None:
  cli.run_command(argv, _main)


def _main():
  devices = (
    study.devices_of(_TOPOLOGY.value, _SLICES.value)
    if _TOPOLOGY.value
    else jax.devices()
  )
  config = study.settle(_CONFIG.value, devices[0].platform)
  with tempfile.TemporaryDirectory() as folder:
    if _SEARCH.value:
      print(study.search(config, devices, folder))
      return
    for name, cost in study.costs(config, devices, folder):
      print(f'\n{name} on {len(devices)} x {cost.chip}\n{cost.table()}')


if __name__ == '__main__':
  app.run(main, flags_parser=cli.parser(_CONFIG))
