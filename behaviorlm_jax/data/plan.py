"""The curriculum as a table: which sample stands in which row of which step.

A plan is made once at the start of a stage from (seed, samples, groups,
difficulty, mix shares, lengths), written as Parquet and never changed. Batch s
of training is a pure function of (plan, s); that is why a run resumes exactly
from its step number and why any number of hosts reads the same global batch.

One record is one row of the batch: segments packed side by side, each a window
of one user's events or a conversation. Segments come from endless streams,
whose every prefix keeps its promise:

  * `tile`: every eligible event is a target once per epoch;
  * `spread`: behaviors come at their rates, to within one draw: equal rates
    take turns;
  * `mix`: conversations make up a fixed share of the answer tokens.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from ml_collections import ConfigDict
from pyarrow import parquet

from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.data.conversations import Conversation
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import files

WINDOW, CONVERSATION = 'window', 'conversation'
_SEGMENT = pa.struct(
  [
    ('kind', pa.string()),
    ('start', pa.int64()),  # First event, or index of the conversation.
    ('stop', pa.int64()),  # End of the events.
    ('targets', pa.list_(pa.int64())),  # Events that are learned.
    ('weights', pa.list_(pa.float32())),  # Of each target in the loss.
    ('length', pa.int32()),  # Tokens.
    ('answers', pa.int32()),  # Answer tokens.
  ]
)


class NameTree(Protocol):
  """What is asked of a score.label_tree.Tree, whose room builds on this one."""

  edge_nodes: np.ndarray
  edge_tokens: np.ndarray
  node_edges: np.ndarray
  paths: np.ndarray

  def path(self, answer: int) -> np.ndarray: ...

  def choices(self, answer: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Segment:
  """What one segment of a row holds; the fields are those of the table."""

  kind: str
  start: int
  stop: int
  targets: tuple
  weights: tuple
  length: int
  answers: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """Rows of segments, `batch` rows a step, in the order of training."""

  rows: list  # Of lists of dicts with the fields of Segment.
  answers: int  # Answer tokens of the fullest row, rounded up.
  made_from: str  # Fingerprint of everything that decided the plan.


def check_lengths(prompts: prompts_lib.Prompts, config: ConfigDict) -> None:
  """Refuses a train.length that cannot hold every sample with its context."""
  events, context = prompts.events, config.plan.min_context
  worst, longest = None, 0
  for split in ('train', 'validation'):
    for samples in samples_lib.of_split(events, split, config):
      base = samples[0] - context
      ends = prompts.line_ends(base, samples[-1] + 1)
      lines = ends[samples + 1 - base] - ends[samples - context - base]
      if lines.max() > longest:
        worst, longest = samples[np.argmax(lines)], lines.max()
  if worst is None:
    return
  needed = longest + len(prompts.header)
  if needed > config.train.length:
    name = events.behaviors[events.behavior[worst]].name
    raise InputError(
      f'train.length is {config.train.length} tokens, but an event of user '
      f'{events.users[events.user[worst]]!r} ({name!r}) with '
      f'plan.min_context = {context} events before it needs {needed}; raise '
      'train.length.'
    )


class Windows:
  """Makes window segments that fit a row, from targets and their context."""

  def __init__(
    self, prompts: prompts_lib.Prompts, config: ConfigDict, tree: NameTree | None = None
  ):
    """`tree`: see loader.Assembler."""
    self.prompts = prompts
    self.events = prompts.events
    self.answer_lengths = prompts.answer_lengths[: self.events.known]
    if tree:
      # Names that it leaves out are never targets.
      inside = range(len(tree.paths))
      self.answer_lengths = self.answer_lengths.copy()
      self.answer_lengths[inside] = [len(tree.choices(b)) for b in inside]
    self.plan = config.plan
    self.length = config.train.length
    self.history = config.data.history
    self.rules = [samples_lib.rule(split, config) for split in events_lib.SPLITS]

  def make(
    self, start: int, targets: Sequence[int], weights: Sequence[float]
  ) -> Segment:
    """A segment of events from `start` to the last target.

    Context that does not fit is cut from the front down to min_context, then
    targets from the end; what is cut is left for the caller to see in
    `targets`.
    """
    targets, weights = list(targets), list(weights)
    begin, header = start, len(self.prompts.header)
    ends = self.prompts.line_ends(start, targets[-1] + 1)
    length = lambda start, stop: int(ends[stop - begin] - ends[start - begin]) + header
    latest = targets[0] - self.plan.min_context
    while length(start, targets[-1] + 1) > self.length:
      if start < latest:
        start += 1
      elif len(targets) > 1:
        targets.pop()
        weights.pop()
      else:
        raise InputError(
          f'train.length is {self.length} tokens, but event {targets[0]} '
          f'with {self.plan.min_context} events of context needs '
          f'{length(start, targets[-1] + 1)}; raise train.length.'
        )
    answers = self.answer_lengths[self.events.behavior[targets]].sum()
    stop = targets[-1] + 1
    return Segment(
      WINDOW,
      int(start),
      int(stop),
      tuple(map(int, targets)),
      # As float32, so that a plan that is read back is the same.
      tuple(np.asarray(weights, np.float32).tolist()),
      length(start, stop),
      int(answers),
    )

  def tiles(self, positions: np.ndarray, rng: np.random.Generator) -> Iterator[Segment]:
    """Cuts users' samples into windows that hold each exactly once.

    Args:
      positions: int64, sorted, those of a user together.
      rng: numpy Generator.

    Returns:
      Of each window the first target's position, and how many samples from
      there on are asked for (`make` leaves out what does not fit, and the next
      window begins with it): int64 and int32, in the order of the positions.
    """
    size, per_row = len(positions), self.plan.targets_per_row
    cuts = np.flatnonzero(np.diff(self.events.user[positions])) + 1
    i, end = np.append(0, cuts), np.append(cuts, size)
    limit = np.full(len(i), per_row)
    # A random first cut gives a target another context in every epoch; those
    # that fit one window see their whole past instead.
    many = end - i > per_row
    limit[many] = rng.integers(1, per_row + 1, many.sum())
    base = positions[0] - self.plan.min_context
    ends = self.prompts.line_ends(base, positions[-1] + 1)
    after = ends[positions + 1 - base]
    begins, sizes = [], []
    while len(i):  # The next window of every user that has samples left.
      start = self.first_event(positions[i])
      stop = np.minimum(i + limit, np.searchsorted(positions, start + self.plan.window))
      asked = np.maximum(i + 1, np.minimum(stop, end))
      begins.append(i)
      sizes.append(asked - i)
      # With the least context it can have, a window may still be too long.
      latest = positions[i] - self.plan.min_context
      room = self.length - len(self.prompts.header) + ends[latest - base]
      fitting = np.searchsorted(after, room, 'right')
      stop = np.maximum(i + 1, np.minimum(asked, fitting))
      left = stop < end
      i, end = stop[left], end[left]
      limit = np.full(len(i), per_row)
    begins, sizes = np.concatenate(begins), np.concatenate(sizes)
    order = np.argsort(begins)
    return positions[begins[order]], sizes[order].astype(np.int32)

  def first_event(self, target: int) -> int:
    """Where the windows of `tiles` that begin with these targets start."""
    context = max(self.plan.min_context, self.plan.window - self.plan.targets_per_row)
    return np.maximum(self.events.first[target], target - min(context, self.history))

  def draw(self, position: int, weight_of: np.ndarray | None = None) -> Segment:
    """A window that ends with a drawn sample; `weight_of` adds neighbours."""
    size = min(self.history, self.plan.window - 1)
    start = max(self.events.first[position], position - size)
    targets, weights = [position], [1.0]
    if weight_of is not None:
      near = np.arange(start + self.plan.min_context, position)
      near = self.rules[self.events.split[position]].among(self.events, near)
      targets = [*near, position]
      weights = [*weight_of[self.events.behavior[near]], 1.0]
      if self.prompts.window_length(start, position + 1) > self.length:
        targets, weights = [position], [1.0]  # Keep the drawn one whole.
    return self.make(start, targets, weights)


def tile(
  windows: Windows, samples: samples_lib.Samples, rng: np.random.Generator
) -> Iterator[Segment]:
  """Endless windows over `samples`; every epoch is a new tiling, shuffled.

  Of an epoch only where its windows begin is kept: a plan takes some of them.

  Args:
    windows: maker of segments.
    samples: samples.Samples.
    rng: numpy Generator.
  """
  while True:
    tiles = [windows.tiles(positions, rng) for positions in samples]
    samples_lib.require(tiles, 'stage a or one')
    first, size = map(np.concatenate, zip(*tiles, strict=True))
    del tiles
    for i in rng.permutation(len(first)):
      targets = samples.run(int(first[i]), size[i], windows.plan.window)
      yield windows.make(
        int(windows.first_event(targets[0])), targets, [1.0] * len(targets)
      )


def spread(
  windows: Windows,
  samples: dict[int, np.ndarray],
  rates: dict[int, float],
  rng: np.random.Generator,
  weight_of: np.ndarray | None = None,
) -> Iterator[Segment]:
  """Endless windows that end with samples, each behavior evenly spread.

  A behavior of rate m comes m times an epoch, the j-th time at (j + u) / m of
  the epoch with u uniform. Its samples come in shuffled rounds of their own.

  Args:
    windows: maker of segments.
    samples: {behavior: positions}.
    rates: {behavior: int}, windows an epoch; behaviors of no rate or without
      samples are left out.
    rng: numpy Generator.
    weight_of: float [known] or None, see Windows.draw.
  """
  rates = {b: m for b, m in rates.items() if m and len(samples.get(b, ()))}
  samples_lib.require(rates, 'stage b')
  queues = {b: _reshuffled(samples[b], rng) for b in rates}
  owner = np.repeat(list(rates), list(rates.values()))
  while True:
    times = [(np.arange(m) + rng.random(m)) / m for m in rates.values()]
    for b in owner[np.argsort(np.concatenate(times))]:
      yield windows.draw(int(next(queues[int(b)])), weight_of)


def _reshuffled(items, rng):
  while True:
    yield from items[rng.permutation(len(items))]


def mix(
  stream: Iterator[Segment],
  conversations: Sequence[Conversation],
  share: float,
  rng: np.random.Generator,
) -> Iterator[Segment]:
  """Adds conversations as `share` of the answer tokens of every prefix."""
  if not share:
    yield from stream
    return
  order = _reshuffled(np.arange(len(conversations)), rng)
  auxiliary = total = 0
  while True:
    if auxiliary < share * total:
      i = int(next(order))
      answers = int(conversations[i].answers.sum())
      yield Segment(CONVERSATION, i, i, (), (), len(conversations[i].tokens), answers)
      auxiliary += answers
    else:
      segment = next(stream)
      answers = segment.answers
      yield segment
    total += answers


_OPEN_ROWS = 64  # Fills 95 % of rows of check-ins; one open row filled 79 %.


def pack(stream: Iterator[Segment], rows: int, length: int) -> list[list[dict]]:
  """Fills `rows` rows of at most `length` tokens from an endless stream.

  Best fit among the rows begun last: a segment joins the fullest one that has
  room, so it stands at most _OPEN_ROWS rows early.
  """
  packed, used = [], []
  for segment in stream:
    fitting = [
      i
      for i in range(max(0, len(used) - _OPEN_ROWS), len(used))
      if used[i] + segment.length <= length
    ]
    if fitting:
      row = max(fitting, key=lambda i: used[i])
    elif len(packed) == rows:
      return packed
    else:
      row = len(packed)
      packed.append([])
      used.append(0)
    packed[row].append(segment)
    used[row] += segment.length


def take(
  stream: Iterator[Segment], config: ConfigDict, steps: int, made_from: str
) -> Plan:
  """The plan of `steps` steps from an endless stream of segments."""
  rows = pack(stream, steps * config.train.batch, config.train.length)
  most = max(sum(s.answers for s in row) for row in rows)
  return Plan(
    [[dataclasses.asdict(s) for s in row] for row in rows], _rounded(most), made_from
  )


def _rounded(count):
  """Shapes in multiples of 16 keep compilations few across plans."""
  return -(-int(count) // 16) * 16


def most_answers(plan: Plan, batch: int, accumulate: int, groups: int) -> int:
  """Answer tokens of the fullest group of rows, rounded up.

  A step's rows go to micro-batches in turn (row i to i % accumulate), those of
  a micro-batch to `groups` devices one after the other.
  """
  answers = np.array([sum(s['answers'] for s in row) for row in plan.rows])
  rows = batch // accumulate // groups
  parts = answers.reshape(-1, groups, rows, accumulate).sum(axis=2)
  return _rounded(parts.max())


def taught(plan: Plan, events: events_lib.Events) -> np.ndarray:
  """Weights of each behavior's targets in a plan, summed: float64 [known]."""
  targets, weights = [], []
  for segment in itertools.chain.from_iterable(plan.rows):
    targets += segment['targets']
    weights += segment['weights']
  behaviors = events.behavior[np.array(targets, np.int64)]
  return np.bincount(behaviors, weights, events.known)


def summary(plan: Plan, length: int) -> str:
  """One line on what the plan teaches, and how full its rows are."""
  segments = list(itertools.chain.from_iterable(plan.rows))
  targets = [t for segment in segments for t in segment['targets']]
  used = sum(segment['length'] for segment in segments)
  return (
    f'{len(plan.rows):,} rows, {used / (len(plan.rows) * length):.1%} '
    f'full; {len(targets):,} targets, {len(set(targets)):,} of them '
    'different events'
  )


def save(path: Path, plan: Plan, batch: int) -> None:
  """Writes a plan; columns step, row and segments."""
  index = np.arange(len(plan.rows))
  table = pa.table(
    {
      'step': pa.array(index // batch, pa.int32()),
      'row': pa.array(index % batch, pa.int32()),
      'segments': pa.array(plan.rows, pa.list_(_SEGMENT)),
    }
  )
  facts = {
    'made_from': plan.made_from,
    'answers': str(plan.answers),
    'plan_hash': content_hash(plan),
  }
  files.write_parquet(path, table, facts)


def content_hash(plan: Plan) -> str:
  """SHA-256 of the rows, the same on every machine."""
  digest = hashlib.sha256(plan.made_from.encode())
  for segment in itertools.chain.from_iterable(plan.rows):
    digest.update(json.dumps(segment, sort_keys=True).encode())
  return digest.hexdigest()


def load(path: Path, made_from: str) -> Plan:
  """Reads a plan, refusing one that other inputs made."""
  table = parquet.read_table(path)
  facts = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
  if facts.get('made_from') != made_from:
    raise InputError(
      f'{path} was made from other events, another model, adapter or config '
      f'(fingerprint {facts.get("made_from", "none")[:12]}, now '
      f'{made_from[:12]}); delete it or use another --workdir.'
    )
  return Plan(table['segments'].to_pylist(), int(facts['answers']), made_from)
