"""What a step needs and what the compiled step does: FLOPs and a profile.

`step_flops` is the closed form of what a LoRA step cannot do without. What XLA
really multiplies (padding and recomputation too) is read from the optimized
HLO text, in which every matrix product and every loop's trip count stands.
"""

import collections
import importlib.util
import math
import re
import tempfile
from pathlib import Path

import common
import jax

from behaviorlm_jax.model import decoder, families

_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)')
_COMPUTATION = re.compile(r'(?:ENTRY )?%([\w.\-]+) \(.*\{$')
_SHAPE = re.compile(r'\w+\[([\d,]*)\]')
_CONTAINERS = ('while', 'call', 'conditional')
_MOVES = {
  'parameter',
  'constant',
  'bitcast',
  'copy',
  'transpose',
  'reshape',
  'slice',
  'dynamic-slice',
  'dynamic-update-slice',
  'concatenate',
  'broadcast',
  'gather',
  'pad',
  'convert',
  'tuple',
  'iota',
  'reverse',
  'get-tuple-element',
  'copy-start',
  'copy-done',
}
# Arithmetic on indices and bounds that accompanies moves.
_INDEX = {'add', 'compare', 'select', 'clamp', 'and', 'minimum', 'maximum', 'subtract'}


def step_flops(config, rank, tokens, answers, pairs, targets=decoder.PROJECTIONS):
  """FLOPs that a LoRA step needs, by part; no recomputation, no padding.

  Per weight of a frozen projection and token: 2 forward and 2 for the gradient
  of the input. Per LoRA weight and token: 6, its own gradient too. The head,
  frozen, per weight and answer: 4. Attention (scores and weighted values, each
  2 per pair, head and channel): 4 forward and 8 backward. Small operations are
  left out, as usual.

  Args:
    config: families.DecoderConfig.
    rank: of the adapter.
    tokens: real tokens.
    answers: answer tokens.
    pairs: (query, key) pairs that may look at each other: n (n + 1) / 2 of
      every segment of n tokens.
    targets: projections with an adapter.
  """
  shapes = families.parameter_shapes(config)
  kernels = {name: shapes[f'layers.{name}'] for name in decoder.PROJECTIONS}
  weights = sum(math.prod(shape) for shape in kernels.values())
  low = sum(kernels[name][0] * rank * sum(kernels[name][1:]) for name in targets)
  channels = config.layers * config.heads * config.head_dim
  return {
    'frozen projections': 4 * weights * tokens,
    'LoRA': 6 * low * tokens,
    'head': 4 * config.vocab * config.embed * answers,
    'attention': 12 * channels * pairs,
  }


def causal_pairs(segments):
  """Pairs of a batch's segments int [B, L], where 0 is padding."""
  total = 0
  for row in segments:
    for size in collections.Counter(row[row > 0].tolist()).values():
      total += size * (size + 1) // 2
  return total


def _computations(text):
  """{computation: [(name, shape, opcode, rest of the line)]} of HLO text."""
  result, current = {}, None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = result[match[1]] = []
      if line.startswith('ENTRY'):
        result[''] = current
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append(match.groups())
  return result


def _size(shape):
  return [int(n) for n in _SHAPE.search(shape)[1].split(',') if n]


def _called(rest):
  """Computations that an instruction runs, with how often each does."""
  trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
  names = re.findall(r'(?:calls|body|to_apply)=%([\w.\-]+)', rest)
  return [(name, int(trips[1]) if trips else 1) for name in names]


def product_flops(text):
  """FLOPs of all matrix products of a compiled program's HLO text."""
  computations = _computations(text)

  def count(name):
    shapes = {item[0]: item[1] for item in computations[name]}
    total = 0
    for _, shape, opcode, rest in computations[name]:
      if opcode == 'dot':
        left = _size(shapes[re.match(r'.*?%([\w.\-]+)', rest)[1]])
        axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', rest)[1]
        summed = math.prod(left[int(axis)] for axis in axes.split(','))
        total += 2 * math.prod(_size(shape)) * summed
      total += sum(n * count(inner) for inner, n in _called(rest))
    return total

  return count('')


def kinds(text):
  """{instruction: kind of work} of a compiled program's HLO text."""
  computations = _computations(text)
  result = {}
  for instructions in computations.values():
    for name, _, opcode, rest in instructions:
      inside = [(opcode, rest)]
      if opcode == 'fusion':
        inside = [
          item[2:] for inner, _ in _called(rest) for item in computations[inner]
        ]
      if opcode not in _CONTAINERS:
        result[name] = _kind(inside)
  return result


def _kind(inside):
  """Kind of work of some (opcode, rest of the line)."""
  opcodes = {opcode for opcode, _ in inside}
  if 'dot' in opcodes:
    batched = any(
      'lhs_batch_dims' in rest for opcode, rest in inside if opcode == 'dot'
    )
    return 'products of attention' if batched else 'products with weights'
  if 'custom-call' in opcodes:
    return 'library calls'
  if opcodes <= _MOVES or (
    opcodes <= _MOVES | _INDEX
    and opcodes & {'dynamic-slice', 'dynamic-update-slice', 'gather'}
  ):
    return 'copies, transposes, conversions'
  return 'elementwise and reductions'


def profile(text, call):
  """Seconds of all threads by kind of work while `call` runs once."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      call()
    (path,) = Path(folder).rglob('*.xplane.pb')
    data = jax.profiler.ProfileData.from_file(str(path))
  of, seconds = kinds(text), collections.Counter()
  for plane in data.planes:
    for line in plane.lines:
      for event in line.events:
        if event.name in of:
          seconds[of[event.name]] += event.duration_ns / 1e9
  return seconds


def show_profile(text, call):
  """A table of where the time of `call`, the program of `text`, goes."""
  if importlib.util.find_spec('libtpu'):
    print('no profile: on CPU it crashes beside the package libtpu.')
    return
  seconds = common.once(call)
  whole = seconds * common.THREADS
  spent = profile(text, call)
  spent['waiting, scheduling, the host'] = max(0, whole - sum(spent.values()))
  common.show(
    f'Where a step of {seconds:.2f} s on {common.THREADS} threads goes',
    ['kind of work', 'thread seconds', 'share'],
    [(kind, float(s), f'{s / whole:.1%}') for kind, s in spent.most_common()],
  )
