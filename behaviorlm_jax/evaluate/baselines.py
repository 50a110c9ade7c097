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

`events` has arrays user int32[n], time int64[n] (seconds, the user's clock),
behavior int32[n], split int8[n] (0 train, 1 validation, 2 test), first
int64[n] (the user's first position), and known, the number of candidate
behaviors: ids from `known` on occur in the test split only and can stand in
a past, never in an answer.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.evaluate import adjust

NAMES = ('user_frequent', 'hour_frequent', 'recent_counts', 'markov', 'markov_adjusted')
TRAIN, VALIDATION = 0, 1
HOURS = 24
Weights = tuple[float, float, float]  # As GRID has them.
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


def scores(
  name: str,
  events: events_lib.Events,
  samples: np.ndarray,
  history: int = 24,
  seed: int = 0,
) -> np.ndarray:
  """Scores of every candidate behavior: float32[n, Y], higher is better.

  Only `markov` returns log-probabilities; of the others the order alone has
  a meaning.

  Args:
    name: one of NAMES.
    events: the log, see the module docstring.
    samples: int64[n], positions to predict, none in the training split.
    history: number of last events that `recent_counts` looks at.
    seed: of the draw of validation samples that `markov` is fitted on.
  """
  samples = np.asarray(samples, np.int64)
  assert name in NAMES, name
  # The tables count training events: one of those would be told itself.
  assert (events.split[samples] != TRAIN).all(), 'sample of the training split'
  if name.startswith('markov'):
    weights = fit_weights(events, seed)
    log_p = _mix(_parts(events, samples), weights)
    if name == 'markov':
      return log_p
    prior = adjust.log_prior(hour_table(events).sum(0))
    tau = fit_own_tau(events, weights, prior, seed)
    return (log_p - tau * prior).astype(np.float32)
  hours = hour_table(events)
  if name == 'hour_frequent':
    counts = hours[_hour(events.time[samples])]
  else:
    reach = history if name == 'recent_counts' else None
    counts = past_counts(events, samples, reach)
  return _order(counts, hours.sum(0))


def fit_weights(events: events_lib.Events, seed: int = 0) -> Weights:
  """Weights of `markov` with the least loss on drawn validation samples."""
  drawn = _fit_samples(events, seed)
  if not len(drawn):
    return DEFAULT_WEIGHTS
  parts, true = _parts(events, drawn), events.behavior[drawn]
  rows = np.arange(len(drawn))
  loss = [-_mix(parts, weights)[rows, true].mean() for weights in GRID]
  return GRID[int(np.argmin(loss))]


def fit_own_tau(
  events: events_lib.Events, weights: Weights, prior: np.ndarray, seed: int = 0
) -> float:
  """tau of `markov_adjusted` on what `fit_weights` draws; 0 without any."""
  drawn = _fit_samples(events, seed)
  if not len(drawn):
    return 0.0
  log_p = _mix(_parts(events, drawn), weights)
  return adjust.fit_tau(log_p, prior, events.behavior[drawn])


def _fit_samples(events: events_lib.Events, seed: int) -> np.ndarray:
  """Positions int64 of validation samples, sorted."""
  pool = np.flatnonzero((events.split == VALIDATION) & (events.behavior < events.known))
  rng = np.random.default_rng(seed)
  # Sorted: the columns are mapped files, read from their beginning on.
  return np.sort(rng.choice(pool, min(len(pool), FIT_SAMPLES), replace=False))


def hour_table(events: events_lib.Events) -> np.ndarray:
  """Training counts of behaviors by hour of day: int64[24, Y]."""
  table = np.zeros((HOURS, events.known), np.int64)
  for block in _blocks(len(events.behavior)):
    behavior = np.asarray(events.behavior[block], np.int64)
    counted = (events.split[block] == TRAIN) & (behavior < events.known)
    # The number of a cell: one bincount then counts all of them.
    code = _hour(events.time[block]) * events.known + behavior
    table += np.bincount(code[counted], minlength=table.size).reshape(table.shape)
  return table


def past_counts(
  events: events_lib.Events, samples: np.ndarray, reach: int | None = None
) -> np.ndarray:
  """Counts of the user's earlier behaviors, at most `reach` events back.

  Returns:
    int64[n, Y]; behaviors outside the candidate list are not counted.
  """
  counts = np.zeros((len(samples), events.known), np.int64)
  first = np.asarray(events.first[samples])
  if reach is not None:
    first = np.maximum(first, samples - reach)
  for row, start, stop in zip(counts, first, samples, strict=True):
    row[:] = _count(events.behavior[start:stop], events.known)
  return counts


def user_transitions(events: events_lib.Events, samples: np.ndarray) -> np.ndarray:
  """Counts of what followed the last behavior in the user's past: int64[n, Y].

  For a sample at p: behavior[q + 1] over all q + 1 < p of the user with
  behavior[q] == behavior[p - 1].
  """
  counts = np.zeros((len(samples), events.known), np.int64)
  first = np.asarray(events.first[samples])
  for row, start, stop in zip(counts, first, samples, strict=True):
    past = np.asarray(events.behavior[start:stop])
    # past[-1:], not past[-1]: of an empty past all of this is empty.
    row[:] = _count(past[1:][past[:-1] == past[-1:]], events.known)
  return counts


def train_transitions(events: events_lib.Events, samples: np.ndarray) -> np.ndarray:
  """Counts of what follows the last behavior in training: int64[n, Y].

  Both events of a pair are training events of one user. Only rows of last
  behaviors that the samples show are kept; a sample without a past has zeros.
  """
  # No event has the behavior -1: its row stays zero.
  last = np.where(events.first[samples] < samples, events.behavior[samples - 1], -1)
  wanted, row_of = np.unique(last, return_inverse=True)
  table = np.zeros((len(wanted), events.known), np.int64)
  # One event more, for the pair whose second event begins the next block.
  for block in _blocks(len(events.behavior), overlap=1):
    user, split = events.user[block], events.split[block]
    behavior = np.asarray(events.behavior[block], np.int64)
    # Where it would stand; whether it is there, `counted` asks below.
    row = np.searchsorted(wanted, behavior[:-1])
    row = np.minimum(row, len(wanted) - 1)
    counted = (
      (user[1:] == user[:-1])
      & (split[:-1] == TRAIN)
      & (split[1:] == TRAIN)
      & (wanted[row] == behavior[:-1])
      & (behavior[1:] < events.known)
    )
    code = row * events.known + behavior[1:]
    table += np.bincount(code[counted], minlength=table.size).reshape(table.shape)
  return table[row_of]


def _parts(events: events_lib.Events, samples: np.ndarray) -> list[np.ndarray]:
  """Smoothed log-probabilities that `markov` mixes, each float32[n, Y].

  Dirichlet smoothing: p = (counts + strength * prior) / (total + strength).
  """
  hours = hour_table(events)
  # One pseudo-event of each behavior, so that no share is 0.
  everyone = _smooth(hours.sum(0)[None], 1 / events.known, events.known)
  habit = _smooth(past_counts(events, samples), everyone, PRIOR_GLOBAL)
  own = _smooth(user_transitions(events, samples), habit, PRIOR_HABIT)
  follow = _smooth(train_transitions(events, samples), everyone, PRIOR_GLOBAL)
  # The ratio to the global share moves a prediction only as far as the hour
  # differs from the whole day.
  hour = _smooth(hours, everyone, PRIOR_GLOBAL) / everyone
  parts = own, follow, hour[_hour(events.time[samples])]
  return [np.log(part).astype(np.float32) for part in parts]


def _smooth(
  counts: np.ndarray, prior: np.ndarray | float, strength: float
) -> np.ndarray:
  total = counts.sum(1, keepdims=True)
  return (counts + strength * prior) / (total + strength)


def _mix(parts: Sequence[np.ndarray], weights: Weights) -> np.ndarray:
  """Weighted sum of log-probabilities, normalised: float32[n, Y]."""
  mixed = sum(w * part for w, part in zip(weights, parts, strict=True))
  mixed -= mixed.max(1, keepdims=True)  # exp of the largest is 1: no overflow.
  return mixed - np.log(np.exp(mixed).sum(1, keepdims=True))


def _order(counts: np.ndarray, frequency: np.ndarray) -> np.ndarray:
  """Counts as float32 places, ties broken by frequency, then by lower id."""
  known = len(frequency)
  tie = np.empty(known, np.int64)
  # lexsort's last key counts first; the more frequent gets the larger number.
  tie[np.lexsort((-np.arange(known), frequency))] = np.arange(known)
  # tie < known, so it decides between equal counts alone. Places (the argsort of
  # an argsort) and not these numbers: float32 could not tell large ones apart.
  places = np.argsort(np.argsort(counts * known + tie, axis=1), axis=1)
  return places.astype(np.float32)


def _count(behaviors: np.ndarray, known: int) -> np.ndarray:
  return np.bincount(behaviors, minlength=known)[:known]  # Without unseen ones.


def _hour(seconds: np.ndarray) -> np.ndarray:
  return np.asarray(seconds, np.int64) // 3600 % HOURS


def _blocks(n: int, overlap: int = 0) -> Iterator[slice]:
  for start in range(0, n, BLOCK):
    yield slice(start, min(start + BLOCK + overlap, n))
