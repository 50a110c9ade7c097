"""Chips and how they are wired: the datasheet numbers of a roofline.

Sources: Google Cloud's pages "TPU v5e", "TPU v5p" and "TPU v6e" (peak of
bfloat16, memory and its bandwidth, interconnect per chip, which is here divided
by its number of links and taken in one direction, and data-center network, per
chip). What of its memory a program may use is what libtpu 0.0.42 names where it
refuses one.
"""

import dataclasses
from collections.abc import Sequence

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a chip can do, per second."""

  name: str
  flops: float  # bfloat16 operations.
  memory: float  # Bytes that a program may use.
  bandwidth: float  # Bytes to and from memory.
  link: float  # Bytes of one link, one way.
  ring: int  # How long a side of a slice is whose ends are wired together.
  network: float  # Bytes between slices, one way.


# By jax's device_kind.
CHIPS = {
  'TPU v5 lite': Chip('TPU v5e', 197e12, 15.75 * 2**30, 819e9, 50e9, 16, 3.1e9),
  'TPU v5': Chip('TPU v5p', 459e12, 95.74 * 2**30, 2765e9, 100e9, 4, 6.25e9),
  'TPU v6 lite': Chip('TPU v6e', 918e12, 31.25 * 2**30, 1640e9, 100e9, 16, 12.5e9),
}


def links(chip: Chip, group: Sequence[jax.Device]) -> int:
  """Over how many links a chip of a group receives, at best.

  Each dimension of the torus along which the group spreads brings two, or one
  where its side is open, or closed by the slices' network alone: then the chip
  at the end has but one neighbor.
  """
  sides = [len(set(places)) for places in zip(*(d.coords for d in group), strict=True)]
  # A chip with two cores is one place of a torus.
  return sum(2 if side >= chip.ring else 1 for side in sides if side > 1) or 1
