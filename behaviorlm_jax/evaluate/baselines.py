"""Five predictors that cost nothing to train: what counting alone knows.

  user_frequent   the user's own counts over all of the past
  hour_frequent   training counts of the hour of day, over all users
  recent_counts   the user's counts over the last `history` events
  markov          the user's own transitions and habits, training transitions
                  and the hour, mixed log-linearly; logs of probabilities
  markov_adjusted the same less tau times the log of the training frequency

Invariants. The past of a sample is what stands before it in the log, of the
same user, whatever its split: known when the prediction is made. Tables over
all users come from the training split alone, which is why a sample must not
be in it. Ties and behaviors never seen go by global training frequency, then
by id. The weights of `markov` and tau come from the validation split.

Behaviors from `events.known` on occur in the test split only: they can stand in
a past, never in an answer. Y is events.known below.
"""

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.evaluate import adjust

NAMES = ('user_frequent', 'hour_frequent', 'recent_counts', 'markov', 'markov_adjusted')
TRAIN, VALIDATION = map(events_lib.SPLITS.index, ('train', 'validation'))
HOURS = 24
BLOCK = 1 << 22  # events per step of a scan: bounds memory, not results

# Strength of the priors behind `markov`, in pseudo-events: the user's habits
# lean on the global shares, the user's transitions on the user's habits.
PRIOR_GLOBAL, PRIOR_HABIT = 10.0, 5.0
# Exponents of the user's transitions, the training transitions and the hour.
GRID = tuple(
  itertools.product(
    (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.25, 0.5, 0.75), (0.0, 0.5, 1.0)
  )
)
DEFAULT_WEIGHTS = (0.75, 0.5, 0.5)  # where there is nothing to fit on
FIT_SAMPLES = 2000  # Validation samples behind weights and tau, at most.


class Counts:
  """The predictors over one log.

  A table or a weight is made when it is first asked for, in a pass over the log,
  and kept for all that is asked later.
  """

  def __init__(self, events: events_lib.Events, history: int = 24, seed: int = 0):
    """`history`: of `recent_counts`; `seed`: of the draw that `markov` is fitted on."""
    self.events, self.history, self.seed = events, history, seed

  def scores(self, name: str, samples: np.ndarray) -> np.ndarray:
    """Scores of every candidate behavior: float32 [n, Y], higher is better.

    Only `markov` returns log-probabilities; of the others the order alone has
    a meaning.

    `samples`: int64 [n], positions to predict, none in the training split.
    """
    samples = np.asarray(samples, np.int64)
    assert name in NAMES, name
    # The tables count training events: one of those would be told itself.
    assert (self.events.split[samples] != TRAIN).all(), 'sample of the training split'
    if name.startswith('markov'):
      weights, tau = self.fitted
      log_p = _mix(self._parts(samples), weights)
      if name == 'markov':
        return log_p
      return (log_p - tau * self.log_prior).astype(np.float32)
    if name == 'hour_frequent':
      counts = self.hours[self._hour(samples)]
    else:
      reach = self.history if name == 'recent_counts' else None
      counts = past_counts(self.events, samples, reach)
    return _order(counts, self.hours.sum(0))

  @functools.cached_property
  def hours(self) -> np.ndarray:
    """Training counts of behaviors by hour of day: int64 [24, Y]."""
    events, table = self.events, np.zeros((HOURS, self.events.known), np.int64)
    for block in _blocks(len(events.behavior)):
      behavior = np.asarray(events.behavior[block], np.int64)
      counted = (events.split[block] == TRAIN) & (behavior < events.known)
      # The number of a cell: one bincount then counts all of them.
      code = self._hour(block) * events.known + behavior
      table += np.bincount(code[counted], minlength=table.size).reshape(table.shape)
    return table

  @functools.cached_property
  def log_prior(self) -> np.ndarray:
    """adjust.log_prior of the training split."""
    return adjust.log_prior(self.hours.sum(0))

  def transitions(self, samples: np.ndarray) -> np.ndarray:
    """Counts of what follows a sample's last behavior in training: int64 [n, Y].

    Both events of a pair are training events of one user. A sample without a past
    has zeros.
    """
    events, (codes, counts) = self.events, self._pairs
    table = np.zeros((len(samples), events.known), np.int64)
    last = np.asarray(events.behavior[samples - 1], np.int64)
    # No event has the behavior -1, and no pair a code below 0.
    last = np.where(events.first[samples] < samples, last, -1) * events.known
    begins, ends = np.searchsorted(codes, [last, last + events.known])
    for row, begin, end in zip(table, begins, ends, strict=True):
      row[codes[begin:end] % events.known] = counts[begin:end]
    return table

  @functools.cached_property
  def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of `transitions` that occur, by code, and how often: int64 both."""
    events = self.events
    codes = counts = np.zeros(0, np.int64)
    # One event more, for the pair whose second event begins the next block.
    for block in _blocks(len(events.behavior), overlap=1):
      user, split = events.user[block], events.split[block]
      behavior = np.asarray(events.behavior[block], np.int64)
      counted = (
        (user[1:] == user[:-1])
        & (split[:-1] == TRAIN)
        & (split[1:] == TRAIN)
        & (behavior[1:] < events.known)
      )
      found = (behavior[:-1] * events.known + behavior[1:])[counted]
      # Only those that occur: of a long list Y x Y would not fit in memory.
      times = np.append(counts, np.ones(len(found)))
      codes, place = np.unique(np.append(codes, found), return_inverse=True)
      counts = np.bincount(place, times).astype(np.int64)
    return codes, counts

  @functools.cached_property
  def fitted(self) -> tuple[tuple[float, float, float], float]:
    """Weights of `markov` with the least loss on drawn validation samples, and tau."""
    events = self.events
    known = events.behavior < events.known
    pool = np.flatnonzero((events.split == VALIDATION) & known)
    if not len(pool):
      return DEFAULT_WEIGHTS, 0.0
    rng = np.random.default_rng(self.seed)
    # Sorted: the columns are mapped files, read from their beginning on.
    drawn = np.sort(rng.choice(pool, min(len(pool), FIT_SAMPLES), replace=False))
    parts, true = self._parts(drawn), events.behavior[drawn]
    rows = np.arange(len(drawn))
    loss = [-_mix(parts, weights)[rows, true].mean() for weights in GRID]
    weights = GRID[int(np.argmin(loss))]
    return weights, adjust.fit_tau(_mix(parts, weights), self.log_prior, true)

  def _parts(self, samples: np.ndarray) -> list[np.ndarray]:
    """Smoothed log-probabilities that `markov` mixes, each float32 [n, Y]."""
    events, known = self.events, self.events.known
    # One pseudo-event of each behavior, so that no share is 0.
    everyone = _smooth(self.hours.sum(0)[None], 1 / known, known)
    habit = _smooth(past_counts(events, samples), everyone, PRIOR_GLOBAL)
    own = _smooth(user_transitions(events, samples), habit, PRIOR_HABIT)
    follow = _smooth(self.transitions(samples), everyone, PRIOR_GLOBAL)
    # The ratio to the global share moves a prediction only as far as the hour
    # differs from the whole day.
    hour = _smooth(self.hours, everyone, PRIOR_GLOBAL) / everyone
    parts = own, follow, hour[self._hour(samples)]
    return [np.log(part).astype(np.float32) for part in parts]

  def _hour(self, where: slice | np.ndarray) -> np.ndarray:
    return np.asarray(self.events.time[where], np.int64) // 3600 % HOURS


def past_counts(
  events: events_lib.Events, samples: np.ndarray, reach: int | None = None
) -> np.ndarray:
  """Counts of the user's earlier behaviors, at most `reach` events back: [n, Y]."""
  start = None if reach is None else -reach
  return _counted(events, samples, lambda past: past[start:])


def user_transitions(events: events_lib.Events, samples: np.ndarray) -> np.ndarray:
  """Counts of what followed the last behavior in the user's past: int64 [n, Y].

  For a sample at p: behavior[q + 1] over all q + 1 < p of the user with
  behavior[q] == behavior[p - 1].
  """
  # past[-1:], not past[-1]: of an empty past all of this is empty.
  return _counted(events, samples, lambda past: past[1:][past[:-1] == past[-1:]])


def _counted(events, samples, choose):
  """Counts int64 [n, Y] of what `choose` takes of the past of each sample."""
  counts = np.zeros((len(samples), events.known), np.int64)
  for row, first, sample in zip(counts, events.first[samples], samples, strict=True):
    chosen = choose(np.asarray(events.behavior[first:sample]))
    row[:] = np.bincount(chosen, minlength=events.known)[: events.known]
  return counts


def _smooth(counts, prior, strength):
  """Dirichlet smoothing: (counts + strength * prior) / (total + strength)."""
  total = counts.sum(1, keepdims=True)
  return (counts + strength * prior) / (total + strength)


def _mix(parts, weights):
  """Weighted sum of log-probabilities, normalised: float32 [n, Y]."""
  mixed = sum(w * part for w, part in zip(weights, parts, strict=True))
  mixed -= mixed.max(1, keepdims=True)  # exp of the largest is 1: no overflow.
  return mixed - np.log(np.exp(mixed).sum(1, keepdims=True))


def _order(counts, frequency):
  """-log float32 of the place from 1 on, ties broken by frequency, then by lower id.

  Of these calibration makes probabilities that fall as in Zipf's law; of places
  themselves they would fall too fast behind the first few.
  """
  known = len(frequency)
  tie = np.empty(known, np.int64)
  # lexsort's last key counts first; the more frequent gets the larger number.
  tie[np.lexsort((-np.arange(known), frequency))] = np.arange(known)
  # tie < known, so it decides between equal counts alone. Places (the argsort of
  # an argsort) and not these numbers: float32 could not tell large ones apart.
  places = np.argsort(np.argsort(counts * known + tie, axis=1), axis=1)
  return -np.log(known - places).astype(np.float32)


def _blocks(n: int, overlap: int = 0) -> Iterator[slice]:
  for start in range(0, n, BLOCK):
    yield slice(start, min(start + BLOCK + overlap, n))
