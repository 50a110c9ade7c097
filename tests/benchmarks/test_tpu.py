"""The table of docs/tpu.md has a row for whatever comes of a program."""

import pytest

from behaviorlm_jax.cost import chips, roofline
from benchmarks import tpu

CHIP = chips.CHIPS['TPU v5 lite']


@pytest.mark.parametrize(
  'fields, expected',
  [
    (
      {'over': 2**31},
      {'peak, GiB': '-', 'arguments': 'does not fit: 2.00 GiB too large'},
    ),
    (
      {'traffic': 819e9, 'peak': 2**30},
      {'MFU': '-', 'to spare': '14.75', 'memory, s': '1.000'},
    ),
    ({'flops': 197e12, 'needed': 98.5e12}, {'MFU': '?', 'binds': '?'}),
    (
      {'traffic': 819e9, 'flops': 197e12, 'needed': 98.5e12},
      {'MFU': '50%', 'MFU apart': '25%', 'TFLOP': '197'},
    ),
  ],
)
def test_a_row_has_a_cell_for_every_head(fields, expected):
  cost = roofline.Cost('TPU v5e', CHIP, **fields)
  row = tpu.line('llama-3.1-8b', 'v5e:4x4', 'training step', cost)
  assert len(row) == len(tpu._HEAD)
  found = dict(zip(tpu._HEAD, row, strict=True))
  assert expected.items() <= found.items()


def test_every_chip_has_a_row_of_each_micro_batch():
  config = tpu.config_of('llama-3.1-8b', 16)
  rows = config.train.batch // config.train.accumulate
  assert rows == config.mesh.fsdp * config.mesh.data == 16
