"""What a compiled program takes of a chip, and the least time that needs.

The roofline says that a step takes no less than its products at peak speed, its
bytes at the memory's bandwidth, or those that arrive from other chips over all
links that lead there, each as if nothing else happened. Real steps take longer:
the sum of the three, if nothing overlapped, and more where a part runs below
its peak.
"""

import dataclasses
import re
import time
from collections.abc import Sequence

import jax
from absl import logging

from behaviorlm_jax.cost import chips, hlo

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one run of a program, per chip; bytes, operations, seconds."""

  chip: str
  known: chips.Chip | None  # None: its datasheet is not in the table.
  # Bytes of memory; 0 where it was refused, for so many bytes over what there is.
  arguments: int = 0
  temporaries: int = 0
  peak: int = 0
  over: float = 0
  # Of its products, and without what is computed twice; None: not counted.
  flops: float | None = None
  needed: float | None = None
  traffic: float | None = None  # To and from memory; None: it cannot be read.
  # Each with its seconds, None where the chip is not known.
  collectives: tuple[tuple[hlo.Collective, float | None], ...] = ()
  compile_seconds: float = 0

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
      lines.append(f'does not fit: too large by {self.over / _GIB:.2f} GiB')
      return '\n'.join(lines)
    lines += [
      f'arguments     {_gib(self.arguments)}',
      f'temporaries   {_gib(self.temporaries)}',
      f'peak          {_gib(self.peak)}{self._room()}',
    ]
    if self.flops:
      lines.append(
        f'products      {self.flops / 1e12:8.2f} TFLOP, '
        f'{self.needed / 1e12:.2f} of them needed'
      )
    if self.traffic is None:
      lines.append('memory moved, and bytes between chips: not known')
    else:
      lines.append(f'memory moved  {_gib(self.traffic)}')
    for one, seconds in self.collectives:
      took = '' if seconds is None else f', {seconds * 1e3:.1f} ms'
      lines.append(
        f'{one.kind:18}{one.received / _GIB:8.3f} GiB in {one.runs} '
        f'among {_among(one)}{took}'
      )
    if self.known and self.times:
      parts = [f'{name} {time * 1e3:.1f} ms' for name, time in self.times.items()]
      lines.append(
        f'roofline      {self.seconds * 1e3:.1f} ms ({", ".join(parts)}): '
        f'{self.binds} binds'
      )
      if self.needed:
        lines.append(
          f'MFU of that   {self.mfu(self.seconds):.1%}; '
          f'{self.mfu(self.apart):.1%} if nothing overlapped'
        )
    return '\n'.join(lines)

  def _room(self) -> str:
    if not self.known:
      return ''
    memory = self.known.memory
    left, fit = ('to spare', 'fits') if self.fits else ('too large', 'does not fit')
    return (
      f' of {memory / _GIB:.2f}: {fit}, {abs(memory - self.peak) / _GIB:.2f} GiB {left}'
    )


def measure(
  lowered: jax.stages.Lowered,
  devices: Sequence[jax.Device],
  flops: int | None = None,
  needed: int | None = None,
) -> Cost:
  """Compiles a program for the devices of its mesh.

  `flops`, `needed`: operations of its products over all devices, and of those
  that are not computed twice.
  """
  begin = time.monotonic()
  try:
    program, over = lowered.compile(), 0
  except jax.errors.JaxRuntimeError as error:
    program, over = None, _excess(str(error))
    if over is None:
      raise
  kind = devices[0].device_kind
  # Of a CPU or GPU only the bytes are told: no datasheet, no roofline.
  chip = chips.CHIPS.get(kind)
  cost = Cost(
    chip.name if chip else kind,
    chip,
    over=over,
    flops=flops and flops / len(devices),
    needed=needed and needed / len(devices),
    compile_seconds=time.monotonic() - begin,
  )
  return (
    dataclasses.replace(cost, **_taken(program, devices, chip)) if program else cost
  )


def _excess(message: str) -> float | None:
  """Bytes by which a program exceeds the memory, of XLA's refusal, or None."""
  size = r'\(([\d.]+)([KMGT])\)'
  match = re.search(f'{size} exceeds available HBM {size}', message)
  if not match:
    return None
  units = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  needed, unit, there, its_unit = match.groups()
  return float(needed) * units[unit] - float(there) * units[its_unit]


def _taken(
  program: jax.stages.Compiled, devices: Sequence[jax.Device], chip: chips.Chip | None
) -> dict[str, object]:
  """Fields of Cost: memory and traffic."""
  memory = program.memory_analysis()
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  peak = (
    arguments
    + temporaries
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes  # Outputs in donated arguments' place.
    + memory.generated_code_size_in_bytes
  )
  found = {'arguments': arguments, 'temporaries': temporaries, 'peak': peak}
  if module := _module(program):
    found['traffic'] = module.traffic()
    found['collectives'] = tuple(
      (one, chip and _seconds(one, devices, chip)) for one in module.collectives()
    )
  return found


def _module(program: jax.stages.Compiled) -> hlo.Module | None:
  # jaxlib reads back what libtpu wrote, and may be the older of the two: of
  # programs for v5p, jaxlib 0.10.2 does not know libtpu 0.0.52's async-update.
  try:
    return hlo.Module(program.as_text())
  except jax.errors.JaxRuntimeError as error:
    logging.warning(
      'what was compiled cannot be read (%s); its traffic is not known.',
      str(error).splitlines()[0],
    )
    return None


def _gib(size: float) -> str:
  return f'{size / _GIB:8.2f} GiB'


def _among(one: hlo.Collective) -> int | str:
  if one.groups:
    return hlo.group_size(one.groups)
  return 'slices' if one.kind == 'recv' else 'neighbors'


def _seconds(
  one: hlo.Collective, devices: Sequence[jax.Device], chip: chips.Chip
) -> float:
  """The least that its bytes take to arrive."""
  if one.kind == 'recv':
    return one.received / chip.network  # Between slices no link leads.
  if not one.groups:  # A ring's two directions.
    return one.received / (2 * chip.link)
  # One group stands for all: a mesh divides evenly, and they are alike.
  group = [devices[i] for i in hlo.members(one.groups)[0]]
  return one.received / (chip.link * chips.links(chip, group))
