"""Reads what XLA compiled: traffic of a device, loops counted fully.

The text of a compiled module is the only thing that says which collectives a
step does, after all of XLA's passes. A program whose loops cannot be counted is
refused rather than counted once.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

import numpy as np

_WIDTH = {
  'pred': 1,
  's8': 1,
  'u8': 1,
  's16': 2,
  'u16': 2,
  'bf16': 2,
  'f16': 2,
  's32': 4,
  'u32': 4,
  'f32': 4,
  's64': 8,
  'u64': 8,
  'f64': 8,
  's4': 0.5,
  'u4': 0.5,
}  # Bytes of an element; what is not here (tokens, opaque) has none.
# Type, sizes, layout: bf16[8,128]{1,0:T(8,128)S(1)}, S(1) another memory.
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')
_HEAD = re.compile(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_NAMES = re.compile(r'%([\w.\-]+)')
COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'recv',
)  # What libtpu makes of one between slices.
_FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'after-all',
  'partition-id',
  'replica-id',
  'copy-done',
  'iota',
}


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  shape: str
  code: str
  operands: tuple[str, ...]
  rest: str  # Attributes, as text.
  text: str  # Between the operation's parentheses.

  def attribute(self, name: str) -> str | None:
    """The computation that an attribute names, or None."""
    found = re.search(rf'\b{name}=%?([\w.\-]+)', self.rest)
    return found and found[1]


Computation = dict[str, Instruction]  # By name, in their order.


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind of collective, over all its runs in one step.

  Attributes:
    kind: of COLLECTIVES.
    groups: text of its replica groups; '' of permutes, which go round rings in
      both directions, and of recv.
    received: bytes that a device receives, at least.
    runs: how often.
  """

  kind: str
  groups: str
  received: float
  runs: int


class Module:
  """A compiled module of one device's program."""

  def __init__(self, text: str):
    self.computations, self.entry = _parse(text)

  def collectives(self) -> list[Collective]:
    """Its Collectives, those of one kind and group together."""
    # One that runs beside other work stands in each of these fusions, perhaps
    # in a loop inside its own, always with its channel.
    channels = {}
    for instruction, runs, _ in self._walk(self.entry, 1):
      kind = _collective(instruction)
      if kind:
        channel = re.search(r'channel_id=(\d+)', instruction.rest)
        key = kind, channel[1] if channel else instruction.name
        if key not in channels or runs < channels[key][1]:
          channels[key] = instruction, runs
    found = collections.defaultdict(lambda: [0.0, 0])
    for (kind, _), (instruction, runs) in channels.items():
      groups = re.search(
        r'replica_groups=(.*?)(?:, (?!device_ids)\w+=|$)', instruction.rest
      )
      groups = groups[1] if groups and kind != 'collective-permute' else ''
      size = group_size(groups) if groups else 1
      one = found[kind, groups]
      one[0] += runs * self._received(instruction, kind, size)
      one[1] += runs
    return [Collective(*key, *value) for key, value in sorted(found.items())]

  def traffic(self) -> float:
    """Bytes that a device moves to and from its main memory, about.

    Each operation, or fusion of some, reads its operands and writes its result;
    of an array of which it takes a slice, the slice. What XLA keeps in other
    memory spaces is free.
    """
    own = sum(
      runs * self._moved(instruction, scope)
      for instruction, runs, scope in self._walk(self.entry, 1, False)
    )
    # What arrives is written, and about as much is read to be sent.
    return own + sum(2 * one.received for one in self.collectives())

  def _walk(
    self, name: str, runs: int, fusions: bool = True
  ) -> Iterator[tuple[Instruction, int, Computation]]:
    """(instruction, runs, its computation) of all that is executed."""
    scope = self.computations[name]
    for instruction in scope.values():
      if instruction.code == 'while':
        count = runs * self.trips(instruction, scope)
        yield from self._walk(instruction.attribute('body'), count, fusions)
      elif instruction.code in ('call', 'async-start') or (
        fusions and instruction.code == 'fusion'
      ):
        called = instruction.attribute('to_apply') or instruction.attribute('calls')
        yield from self._walk(called, runs, fusions)
      elif instruction.code == 'conditional':
        for branch in re.findall(
          r'%([\w.\-]+)',
          ' '.join(
            re.findall(
              r'(?:true_computation|false_computation|branch_computations)='
              r'(\{[^}]*\}|%[\w.\-]+)',
              instruction.rest,
            )
          ),
        ):
          yield from self._walk(branch, runs, fusions)
      if instruction.code != 'while':
        yield instruction, runs, scope

  def trips(self, loop: Instruction, scope: Computation) -> int:
    """How often a while loop runs that counts from zero by one."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(known[1])
    condition = self.computations[loop.attribute('condition')]
    # i < n is the whole condition of what scan and fori_loop make.
    compare = next((i for i in condition.values() if i.code == 'compare'), None)
    if compare and 'direction=LT' in compare.rest:
      bound = self._constant(compare.operands[1], condition, loop, scope)
      if bound is not None:
        return bound
    raise ValueError(f'the loop {loop.name} cannot be counted.')

  def _constant(
    self,
    name: str,
    inside: Computation,
    loop: Instruction | None,
    scope: Computation | None,
  ) -> int | None:
    """An integer of a loop's condition, which may come in with its tuple."""
    one = inside[name]
    if one.code == 'constant':
      return int(one.text)
    if one.code in ('copy', 'bitcast'):
      return self._constant(one.operands[0], inside, loop, scope)
    if one.code != 'get-tuple-element' or loop is None:
      return None
    index = int(re.search(r'index=(\d+)', one.rest)[1])
    # The bound comes in from outside: there it must be a constant in a tuple.
    start = scope[loop.operands[0]]
    if start.code != 'tuple':
      return None
    return self._constant(start.operands[index], scope, None, None)

  def _received(self, instruction: Instruction, kind: str, size: int) -> float:
    """Bytes into one device in one run, by the best ring of `size`."""
    result = _bytes(_result(instruction), True)
    share = (size - 1) / size  # A device has its own part already.
    if kind == 'all-reduce':
      return 2 * share * result  # A reduce-scatter, then an all-gather.
    if kind == 'reduce-scatter':  # The result is one part.
      return (size - 1) * result
    return share * result if kind in ('all-gather', 'all-to-all') else result

  def _moved(self, instruction: Instruction, scope: Computation) -> float:
    code = instruction.code
    if (
      code in _FREE
      or code.endswith('-done')
      or code in ('call', 'conditional', 'async-start', 'send')
      or (_collective(instruction))
    ):
      return 0
    written = _bytes(instruction.shape)
    if code == 'copy-start':  # Source and destination.
      return written
    if code == 'slice-start':
      slices = _ARRAY.search(instruction.shape[_closing(instruction.shape, 1) :])
      return _bytes(slices[0], True) + _bytes(slices[0])
    # Of what is sliced no more is read than comes out; a broadcast reads little.
    if code in ('dynamic-slice', 'gather', 'slice', 'broadcast'):
      return written if code == 'broadcast' else 2 * written
    if code == 'dynamic-update-slice':
      # In place: the update is read and written, the rest stays where it is.
      return 2 * _bytes(scope[instruction.operands[1]].shape)
    sizes = [
      _bytes(scope[name].shape) for name in instruction.operands if name in scope
    ]
    if code == 'fusion':
      inner = self.computations[instruction.attribute('calls')]
      # A fusion may slice what it is given, or update a part of it.
      sizes = [
        size and min(size, self._read(inner, place)) for place, size in enumerate(sizes)
      ]
      written = written and min(written, self._written(inner))
    return written + sum(sizes)

  def _read(self, inner: Computation, place: int) -> float:
    """Bytes that a fusion takes of its operand at `place`."""
    parameter = next(
      i for i in inner.values() if i.code == 'parameter' and i.text == str(place)
    )
    return self._taken(inner, parameter)

  def _taken(self, inner: Computation, one: Instruction) -> float:
    total = 0
    for user in inner.values():
      if one.name not in user.operands:
        continue
      if user.code == 'dynamic-slice' and user.operands[0] == one.name:
        total += _bytes(user.shape, True)
      elif user.code == 'bitcast':  # The same bytes under another name.
        total += self._taken(inner, user)
      elif user.code == 'fusion':
        called = self.computations[user.attribute('calls')]
        total += sum(
          self._read(called, place)
          for place, name in enumerate(user.operands)
          if name == one.name
        )
      elif not (
        (user.code == 'dynamic-update-slice' and user.operands[0] == one.name)
        or user.code == 'tuple'
        or _collective(user)
      ):
        return _bytes(one.shape, True)  # Used whole: no more than that is read.
    return total

  def _written(self, inner: Computation) -> float:
    return self._made(inner, list(inner.values())[-1])  # The root is last.

  def _made(self, inner: Computation, one: Instruction) -> float:
    if one.code == 'parameter' or _collective(one):  # Passed on.
      return 0
    if one.code == 'dynamic-update-slice':
      return _bytes(inner[one.operands[1]].shape, True)
    if one.code == 'bitcast' and one.operands[0] in inner:
      return self._made(inner, inner[one.operands[0]])
    if one.code == 'tuple':
      return sum(self._made(inner, inner[name]) for name in one.operands)
    if one.code == 'fusion':
      return self._written(self.computations[one.attribute('calls')])
    return _bytes(one.shape, True)


def _collective(instruction: Instruction) -> str | None:
  """Which of COLLECTIVES an instruction is, or None."""
  kind = instruction.code.removesuffix('-start')
  return kind if kind in COLLECTIVES else None


def group_size(groups: str) -> int:
  """How many devices of a collective talk with each other."""
  return len(members(groups)[0])


_IOTA = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'
_OF_MESH = re.compile(rf'mesh\[(.*?)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}$')
_OF_IOTA = re.compile(rf'\[([\d,]+)\]<={_IOTA}$')


def members(groups: str) -> list[list[int]]:
  """Devices of each group, by their place in the mesh: lists of ints.

  XLA writes them out, {{0,1},{2,3}}; as an iota, [2,2]<=[2,2]T(1,0); or by axes
  of a mesh, mesh['a'=2,'b'=2] {'b'}, whose devices may be such an iota.
  """
  if match := _OF_MESH.match(groups):
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", match[1]), strict=True)
    ids = _iota(match[2] or ','.join(sizes), match[3])
    ids = ids.reshape(list(map(int, sizes)))
    if ':' not in match[4]:  # A part of an axis.
      axes = [names.index(name) for name in re.findall(r"'(\w+)'", match[4])]
      width = int(np.prod([ids.shape[axis] for axis in axes]))
      ids = np.moveaxis(ids, axes, range(-len(axes), 0))
      return ids.reshape(-1, width).tolist()
  elif match := _OF_IOTA.match(groups):
    shape = list(map(int, match[1].split(',')))
    return _iota(match[2], match[3]).reshape(shape).tolist()
  elif lists := re.findall(r'\{([\d,]+)\}', groups):
    return [list(map(int, one.split(','))) for one in lists]
  raise ValueError(f'replica groups {groups!r} cannot be read.')


def _iota(sizes: str, order: str | None) -> np.ndarray:
  """0, 1, ... of texts such as '2,4' and '1,0': sizes and a transposition."""
  sizes = list(map(int, sizes.split(',')))
  ids = np.arange(np.prod(sizes)).reshape(sizes)
  return ids.transpose(list(map(int, order.split(',')))) if order else ids


def _result(instruction: Instruction) -> str:
  """The shape of what arrives, of a tuple that holds more."""
  if instruction.code == 'recv':
    return _ARRAY.search(instruction.shape)[0]
  if not instruction.code.endswith('-start'):
    return instruction.shape
  arrays = [
    m for m in _ARRAY.finditer(instruction.shape) if m[1] not in ('u32', 's32') or m[2]
  ]
  # Of (operands, results) the first of the second half.
  return arrays[len(arrays) // 2][0] if arrays else instruction.shape


def _bytes(shape: str, everywhere: bool = False) -> float:
  """Of an array or tuple; in main memory alone, unless `everywhere`."""
  total = 0
  for kind, sizes, layout in _ARRAY.findall(shape):
    elsewhere = re.search(r'S\([1-9]', layout)  # S(0), main memory, is not written.
    if kind not in _WIDTH or (elsewhere and not everywhere):
      continue
    size = _WIDTH[kind]
    for n in filter(None, sizes.split(',')):
      size *= int(n)
    total += size
  return total


def _parse(text: str) -> tuple[dict[str, Computation], str | None]:
  """{computation: {name: Instruction}}, and the name of the entry."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    # Computations begin at the margin, their instructions are indented.
    if line[:1] not in ('', ' ', '}') and (match := _HEAD.match(line)):
      current = computations[match[1]] = {}
      if line.startswith('ENTRY'):
        entry = match[1]
    elif current is not None and ' = ' in line:
      one = _instruction(line.strip().removeprefix('ROOT '))
      current[one.name] = one
  return computations, entry


def _instruction(line: str) -> Instruction:
  name, _, rest = line.partition(' = ')
  # A tuple's shape holds blanks, an array's does not.
  end = _closing(rest, 0) + 1 if rest[0] == '(' else rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  begin = rest.index('(')
  end = _closing(rest, begin)
  inside = rest[begin + 1 : end]
  return Instruction(
    name.lstrip('%'),
    shape,
    rest[:begin],
    tuple(_NAMES.findall(inside)),
    rest[end + 1 :],
    inside,
  )


def _closing(text: str, begin: int) -> int:
  """Index of the parenthesis that closes the one at `begin`."""
  depth = 0
  for place in range(begin, len(text)):
    depth += {'(': 1, ')': -1}.get(text[place], 0)
    if not depth:
      return place
  raise ValueError(f'no end of {text[begin : begin + 40]!r}')
