"""The curriculum as a table: which sample stands in which row of which step.

A plan is made once at the start of a stage from (seed, samples, groups,
difficulty, mix shares, lengths), written as Parquet and never changed. Batch s
of training is a pure function of (plan, s); that is why a run resumes exactly
from its step number and why any number of hosts reads the same global batch.

One record is one row of the batch: segments packed side by side, each a window
of one user's events or a conversation. Segments come from endless streams,
whose every prefix keeps its promise:

  * `tile`: every sample is a target once per epoch;
  * `spread`: behaviors come at their rates, to within one draw: equal rates
    take turns;
  * `mix`: conversations make up a fixed share of the answer tokens.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.data.conversations import Conversation
from behaviorlm_jax.data.events import Events
from behaviorlm_jax.data.prompts import Prompts
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import files

WINDOW, CONVERSATION = 'window', 'conversation'
_SEGMENT = pa.struct(
  {
    'kind': pa.string(),
    'start': pa.int64(),
    'stop': pa.int64(),
    'targets': pa.list_(pa.int64()),
    'weights': pa.list_(pa.float32()),
    'length': pa.int32(),
    'answers': pa.int32(),
  }
)


@dataclasses.dataclass(frozen=True)
class Segment:
  """What one segment of a row holds."""

  kind: str
  start: int  # First event, or index of the conversation.
  stop: int  # End of the events.
  targets: list[int]  # Events that are learned.
  weights: list[float]  # Of each target in the loss.
  length: int  # Tokens.
  answers: int  # Answer tokens.


@dataclasses.dataclass(frozen=True)
class Plan:
  """Rows of segments, as many as a batch has for every step, in order."""

  rows: list[list[Segment]]
  answers: int  # Answer tokens of the fullest row, rounded up.
  made_from: str  # Fingerprint of everything that decided the plan.

  def segments(self) -> Iterator[Segment]:
    return itertools.chain.from_iterable(self.rows)


class NameTree(Protocol):
  """What is asked of a score.label_tree.Tree, whose room builds on this one."""

  edge_nodes: np.ndarray
  edge_tokens: np.ndarray
  node_edges: np.ndarray
  paths: np.ndarray

  def path(self, answer: int) -> np.ndarray: ...

  def choices(self, answer: int) -> np.ndarray: ...


def check_lengths(prompts: Prompts, min_context: int, length: int) -> None:
  """Refuses rows of a `length` that cannot hold every sample with its context."""
  events, worst, longest = prompts.events, None, 0
  for split in ('train', 'validation'):
    for samples in samples_lib.of_split(events, split, min_context):
      needed = prompts.window_lengths(samples - min_context, samples + 1)
      if needed.max() > longest:
        worst, longest = samples[np.argmax(needed)], needed.max()
  if longest > length:
    name = events.behaviors[events.behavior[worst]].name
    raise InputError(
      f'train.length is {length} tokens, but an event of user '
      f'{events.users[events.user[worst]]!r} ({name!r}) with '
      f'plan.min_context = {min_context} events before it needs {longest}; raise '
      'train.length.'
    )


# Windows of events.


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
  """Makes window segments that fit a row, from samples and their context."""

  prompts: Prompts
  samples: samples_lib.Samples
  window: int  # Events at most.
  targets_per_row: int  # Of a tile, at most.
  length: int  # Tokens of a row.
  tree: NameTree | None = None  # Of what is taught of each name; None: all of it.

  @functools.cached_property
  def _answer_lengths(self) -> np.ndarray:
    """int64 [known], tokens that are taught of each behavior's answer."""
    lengths = self.prompts.answer_lengths[: self.samples.events.known].copy()
    if self.tree:  # Names that it leaves out are never targets.
      inside = range(len(self.tree.paths))
      lengths[inside] = [len(self.tree.choices(b)) for b in inside]
    return lengths

  def make(
    self, start: int, targets: Sequence[int], weights: Sequence[float]
  ) -> Segment:
    """A segment of events from `start` to the last target that fits.

    What does not fit is cut: context from the front down to min_context, then
    targets from the end.
    """
    targets, room = np.asarray(targets), self.length - len(self.prompts.header)
    ends = self.prompts.line_ends(start, targets[-1] + 1)
    needed = int(np.searchsorted(ends, ends[-1] - room))  # Lines to cut.
    cut = min(needed, targets[0] - self.samples.min_context - start)
    fits = ends[targets + 1 - start] - ends[cut] <= room
    assert fits[0], 'check_lengths has refused such rows'
    targets = targets[fits]
    stop = int(targets[-1]) + 1
    return Segment(
      WINDOW,
      int(start + cut),
      stop,
      targets.tolist(),
      # As float32, so that a plan that is read back is the same.
      np.asarray(weights, np.float32)[fits].tolist(),
      int(ends[stop - start] - ends[cut]) + len(self.prompts.header),
      int(self._answer_lengths[self.samples.events.behavior[targets]].sum()),
    )

  def tiles(
    self, positions: np.ndarray, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    """Cuts users' samples (positions, sorted) into windows that hold each once.

    Returns of each window its first target, int64, and how many samples from
    there on are asked for, int32. `make` leaves out what does not fit, and the
    next window begins with it.
    """
    most, context = self.targets_per_row, self.samples.min_context
    cuts = np.flatnonzero(np.diff(self.samples.events.user[positions])) + 1
    i, end = np.append(0, cuts), np.append(cuts, len(positions))  # Of each user.
    # A random first cut gives a target another context in every epoch; those
    # that fit one window see their whole past instead.
    limit, many = np.full(len(i), most), end - i > most
    limit[many] = rng.integers(1, most + 1, many.sum())
    base = positions[0] - context
    ends = self.prompts.line_ends(base, positions[-1] + 1)
    latest, after = ends[positions - context - base], ends[positions + 1 - base]
    begins, sizes = [], []
    while len(i):  # The next window of every user that has samples left.
      reach = self.first_event(positions[i]) + self.window
      stop = np.minimum(i + limit, np.searchsorted(positions, reach))
      stop = np.minimum(stop, end)
      begins.append(i)
      sizes.append(stop - i)
      # With the least context it can have, a window may still be too long.
      room = self.length - len(self.prompts.header) + latest[i]
      fitting = np.searchsorted(after, room, 'right')
      stop = np.maximum(i + 1, np.minimum(stop, fitting))
      left = stop < end
      i, end, limit = stop[left], end[left], most
    begins, sizes = np.concatenate(begins), np.concatenate(sizes)
    order = np.argsort(begins)
    return positions[begins[order]], sizes[order].astype(np.int32)

  def first_event(self, targets: int | np.ndarray) -> np.ndarray:
    """Where the windows of `tiles` that begin with these targets start."""
    context = max(self.samples.min_context, self.window - self.targets_per_row)
    context = min(context, self.prompts.history)
    return np.maximum(self.samples.events.first[targets], targets - context)

  def draw(self, position: int, weight_of: np.ndarray | None = None) -> Segment:
    """A window that ends with a drawn sample.

    `weight_of`: float [known], with which the samples before it are learned, too.
    """
    size = min(self.prompts.history, self.window - 1)
    start = max(int(self.samples.events.first[position]), position - size)
    if weight_of is not None:
      near = np.arange(start + self.samples.min_context, position)
      near = self.samples.among(near)
      weights = [*weight_of[self.samples.events.behavior[near]], 1.0]
      segment = self.make(start, [*near, position], weights)
      if (segment.start, segment.stop) == (start, position + 1):
        return segment
    # Without neighbours where not all of them fit: the drawn one stays whole.
    return self.make(start, [position], [1.0])


# Streams of segments.


def tile(windows: Windows, rng: np.random.Generator) -> Iterator[Segment]:
  """Endless windows over all samples; every epoch is a new tiling, shuffled."""
  samples = windows.samples
  while True:
    # Only where an epoch's windows begin is kept: a plan takes some of them.
    tiles = [windows.tiles(positions, rng) for positions in samples]
    samples_lib.require(tiles, 'stage a or one')
    first, size = map(np.concatenate, zip(*tiles, strict=True))
    del tiles
    for i in rng.permutation(len(first)):
      targets = samples.run(int(first[i]), size[i], windows.window)
      start = int(windows.first_event(targets[0]))
      yield windows.make(start, targets, np.ones(len(targets)))


def spread(
  windows: Windows,
  samples: dict[int, np.ndarray],
  rates: dict[int, int],
  rng: np.random.Generator,
  weight_of: np.ndarray | None = None,
) -> Iterator[Segment]:
  """Endless windows that end with samples {behavior: positions}, evenly spread.

  A behavior of rate m comes m times an epoch, the j-th time at (j + u) / m of
  the epoch with u uniform; without rate or samples it is left out. Its samples
  come in shuffled rounds of their own. `weight_of`: see Windows.draw.
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
      length = len(conversations[i].tokens)
      segment = Segment(CONVERSATION, i, i, [], [], length, answers)
      auxiliary += answers
    else:
      segment = next(stream)
    total += segment.answers
    yield segment


# The plan of a stage.

_OPEN_ROWS = 64  # Fills 95 % of rows of check-ins; one open row filled 79 %.


def pack(stream: Iterator[Segment], rows: int, length: int) -> list[list[Segment]]:
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


def take(stream: Iterator[Segment], rows: int, length: int, made_from: str) -> Plan:
  """The plan of `rows` rows of `length` tokens from an endless stream."""
  packed = pack(stream, rows, length)
  most = max(sum(segment.answers for segment in row) for row in packed)
  return Plan(packed, _rounded(most), made_from)


def _rounded(count):
  """Shapes in multiples of 16 keep compilations few across plans."""
  return -(-int(count) // 16) * 16


def most_answers(plan: Plan, batch: int, accumulate: int, groups: int) -> int:
  """Answer tokens of the fullest group of rows, rounded up.

  A step's rows go to micro-batches in turn (row i to i % accumulate), those of
  a micro-batch to `groups` devices one after the other.
  """
  answers = np.array([sum(segment.answers for segment in row) for row in plan.rows])
  rows = batch // accumulate // groups
  parts = answers.reshape(-1, groups, rows, accumulate).sum(axis=2)
  return _rounded(parts.max())


def taught(plan: Plan, events: Events) -> np.ndarray:
  """Weights of each behavior's targets in a plan, summed: float64 [known]."""
  targets = [target for segment in plan.segments() for target in segment.targets]
  weights = [weight for segment in plan.segments() for weight in segment.weights]
  return np.bincount(events.behavior[np.array(targets, int)], weights, events.known)


def summary(plan: Plan, length: int) -> str:
  """One line on what the plan teaches, and how full its rows are."""
  targets = [target for segment in plan.segments() for target in segment.targets]
  used = sum(segment.length for segment in plan.segments())
  return (
    f'{len(plan.rows):,} rows, {used / (len(plan.rows) * length):.1%} '
    f'full; {len(targets):,} targets, {len(set(targets)):,} of them '
    'different events'
  )


def content_hash(plan: Plan) -> str:
  """SHA-256 of the rows, the same on every machine."""
  digest = hashlib.sha256(plan.made_from.encode())
  for segment in plan.segments():
    digest.update(json.dumps(vars(segment), sort_keys=True).encode())
  return digest.hexdigest()


def save(path: Path, plan: Plan, batch: int) -> None:
  """Writes a plan; columns step, row and segments."""
  index = np.arange(len(plan.rows))
  rows = [[vars(segment) for segment in row] for row in plan.rows]
  table = pa.table(
    {
      'step': pa.array(index // batch, pa.int32()),
      'row': pa.array(index % batch, pa.int32()),
      'segments': pa.array(rows, pa.list_(_SEGMENT)),
    }
  )
  facts = {
    'made_from': plan.made_from,
    'answers': str(plan.answers),
    'plan_hash': content_hash(plan),
  }
  files.write_parquet(path, table, facts)


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
  rows = [
    [Segment(**fields) for fields in row] for row in table['segments'].to_pylist()
  ]
  return Plan(rows, int(facts['answers']), made_from)
