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

import numpy as np

from behaviorlm_jax.evaluate import adjust

NAMES = ('user_frequent', 'hour_frequent', 'recent_counts', 'markov', 'markov_adjusted')
TRAIN, VALIDATION = 0, 1
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
FIT_SAMPLES = 2000


def scores(name, events, samples, history=24, seed=0):
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
  assert (events.split[samples] != TRAIN).all(), 'sample of the training split'
  if name.startswith('markov'):
    weights = fit(events, seed)
    log_p = _mix(_parts(events, samples), weights)
    if name == 'markov':
      return log_p
    prior = adjust.log_prior(hour_table(events).sum(0))
    return (log_p - fit_tau(events, weights, prior, seed) * prior).astype(np.float32)
  hours = hour_table(events)
  if name == 'hour_frequent':
    counts = hours[_hour(events.time[samples])]
  else:
    reach = history if name == 'recent_counts' else None
    counts = past_counts(events, samples, reach)
  return _order(counts, hours.sum(0))


def fit(events, seed=0):
  """Weights of `markov` with the least loss on drawn validation samples."""
  drawn = _fit_samples(events, seed)
  if not len(drawn):
    return DEFAULT_WEIGHTS
  parts, true = _parts(events, drawn), events.behavior[drawn]
  rows = np.arange(len(drawn))
  loss = [-_mix(parts, weights)[rows, true].mean() for weights in GRID]
  return GRID[int(np.argmin(loss))]


def fit_tau(events, weights, prior, seed=0):
  """tau of `markov_adjusted` on the samples that `fit` draws; 0 without any."""
  drawn = _fit_samples(events, seed)
  if not len(drawn):
    return 0.0
  log_p = _mix(_parts(events, drawn), weights)
  return adjust.fit_tau(log_p, prior, events.behavior[drawn])


def _fit_samples(events, seed):
  pool = np.flatnonzero((events.split == VALIDATION) & (events.behavior < events.known))
  rng = np.random.default_rng(seed)
  return np.sort(rng.choice(pool, min(len(pool), FIT_SAMPLES), replace=False))


def hour_table(events):
  """Training counts of behaviors by hour of day: int64[24, Y]."""
  table = np.zeros((HOURS, events.known), np.int64)
  for block in _blocks(len(events.behavior)):
    behavior = np.asarray(events.behavior[block], np.int64)
    counted = (events.split[block] == TRAIN) & (behavior < events.known)
    code = _hour(events.time[block]) * events.known + behavior
    table += np.bincount(code[counted], minlength=table.size).reshape(table.shape)
  return table


def past_counts(events, samples, reach=None):
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


def user_transitions(events, samples):
  """Counts of what followed the last behavior in the user's past: int64[n, Y].

  For a sample at p: behavior[q + 1] over all q + 1 < p of the user with
  behavior[q] == behavior[p - 1].
  """
  counts = np.zeros((len(samples), events.known), np.int64)
  first = np.asarray(events.first[samples])
  for row, start, stop in zip(counts, first, samples, strict=True):
    past = np.asarray(events.behavior[start:stop])
    row[:] = _count(past[1:][past[:-1] == past[-1:]], events.known)
  return counts


def train_transitions(events, samples):
  """Counts of what follows the last behavior in training: int64[n, Y].

  Both events of a pair are training events of one user. Only rows of last
  behaviors that the samples show are kept; a sample without a past has zeros.
  """
  last = np.where(events.first[samples] < samples, events.behavior[samples - 1], -1)
  wanted, row_of = np.unique(last, return_inverse=True)
  table = np.zeros((len(wanted), events.known), np.int64)
  for block in _blocks(len(events.behavior), overlap=1):
    user, split = events.user[block], events.split[block]
    behavior = np.asarray(events.behavior[block], np.int64)
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


def _parts(events, samples):
  """Smoothed log-probabilities that `markov` mixes, each float32[n, Y].

  Dirichlet smoothing: p = (counts + strength * prior) / (total + strength).
  The hour stands as the ratio to the global share, so that it moves a
  prediction only as far as the hour differs from the whole day.
  """
  hours = hour_table(events)
  everyone = _smooth(hours.sum(0)[None], 1 / events.known, events.known)
  habit = _smooth(past_counts(events, samples), everyone, PRIOR_GLOBAL)
  own = _smooth(user_transitions(events, samples), habit, PRIOR_HABIT)
  follow = _smooth(train_transitions(events, samples), everyone, PRIOR_GLOBAL)
  hour = _smooth(hours, everyone, PRIOR_GLOBAL) / everyone
  parts = own, follow, hour[_hour(events.time[samples])]
  return [np.log(part).astype(np.float32) for part in parts]


def _smooth(counts, prior, strength):
  total = counts.sum(1, keepdims=True)
  return (counts + strength * prior) / (total + strength)


def _mix(parts, weights):
  """Weighted sum of log-probabilities, normalised: float32[n, Y]."""
  mixed = sum(w * part for w, part in zip(weights, parts, strict=True))
  mixed -= mixed.max(1, keepdims=True)
  return mixed - np.log(np.exp(mixed).sum(1, keepdims=True))


def _order(counts, frequency):
  """Counts as float32 places, ties broken by frequency, then by lower id.

  Places instead of counts plus a small share: float32 could not tell large
  counts with a tie-break apart.
  """
  known = len(frequency)
  tie = np.empty(known, np.int64)
  tie[np.lexsort((-np.arange(known), frequency))] = np.arange(known)
  places = np.argsort(np.argsort(counts * known + tie, axis=1), axis=1)
  return places.astype(np.float32)


def _count(behaviors, known):
  return np.bincount(behaviors, minlength=known)[:known]


def _hour(seconds):
  return np.asarray(seconds, np.int64) // 3600 % HOURS


def _blocks(n, overlap=0):
  for start in range(0, n, BLOCK):
    yield slice(start, min(start + BLOCK + overlap, n))
