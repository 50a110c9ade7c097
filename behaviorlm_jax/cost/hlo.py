"""Reads what XLA compiled: traffic of a device, loops counted fully.

The text of a compiled module alone says which collectives a step does, after
all of XLA's passes; jax's own analysis takes the body of a loop once. A program
whose loops cannot be counted is refused rather than counted once.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

# A type and its bits, sizes, layout: bf16[8,128]{1,0:T(8,128)S(1)}, S(1) another
# memory. A pred is a byte; tokens and the like have none.
_ARRAY = re.compile(r'(pred|(?:bf|[fsuc])(\d+)\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_HEAD = re.compile(r'(?:ENTRY )?%([\w.\-]+) \(.*\{$')
_NAMES = re.compile(r'%([\w.\-]+)')
_INSTRUCTION = re.compile(
  r' +(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>.+?) (?P<code>[\w\-]+)'
  r'\((?P<text>[^)]*)\)(?P<rest>.*)'
)
_CALLED = re.compile(
  r'\b(?:condition|body|calls|to_apply|\w+_computations?)=(%[\w.\-]+|\{[^}]*\})'
)
COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'recv',  # What libtpu makes of one between slices.
)
# What runs the computations that it names, once.
_CALLS = ('call', 'async-start', 'conditional')
# What moves nothing itself, beside collectives and the ends of what was started.
_FREE = (
  *_CALLS,
  *('parameter', 'constant', 'iota', 'partition-id', 'replica-id'),
  *('tuple', 'get-tuple-element', 'bitcast', 'after-all', 'send'),
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  shape: str
  code: str
  text: str  # Between the operation's parentheses.
  rest: str  # Attributes, as text.
  operands: list[str]

  @property
  def called(self) -> list[str]:
    """Computations; of a loop its condition and its body."""
    return _NAMES.findall(' '.join(_CALLED.findall(self.rest)))

  @property
  def collective(self) -> str | None:
    """Which of COLLECTIVES it is."""
    kind = self.code.removesuffix('-start')
    return kind if kind in COLLECTIVES else None


Computation = dict[str, Instruction]  # By name, in their order: the root is last.


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind of collective, over all its runs in one step."""

  kind: str
  # Text of its replica groups; '' of permutes, which go round rings in both
  # directions, and of recv.
  groups: str
  received: float  # Bytes into a device, at least.
  runs: int


class Module:
  """A compiled module of one device's program."""

  def __init__(self, text: str):
    self.computations, self.entry = _parse(text)

  def collectives(self) -> list[Collective]:
    """Those of one kind and group together."""
    # One that runs beside other work stands in each of these fusions, perhaps
    # in a loop inside its own, always with its channel.
    channels = {}
    for one, runs, _ in self._walk(self.entry, 1, (*_CALLS, 'fusion')):
      if one.collective:
        channel = re.search(r'channel_id=(\d+)', one.rest)
        key = one.collective, channel[1] if channel else one.name
        if key not in channels or runs < channels[key][1]:
          channels[key] = one, runs
    received, times = collections.Counter(), collections.Counter()
    for one, runs in channels.values():
      key = one.collective, _groups(one)
      received[key] += runs * _received(one)
      times[key] += runs
    return [Collective(*key, received[key], times[key]) for key in sorted(times)]

  def traffic(self) -> float:
    """Bytes that a device moves to and from its main memory, about.

    Each operation, or fusion of some, reads its operands and writes its result;
    of an array of which it takes a slice, the slice. What XLA keeps in other
    memory spaces is free.
    """
    own = sum(
      runs * self._moved(one, scope)
      for one, runs, scope in self._walk(self.entry, 1, _CALLS)
    )
    # What arrives is written, and about as much is read to be sent.
    return own + sum(2 * one.received for one in self.collectives())

  def _walk(
    self, name: str, runs: int, entered: tuple[str, ...]
  ) -> Iterator[tuple[Instruction, int, Computation]]:
    """(instruction, runs, its computation) of all that is executed."""
    scope = self.computations[name]
    for one in scope.values():
      if one.code == 'while':
        _, body = one.called
        yield from self._walk(body, runs * self.trips(one, scope), entered)
        continue
      for called in one.called if one.code in entered else ():
        yield from self._walk(called, runs, entered)
      yield one, runs, scope

  def trips(self, loop: Instruction, scope: Computation) -> int:
    """How often a while loop runs that counts from zero by one."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(known[1])
    condition = self.computations[loop.called[0]]
    # i < n is the whole condition of what scan and fori_loop make.
    compare = next((one for one in condition.values() if one.code == 'compare'), None)
    if compare and 'direction=LT' in compare.rest:
      bound = _origin(condition, compare.operands[1])
      state = scope[loop.operands[0]]
      if bound.code == 'get-tuple-element' and state.code == 'tuple':
        # It comes in from outside: there it must be a constant.
        index = re.search(r'index=(\d+)', bound.rest)
        bound = _origin(scope, state.operands[int(index[1])])
      if bound.code == 'constant':
        return int(bound.text)
    raise ValueError(f'the loop {loop.name} cannot be counted.')

  def _moved(self, one: Instruction, scope: Computation) -> float:
    """Bytes that an instruction reads from main memory and writes to it."""
    if one.code in _FREE or one.code.endswith('-done') or one.collective:
      return 0
    written = _bytes(one.shape)
    read = [_bytes(scope[name].shape) for name in one.operands]
    match one.code:
      case 'copy-start' | 'broadcast':
        # The first's shape has source and destination; the second reads little.
        return written
      case 'dynamic-slice' | 'gather' | 'slice':
        return 2 * written  # No more is read than comes out.
      case 'slice-start':  # ((operands), slice, ...)
        part = _ARRAY.search(one.shape.partition('), ')[2])[0]
        return _bytes(part, True) + _bytes(part)
      case 'dynamic-update-slice':
        # In place: the update is read and written, the rest stays where it is.
        return 2 * read[1]
      case 'fusion':
        # It may slice what it is given, or update a part of it.
        inner = self._inside(one)
        for place, name in enumerate(_parameters(inner)):
          read[place] = min(read[place], self._read(inner, name))
        written = min(written, self._written(inner, list(inner)[-1]))
    return written + sum(read)

  def _inside(self, fusion: Instruction) -> Computation:
    (called,) = fusion.called
    return self.computations[called]

  def _read(self, inner: Computation, name: str) -> float:
    """Bytes that a fusion takes of what has this name in it."""
    total = 0
    for user in inner.values():
      if name not in user.operands:
        continue
      sliced = user.operands[0] == name
      if user.code == 'dynamic-slice' and sliced:
        total += _bytes(user.shape, True)
      elif user.code == 'bitcast':  # The same bytes under another name.
        total += self._read(inner, user.name)
      elif user.code == 'fusion':
        called = self._inside(user)
        given = zip(_parameters(called), user.operands, strict=True)
        total += sum(self._read(called, own) for own, known in given if known == name)
      elif not (
        (user.code == 'dynamic-update-slice' and sliced)
        or user.code == 'tuple'
        or user.collective
      ):
        return _bytes(inner[name].shape, True)  # Used whole: no more can be read.
    return total

  def _written(self, inner: Computation, name: str) -> float:
    """Bytes of what has this name in a fusion, or of the part that is new."""
    one = inner[name]
    if one.code == 'parameter' or one.collective:  # Passed on.
      return 0
    match one.code:
      case 'dynamic-update-slice':
        return _bytes(inner[one.operands[1]].shape, True)
      case 'bitcast' | 'tuple':
        return sum(self._written(inner, operand) for operand in one.operands)
      case 'fusion':
        called = self._inside(one)
        return self._written(called, list(called)[-1])
    return _bytes(one.shape, True)


def _parameters(computation: Computation) -> list[str]:
  """Names, in the order of the operands that they stand for."""
  found = [one for one in computation.values() if one.code == 'parameter']
  return [one.name for one in sorted(found, key=lambda one: int(one.text))]


def _origin(scope: Computation, name: str) -> Instruction:
  """What is copied under this name."""
  one = scope[name]
  return _origin(scope, one.operands[0]) if one.code in ('copy', 'bitcast') else one


def _groups(one: Instruction) -> str:
  found = re.search(r'replica_groups=(.*?)(?:, (?!device_ids)\w+=|$)', one.rest)
  return found[1] if found and one.collective != 'collective-permute' else ''


def _received(one: Instruction) -> float:
  """Bytes into one device in one run of a collective, by the best ring."""
  groups = _groups(one)
  size = group_size(groups) if groups else 1
  share = (size - 1) / size  # A device has its own part already.
  factors = {
    'all-gather': share,
    'all-to-all': share,
    'all-reduce': 2 * share,  # A reduce-scatter, then an all-gather.
    'reduce-scatter': size - 1,  # The result is one part.
  }
  return factors.get(one.collective, 1) * _bytes(_result(one), True)


def group_size(groups: str) -> int:
  """How many devices of a collective talk with each other."""
  return len(members(groups)[0])


_IOTA = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'
_OF_MESH = re.compile(rf'mesh\[(.*?)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}$')
_OF_IOTA = re.compile(rf'\[([\d,]+)\]<={_IOTA}$')


def members(groups: str) -> list[list[int]]:
  """Devices of each group, by their place in the mesh.

  XLA writes them out, {{0,1},{2,3}}; as an iota, [2,2]<=[2,2]T(1,0); or by axes
  of a mesh, mesh['a'=2,'b'=2] {'b'}, whose devices may be such an iota.
  """
  if match := _OF_MESH.match(groups):
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", match[1]), strict=True)
    ids = _iota(match[2] or ','.join(sizes), match[3]).reshape([*map(int, sizes)])
    if ':' not in match[4]:  # A part of an axis.
      axes = [names.index(name) for name in re.findall(r"'(\w+)'", match[4])]
      width = math.prod(ids.shape[axis] for axis in axes)
      ids = np.moveaxis(ids, axes, range(-len(axes), 0))
      return ids.reshape(-1, width).tolist()
  elif match := _OF_IOTA.match(groups):
    return _iota(match[2], match[3]).reshape(_integers(match[1])).tolist()
  elif lists := re.findall(r'\{([\d,]+)\}', groups):
    return [_integers(one) for one in lists]
  raise ValueError(f'replica groups {groups!r} cannot be read.')


def _iota(sizes: str, order: str | None) -> np.ndarray:
  """0, 1, ... of texts such as '2,4' and '1,0': sizes and a transposition."""
  sizes = _integers(sizes)
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return ids.transpose(_integers(order)) if order else ids


def _integers(text: str) -> list[int]:
  return [int(number) for number in text.split(',') if number]


def _result(one: Instruction) -> str:
  """The shape of what arrives, of a tuple that holds more."""
  if one.code == 'recv':
    return _ARRAY.search(one.shape)[0]
  if not one.code.endswith('-start'):
    return one.shape
  # Plain integers are contexts. Of (operands, results) the first of the second half.
  arrays = [
    array[0]
    for array in _ARRAY.finditer(one.shape)
    if array[1] not in ('u32', 's32') or array[3]
  ]
  return arrays[len(arrays) // 2] if arrays else one.shape


def _bytes(shape: str, everywhere: bool = False) -> float:
  """Of an array or tuple; in main memory alone, unless `everywhere`."""
  return sum(
    int(bits or 8) / 8 * math.prod(_integers(sizes))
    for _, bits, sizes, layout in _ARRAY.findall(shape)
    # S(0), main memory, is not written.
    if everywhere or not re.search(r'S\([1-9]', layout)
  )


def _parse(text: str) -> tuple[dict[str, Computation], str | None]:
  """{name: Computation}, and the name of the entry."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    # Computations begin at the margin, their instructions are indented.
    if head := _HEAD.match(line):
      current = computations[head[1]] = {}
      if line.startswith('ENTRY'):
        entry = head[1]
    elif current is not None and (one := _INSTRUCTION.match(line)):
      operands = _NAMES.findall(one['text'])
      current[one['name']] = Instruction(**one.groupdict(), operands=operands)
  return computations, entry
