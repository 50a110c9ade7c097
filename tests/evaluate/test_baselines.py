"""The free baselines against counting by hand, and their blindness to come."""

import collections
import itertools
import types

import numpy as np
import pytest

from behaviorlm_jax.evaluate import baselines

FIELDS = ('user', 'time', 'behavior', 'split', 'first')


def make_events(seed=0, users=9, known=6, unseen=1, lengths=(8, 40)):
  """Random users, 70/15/15 by time; ids from `known` on in test only."""
  rng = np.random.default_rng(seed)
  columns = {field: [] for field in FIELDS}
  start = 0
  for user in range(users):
    n = int(rng.integers(*lengths))
    split = np.repeat([0, 1, 2], [int(n * 0.7), int(n * 0.15), n])[:n]
    behavior = rng.integers(known, size=n) ** 2 // known
    late = (split == 2) & (rng.random(n) < 0.3)
    behavior[late] = known + rng.integers(unseen, size=late.sum())
    columns['user'].append(np.full(n, user))
    columns['time'].append(np.sort(rng.integers(10**6, size=n)))
    columns['behavior'].append(behavior)
    columns['split'].append(split)
    columns['first'].append(np.full(n, start))
    start += n
  arrays = {key: np.concatenate(value) for key, value in columns.items()}
  return types.SimpleNamespace(known=known, **arrays)


def test_samples(events):
  return np.flatnonzero((events.split == 2) & (events.behavior < events.known))


test_samples.__test__ = False


def by_hand(counts, frequency):
  """Candidates, best first: by count, then training frequency, then id."""
  return sorted(range(len(frequency)), key=lambda y: (-counts[y], -frequency[y], y))


def train_frequency(events):
  return collections.Counter(events.behavior[events.split == 0].tolist())


@pytest.mark.parametrize(
  'name, reach', [('user_frequent', 10**6), ('recent_counts', 5)]
)
def test_counts_of_the_past_order_the_candidates(name, reach):
  events = make_events()
  samples = test_samples(events)
  result = baselines.Counts(events, history=5).scores(name, samples)
  assert result.shape == (len(samples), 6) and result.dtype == np.float32
  # Minus the logs of the places 1 to 6.
  places = np.broadcast_to(np.arange(1, 7), result.shape)
  np.testing.assert_allclose(np.sort(np.exp(-result), axis=1), places, rtol=1e-6)
  frequency = [train_frequency(events)[y] for y in range(6)]
  for row, p in zip(result, samples, strict=True):
    past = events.behavior[max(events.first[p], p - reach) : p].tolist()
    want = by_hand([past.count(y) for y in range(6)], frequency)
    assert np.argsort(-row).tolist() == want


def test_hour_counts_come_from_training_events_of_that_hour():
  events = make_events(1)
  samples = test_samples(events)
  result = baselines.Counts(events).scores('hour_frequent', samples)
  frequency = [train_frequency(events)[y] for y in range(6)]
  for row, p in zip(result, samples, strict=True):
    hour = events.time[p] // 3600 % 24
    counts = collections.Counter(
      b
      for b, t, s in zip(events.behavior, events.time, events.split, strict=True)
      if s == 0 and t // 3600 % 24 == hour
    )
    assert np.argsort(-row).tolist() == by_hand(counts, frequency)


def test_transition_tables_equal_counting_by_hand():
  events = make_events(2)
  samples = test_samples(events)
  own = baselines.user_transitions(events, samples)
  everyone = baselines.Counts(events).transitions(samples)
  pairs = collections.Counter(
    (events.behavior[q], events.behavior[q + 1])
    for q in range(len(events.user) - 1)
    if events.user[q] == events.user[q + 1]
    and events.split[q] == events.split[q + 1] == 0
  )
  for i, p in enumerate(samples):
    last, past = events.behavior[p - 1], events.behavior[events.first[p] : p]
    follow = collections.Counter(b for a, b in itertools.pairwise(past) if a == last)
    assert own[i].tolist() == [follow[y] for y in range(6)]
    assert everyone[i].tolist() == [pairs[last, y] for y in range(6)]


def test_scanning_in_blocks_changes_nothing(monkeypatch):
  events = make_events(3)
  samples = test_samples(events)
  whole = baselines.Counts(events)
  want = [whole.scores(name, samples) for name in baselines.NAMES]
  monkeypatch.setattr(baselines, 'BLOCK', 7)
  parts = baselines.Counts(events)
  found = [parts.scores(name, samples) for name in baselines.NAMES]
  np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize('name', baselines.NAMES)
def test_target_and_everything_after_it_change_nothing(name):
  events = make_events(4)
  samples = test_samples(events)
  before = baselines.Counts(events).scores(name, samples)
  for i, p in list(enumerate(samples))[::5]:
    changed = types.SimpleNamespace(**vars(events))
    changed.behavior = events.behavior.copy()
    changed.time = events.time.copy()
    same_user = events.user == events.user[p]
    later = same_user & (np.arange(len(same_user)) >= p)
    changed.behavior[later] = (changed.behavior[later] + 1) % 6
    later[p] = False  # the time of the question itself is known
    changed.time[later] += 5000
    after = baselines.Counts(changed).scores(name, samples[i : i + 1])
    np.testing.assert_array_equal(after[0], before[i])


def test_markov_gives_log_probabilities():
  events = make_events(5)
  result = baselines.Counts(events).scores('markov', test_samples(events))
  np.testing.assert_allclose(np.exp(result).sum(1), 1, rtol=1e-5)


def test_markov_learns_a_cycle_that_counts_cannot_see():
  known, n = 5, 60
  events = make_events(users=6, known=known, lengths=(n, n + 1))
  events.behavior = np.arange(n * 6) % n % known
  samples, counts = test_samples(events), baselines.Counts(events)
  right = {
    name: (counts.scores(name, samples).argmax(1) == events.behavior[samples]).mean()
    for name in baselines.NAMES
  }
  assert right['markov'] == 1.0
  assert max(right['user_frequent'], right['hour_frequent']) < 0.5


def test_fit_draws_by_seed_and_needs_no_validation_events():
  events = make_events(6)
  one, other = (baselines.Counts(events, seed=3) for _ in range(2))
  assert one.fitted == other.fitted and one.fitted[0] in baselines.GRID
  events.split = np.where(events.split == 1, 0, events.split)
  assert baselines.Counts(events).fitted == (baselines.DEFAULT_WEIGHTS, 0.0)


@pytest.mark.parametrize('name', baselines.NAMES)
def test_first_event_of_a_user_is_scored_without_a_past(name):
  events = make_events(7)
  events.split = np.where(events.user == 8, 2, events.split)  # whole groups
  start = int(events.first[-1])
  result = baselines.Counts(events).scores(name, [start])
  assert np.isfinite(result).all()


def test_training_samples_are_refused():
  events = make_events()
  with pytest.raises(AssertionError, match='training'):
    baselines.Counts(events).scores('markov', [5])


def test_the_log_is_passed_over_once_for_all_that_is_asked(monkeypatch):
  events, passes = make_events(), []
  blocks = baselines._blocks
  monkeypatch.setattr(
    baselines,
    '_blocks',
    lambda *size, **more: passes.append(1) or blocks(*size, **more),
  )
  counts, samples = baselines.Counts(events), test_samples(events)
  for name in baselines.NAMES * 2:
    counts.scores(name, samples)
  assert len(passes) == 2  # For the hours, and for the transitions.
