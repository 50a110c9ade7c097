"""What a compiled program takes of a chip, and the least time that needs.

The roofline says that a step takes no less than its products at peak speed, its
bytes at the memory's bandwidth, or those that arrive from other chips over all
links that lead there, each as if nothing else happened. Real steps take longer:
the sum of the three, if nothing overlapped, and more where a part runs below
its peak.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
from absl import logging

from behaviorlm_jax.cost import chips, hlo
from behaviorlm_jax.train import sharding

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one run of a program, per chip; bytes, operations, seconds.

  Attributes:
    chip: name.
    known: chips.Chip, or None where its datasheet is not in the table.
    arguments, temporaries, peak: bytes of memory; 0 where it was refused.
    over: bytes by which the compiler found it too large; 0: it fits.
    flops: operations of its products; None: not counted.
    needed: the same without what is computed twice.
    traffic: bytes to and from memory; None: its program cannot be read.
    collectives: (hlo.Collective, seconds or None) of each.
    compile_seconds: how long the compiler took.
  """

  chip: str
  known: chips.Chip | None
  arguments: int = 0
  temporaries: int = 0
  peak: int = 0
  over: float = 0
  flops: float | None = None
  needed: float | None = None
  traffic: float | None = None
  collectives: tuple[tuple[hlo.Collective, float | None], ...] = ()
  compile_seconds: float = 0

  @classmethod
  def of(
    cls,
    program: jax.stages.Compiled | None,
    layout: sharding.Layout,
    seconds: float,
    over: float,
    flops: float | None = None,
    needed: float | None = None,
  ) -> Self:
    """From jax.stages.Compiled, or None if that was refused by `over` bytes."""
    devices = list(layout.mesh.devices.flat)
    kind = devices[0].device_kind
    # Of a CPU or GPU only the bytes are told: no datasheet, no roofline.
    chip, count = chips.CHIPS.get(kind), len(devices)
    shared = dict(
      chip=chip.name if chip else kind,
      known=chip,
      over=over,
      compile_seconds=seconds,
      # They are those of all devices; XLA's program is that of one.
      flops=flops and flops / count,
      needed=needed and needed / count,
    )
    if program is None:
      return cls(**shared)
    memory = program.memory_analysis()
    module = _module(program)
    if module:
      shared |= dict(
        traffic=module.traffic(),
        collectives=tuple(
          (one, chip and _seconds(one, devices, chip)) for one in module.collectives()
        ),
      )
    arguments = memory.argument_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    peak = (
      arguments
      + temporaries
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes  # Outputs in donated arguments' place.
      + memory.generated_code_size_in_bytes
    )
    return cls(arguments=arguments, temporaries=temporaries, peak=peak, **shared)

  @property
  def fits(self) -> bool:
    return not self.over and not (self.known and self.peak > self.known.memory)

  @property
  def times(self) -> dict[str, float]:
    """{resource: seconds}, of those that are known."""
    found = {}
    if self.traffic is not None:
      # Each resource as if nothing else happened, so their largest is a floor.
      found = {
        'memory': self.traffic / self.known.bandwidth,
        'interconnect': sum(time for _, time in self.collectives),
      }
    if self.flops:
      found['products'] = self.flops / self.known.flops
    return found

  @property
  def seconds(self) -> float:
    return max(self.times.values())

  @property
  def apart(self) -> float:
    """Seconds if nothing overlapped."""
    return sum(self.times.values())

  @property
  def binds(self) -> str:
    return max(self.times, key=self.times.get)

  def mfu(self, seconds: float) -> float:
    """Share of the peak that what is needed makes of so many seconds."""
    return self.needed / self.known.flops / seconds

  def table(self) -> str:
    """Lines of text."""
    lines = [f'compiled in {self.compile_seconds:.1f} s']
    if self.over:
      return '\n'.join(
        [*lines, f'does not fit: too large by {self.over / _GIB:.2f} GiB']
      )
    gib = lambda size: f'{size / _GIB:8.2f} GiB'
    lines += [
      f'arguments     {gib(self.arguments)}',
      f'temporaries   {gib(self.temporaries)}',
      f'peak          {gib(self.peak)}',
    ]
    if self.known:
      left = self.known.memory - self.peak
      lines[-1] += (
        f' of {self.known.memory / _GIB:.2f}: '
        + ('fits' if left >= 0 else 'does not fit')
        + f', {abs(left) / _GIB:.2f} GiB '
        + ('to spare' if left >= 0 else 'too large')
      )
    if self.flops:
      lines.append(
        f'products      {self.flops / 1e12:8.2f} TFLOP, '
        f'{self.needed / 1e12:.2f} of them needed'
      )
    if self.traffic is None:
      lines.append('memory moved, and bytes between chips: not known')
    else:
      lines.append(f'memory moved  {gib(self.traffic)}')
    for one, seconds in self.collectives:
      took = '' if seconds is None else f', {seconds * 1e3:.1f} ms'
      lines.append(
        f'{one.kind:18}{one.received / _GIB:8.3f} GiB in {one.runs} '
        f'among {_among(one)}{took}'
      )
    if self.known and self.times:
      parts = ', '.join(
        f'{name} {time * 1e3:.1f} ms' for name, time in self.times.items()
      )
      lines.append(
        f'roofline      {self.seconds * 1e3:.1f} ms ({parts}): {self.binds} binds'
      )
      if self.needed:
        lines.append(
          f'MFU of that   {self.mfu(self.seconds):.1%}; '
          f'{self.mfu(self.apart):.1%} if nothing overlapped'
        )
    return '\n'.join(lines)


def _module(program: jax.stages.Compiled) -> hlo.Module | None:
  """hlo.Module of jax.stages.Compiled, or None.

  jaxlib reads back what libtpu wrote, and may be the older of the two: of
  programs for v5p, jaxlib 0.10.2 does not know libtpu 0.0.52's async-update.
  """
  try:
    return hlo.Module(program.as_text())
  except jax.errors.JaxRuntimeError as error:
    logging.warning(
      'what was compiled cannot be read (%s); its traffic is not known.',
      str(error).splitlines()[0],
    )
    return None


def _among(one: hlo.Collective) -> int | str:
  if one.groups:
    return hlo.group_size(one.groups)
  return 'slices' if one.kind == 'recv' else 'neighbors'


def _seconds(
  one: hlo.Collective, devices: Sequence[jax.Device], chip: chips.Chip
) -> float:
  """The least seconds that a Collective's bytes take to arrive."""
  if one.kind == 'recv':
    return one.received / chip.network  # Between slices no link leads.
  if not one.groups:  # A ring's two directions.
    return one.received / (2 * chip.link)
  # One group stands for all: a mesh divides evenly, and they are alike.
  group = [devices[i] for i in hlo.members(one.groups)[0]]
  return one.received / (chip.link * chips.links(chip, group))
