"""The curriculum as a table: which sample stands in which row of which step.

A plan is made once at the start of a stage from (seed, samples, groups,
difficulty, mix shares, lengths), written as Parquet and never changed. Batch s
of training is a pure function of (plan, s); that is why a run resumes exactly
from its step number and why any number of hosts reads the same global batch.

One record is one row of the batch: segments packed side by side, each a window
of one user's events or a conversation. Segments come from endless streams,
whose every prefix keeps its promise:

  * `tile`: every eligible event is a target once per epoch;
  * `balanced`: behaviors take turns, so any two differ by one draw at most;
  * `mix`: conversations make up a fixed share of the answer tokens.
"""

import dataclasses
import hashlib
import itertools
import json

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from behaviorlm_jax import files
from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.errors import InputError

WINDOW, CONVERSATION = 'window', 'conversation'
_SEGMENT = pa.struct([
    ('kind', pa.string()),
    ('start', pa.int64()),  # First event, or index of the conversation.
    ('stop', pa.int64()),  # End of the events.
    ('targets', pa.list_(pa.int64())),  # Events that are learned.
    ('weights', pa.list_(pa.float32())),  # Of each target in the loss.
    ('length', pa.int32()),  # Tokens.
    ('answers', pa.int32()),  # Answer tokens.
])


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


def eligible(events, split, min_context, anchors_only=False):
  """Positions of the samples of a split: enough past, a known behavior."""
  mask = events.split == events_lib.SPLITS.index(split)
  mask = mask & (events.behavior < events.known)
  positions = np.flatnonzero(mask)
  positions = positions[positions - events.first[positions] >= min_context]
  if anchors_only:
    anchors = anchor_mask(events)
    positions = positions[anchors[events.behavior[positions]]]
  return positions


def anchor_mask(events):
  """bool [known]: which candidate behaviors are anchors."""
  return np.array([b.group == 'anchor' for b in
                   events.behaviors[:events.known]], bool)


def check_lengths(prompts, config):
  """Refuses a train.length that cannot hold every sample with its context."""
  events, context = prompts.events, config.plan.min_context
  samples = np.concatenate([eligible(events, split, context)
                            for split in ('train', 'validation')])
  if not len(samples):
    return
  lines = prompts.line_ends[samples + 1] - prompts.line_ends[samples - context]
  worst = samples[np.argmax(lines)]
  needed = prompts.window_length(worst - context, worst + 1)
  if needed > config.train.length:
    name = events.behaviors[events.behavior[worst]].name
    raise InputError(
        f'train.length is {config.train.length} tokens, but an event of user '
        f'{events.users[events.user[worst]]!r} ({name!r}) with '
        f'plan.min_context = {context} events before it needs {needed}; raise '
        'train.length.')


class Windows:
  """Makes window segments that fit a row, from targets and their context."""

  def __init__(self, prompts, config):
    self.prompts = prompts
    self.events = prompts.events
    self.plan = config.plan
    self.length = config.train.length
    self.history = config.data.history

  def make(self, start, targets, weights):
    """A segment of events from `start` to the last target.

    Context that does not fit is cut from the front down to min_context, then
    targets from the end; what is cut is left for the caller to see in
    `targets`.
    """
    length = self.prompts.window_length
    targets, weights = list(targets), list(weights)
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
            f'{length(start, targets[-1] + 1)}; raise train.length.')
    answers = self.prompts.answer_lengths[self.events.behavior[targets]].sum()
    stop = targets[-1] + 1
    return Segment(WINDOW, int(start), int(stop), tuple(map(int, targets)),
                   # As float32, so that a plan that is read back is the same.
                   tuple(np.asarray(weights, np.float32).tolist()),
                   length(start, stop), int(answers))

  def user_tiles(self, positions, rng):
    """Windows that hold each of one user's `positions` exactly once."""
    per_row = self.plan.targets_per_row
    context = max(self.plan.min_context, self.plan.window - per_row)
    context = min(context, self.history)
    tiles, i = [], 0
    limit = per_row
    # A random first cut gives a target another context in every epoch; those
    # that fit one window see their whole past instead.
    if len(positions) > per_row:
      limit = int(rng.integers(1, per_row + 1))
    while i < len(positions):
      start = max(self.events.first[positions[i]], positions[i] - context)
      inside = np.searchsorted(positions, start + self.plan.window)
      stop = max(i + 1, min(i + limit, inside))
      tile = self.make(start, positions[i:stop], [1.0] * (stop - i))
      tiles.append(tile)
      i += len(tile.targets)
      limit = per_row
    return tiles

  def draw(self, position, weight_of=None):
    """A window that ends with a drawn sample; `weight_of` adds neighbours."""
    size = min(self.history, self.plan.window - 1)
    start = max(self.events.first[position], position - size)
    targets, weights = [position], [1.0]
    if weight_of is not None:
      near = np.arange(start + self.plan.min_context, position)
      near = near[self.events.split[near] == self.events.split[position]]
      near = near[self.events.behavior[near] < self.events.known]
      targets = [*near, position]
      weights = [*weight_of[self.events.behavior[near]], 1.0]
      if self.prompts.window_length(start, position + 1) > self.length:
        targets, weights = [position], [1.0]  # Keep the drawn one whole.
    return self.make(start, targets, weights)


def tile(windows, positions, rng):
  """Endless windows over `positions`; every epoch is a new tiling, shuffled."""
  _require(positions, 'stage a or one')
  users = np.split(positions, 1 + np.flatnonzero(
      np.diff(windows.events.user[positions])))
  while True:
    epoch = [w for user in users for w in windows.user_tiles(user, rng)]
    for i in rng.permutation(len(epoch)):
      yield epoch[i]


def balanced(windows, subset, rng, weight_of=None):
  """Endless windows of drawn samples, behaviors taking turns.

  Args:
    windows: maker of segments.
    subset: {behavior: positions}, the drawn samples of each behavior.
    rng: numpy Generator, shuffles samples and the order of behaviors.
    weight_of: float [known] or None, see Windows.draw.
  """
  subset = {b: s for b, s in subset.items() if len(s)}
  _require(subset, 'stage b')
  queues = {b: _reshuffled(s, rng) for b, s in subset.items()}
  while True:
    for behavior in rng.permutation(list(queues)):
      yield windows.draw(int(next(queues[behavior])), weight_of)


def _reshuffled(items, rng):
  while True:
    yield from items[rng.permutation(len(items))]


class NoSamples(InputError):
  """A split has nothing that a stage could learn from."""


def _require(samples, stage):
  if not len(samples):
    raise NoSamples(f'data.events: no sample is left for {stage}; '
                     'give users more events or lower plan.min_context.')


def natural(windows, subset, rng, weight_of=None):
  """Endless windows of drawn samples in shuffled epochs, no balance."""
  _require(subset, 'stage b')
  samples = np.concatenate(list(subset.values()))
  for position in _reshuffled(samples, rng):
    yield windows.draw(int(position), weight_of)


def mix(stream, conversations, share, rng):
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
      yield Segment(CONVERSATION, i, i, (), (), len(conversations[i].tokens),
                    answers)
      auxiliary += answers
    else:
      segment = next(stream)
      answers = segment.answers
      yield segment
    total += answers


_OPEN_ROWS = 64  # Fills 95 % of rows of check-ins; one open row filled 79 %.


def pack(stream, rows, length):
  """Fills `rows` rows of at most `length` tokens from an endless stream.

  Best fit among the rows begun last: a segment joins the fullest one that has
  room, so it stands at most _OPEN_ROWS rows early.
  """
  packed, used = [], []
  for segment in stream:
    fitting = [i for i in range(max(0, len(used) - _OPEN_ROWS), len(used))
               if used[i] + segment.length <= length]
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


def weighted_draw(positions, weights, size, rng):
  """`size` of `positions` with probability by weight, without replacement.

  Efraimidis and Spirakis (2006): the largest keys u ** (1 / w), here as
  log(u) / w. A class with fewer members repeats all of them evenly.
  """
  whole, rest = divmod(size, len(positions))
  weights = np.maximum(np.asarray(weights, np.float64), 1e-12)
  keys = np.log(rng.random(len(positions))) / weights
  chosen = positions[np.argsort(-keys, kind='stable')[:rest]]
  return np.concatenate([np.tile(positions, whole), chosen])


def candidates(events, config, rng):
  """{behavior: positions} that stage b may draw from, chosen before scoring.

  Natural budget: one pool under key -1, as large as the balanced one.
  """
  samples = eligible(events, 'train', config.plan.min_context)
  _require(samples, 'stage b')
  limit = config.difficulty.candidates
  pools, behavior = {}, events.behavior[samples]
  for b in range(events.known):
    pool = samples[behavior == b]
    pools[b] = np.sort(rng.permutation(pool)[:limit])
  if config.plan.budget == 'natural':
    size = sum(map(len, pools.values()))
    return {-1: np.sort(rng.permutation(samples)[:size])}
  return pools


def choose_subset(pools, scores, events, config, rng):
  """Draws stage b's subset: {behavior: positions}, weight score ** gamma.

  `scores`: {position: difficulty}, or None for uniform draws.
  """
  anchors = anchor_mask(events)
  per_anchor = config.plan.per_anchor
  if per_anchor is None:
    per_anchor = config.plan.per_behavior
  subset = {}
  for b, pool in pools.items():
    size = per_anchor if b >= 0 and anchors[b] else config.plan.per_behavior
    if b < 0:  # The natural budget: as many draws in all.
      drawn = np.unique(events.behavior[eligible(
          events, 'train', config.plan.min_context)])
      size = int(np.where(anchors[drawn], per_anchor,
                          config.plan.per_behavior).sum())
    if not len(pool) or not size:
      continue
    weights = np.ones(len(pool)) if scores is None else (
        np.array([scores[int(p)] for p in pool]) ** config.plan.gamma)
    subset[b] = weighted_draw(pool, weights, size, rng)
  return subset


def neighbour_weights(events, config):
  """float [known]: min(1, m / n_c), so that neighbours teach in balance.

  Under a natural budget all are 1: neighbours come at their natural rates.
  """
  if config.plan.budget == 'natural':
    return np.ones(events.known)
  counts = np.array([b.train_count for b in events.behaviors[:events.known]])
  return np.minimum(1.0, config.plan.per_behavior / np.maximum(counts, 1))


def take(stream, config, steps, made_from):
  """The plan of `steps` steps from an endless stream of segments."""
  rows = pack(stream, steps * config.train.batch, config.train.length)
  most = max(sum(s.answers for s in row) for row in rows)
  return Plan([[dataclasses.asdict(s) for s in row] for row in rows],
              _rounded(most), made_from)


def _rounded(count):
  """Shapes in multiples of 16 keep compilations few across plans."""
  return -(-int(count) // 16) * 16


def most_answers(plan, batch, accumulate, groups):
  """Answer tokens of the fullest group of rows, rounded up.

  A step's rows go to micro-batches in turn (row i to i % accumulate), those of
  a micro-batch to `groups` devices one after the other.
  """
  answers = np.array([sum(s['answers'] for s in row) for row in plan.rows])
  rows = batch // accumulate // groups
  parts = answers.reshape(-1, groups, rows, accumulate).sum(axis=2)
  return _rounded(parts.max())


def summary(plan, length):
  """One line on what the plan teaches, and how full its rows are."""
  segments = list(itertools.chain.from_iterable(plan.rows))
  targets = [t for segment in segments for t in segment['targets']]
  used = sum(segment['length'] for segment in segments)
  return (f'{len(plan.rows):,} rows, {used / (len(plan.rows) * length):.1%} '
          f'full; {len(targets):,} targets, {len(set(targets)):,} of them '
          'different events')


def save(path, plan, batch):
  """Writes a plan; columns step, row and segments."""
  index = np.arange(len(plan.rows))
  table = pa.table({
      'step': pa.array(index // batch, pa.int32()),
      'row': pa.array(index % batch, pa.int32()),
      'segments': pa.array(plan.rows, pa.list_(_SEGMENT)),
  })
  digest = content_hash(plan)
  facts = {'made_from': plan.made_from, 'answers': str(plan.answers),
           'plan_hash': digest}
  files.write_parquet(path, table, facts)
  return digest


def content_hash(plan):
  """SHA-256 of the rows, the same on every machine."""
  digest = hashlib.sha256(plan.made_from.encode())
  for segment in itertools.chain.from_iterable(plan.rows):
    digest.update(json.dumps(segment, sort_keys=True).encode())
  return digest.hexdigest()


def load(path, made_from):
  """Reads a plan, refusing one that other inputs made."""
  table = parquet.read_table(path)
  facts = {k.decode(): v.decode() for k, v in
           (table.schema.metadata or {}).items()}
  if facts.get('made_from') != made_from:
    raise InputError(
        f'{path} was made from other events, another model, adapter or config '
        f'(fingerprint {facts.get("made_from", "none")[:12]}, now '
        f'{made_from[:12]}); delete it or use another --workdir.')
  return Plan(table['segments'].to_pylist(), int(facts['answers']), made_from)
