"""The plan: what each stream promises, packing, the file, and no leak."""

import collections
import dataclasses
import itertools
import types

import numpy as np
import pytest

from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.data import subset as subset_lib
from behaviorlm_jax.errors import InputError


def check_segment(windows, segment):
  """What holds for every window, whatever made it."""
  log, targets = windows.samples.events, np.array(segment.targets)
  tokens, spans = windows.prompts.window(segment.start, segment.stop)
  assert segment.length == len(tokens) <= windows.length
  assert 0 < segment.stop - segment.start <= windows.window
  assert segment.start >= log.first[targets[-1]]
  assert targets[0] - segment.start >= windows.samples.min_context
  assert targets[-1] == segment.stop - 1
  assert (np.diff(targets) > 0).all()
  assert len(segment.weights) == len(targets)
  sizes = np.diff(spans[targets - segment.start])
  assert segment.answers == sizes.sum()


# Tiling.


@pytest.mark.parametrize(
  ('per_row', 'window', 'context', 'length'),
  [
    (24, 32, 4, 512),
    (24, 32, 4, 220),
    (1, 32, 4, 512),
    (5, 6, 2, 512),
    (100, 10, 1, 512),
    (3, 32, 4, 150),
  ],
)
def test_every_sample_is_a_target_once_per_epoch(
  make_windows, per_row, window, context, length
):
  windows = make_windows(
    plan__targets_per_row=per_row,
    plan__window=window,
    plan__min_context=context,
    train__length=length,
  )
  samples = windows.samples.all()
  stream = plan_lib.tile(windows, np.random.default_rng(0))
  for _ in range(3):
    seen = []
    while len(seen) < len(samples):
      segment = next(stream)
      check_segment(windows, segment)
      assert len(segment.targets) <= per_row
      assert set(segment.weights) == {1.0}
      seen += segment.targets
    assert sorted(seen) == samples.tolist()


def test_only_users_with_more_targets_than_a_window_are_cut_at_random(
  table, make_windows
):
  windows = make_windows(plan__targets_per_row=20, plan__window=28, train__length=2048)
  samples = windows.samples.all()
  few, many = (samples[table.user[samples] == user] for user in (2, 3))
  assert len(few) == 6 and len(many) == 60
  firsts = set()
  for seed in range(10):
    rng = np.random.default_rng(seed)
    begins, sizes = windows.tiles(few, rng)
    assert (begins.tolist(), sizes.tolist()) == ([few[0]], [len(few)])
    # All of their past.
    assert windows.first_event(few[0]) == table.first[few[0]]
    begins, sizes = windows.tiles(many, rng)
    assert begins[0] == many[0]
    firsts.add(int(sizes[0]))
  assert len(firsts) > 3 and max(firsts) <= 20


def user_tiles(windows, positions, rng):
  """What `Windows.tiles` does for all users at once, for one, in words."""
  per_row, i, tiles = windows.targets_per_row, 0, []
  limit = per_row
  if len(positions) > per_row:
    limit = int(rng.integers(1, per_row + 1))
  while i < len(positions):
    start = int(windows.first_event(positions[i]))
    inside = np.searchsorted(positions, start + windows.window)
    stop = max(i + 1, min(i + limit, inside))
    tiles.append(windows.make(start, positions[i:stop], [1.0] * (stop - i)))
    i += len(tiles[-1].targets)
    limit = per_row
  return tiles


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'train__length': 150},
    {'plan__targets_per_row': 1},
    {'plan__targets_per_row': 5},
    {'plan__window': 10, 'plan__min_context': 1, 'a__content': 'all'},
  ],
)
@pytest.mark.parametrize('block', [1, 1000])
@pytest.mark.parametrize('anchors_only', [True, False])
def test_all_users_are_tiled_as_each_would_be(
  table, make_windows, monkeypatch, fields, block, anchors_only
):
  monkeypatch.setattr(samples_lib, '_BLOCK', block)
  windows = make_windows(anchors_only=anchors_only, **fields)
  found = list(itertools.islice(plan_lib.tile(windows, np.random.default_rng(1)), 100))
  rng = np.random.default_rng(1)
  positions = windows.samples.all()
  users = np.split(positions, 1 + np.flatnonzero(np.diff(table.user[positions])))
  expected = []
  while len(expected) < 100:
    epoch = [tile for user in users for tile in user_tiles(windows, user, rng)]
    expected += [epoch[i] for i in rng.permutation(len(epoch))]
  assert found == expected[:100]


def test_one_target_per_row_is_the_classic_prompt(make_windows):
  windows = make_windows(plan__targets_per_row=1, data__history=6, plan__window=9)
  stream = plan_lib.tile(windows, np.random.default_rng(0))
  for segment in itertools.islice(stream, len(windows.samples.all())):
    (target,) = segment.targets
    assert segment.start == windows.prompts.question_start(target)


def test_a_long_window_loses_context_and_then_targets(make_windows):
  whole = make_windows().make(0, [20, 21, 22], [1.0] * 3)
  assert (whole.start, whole.stop) == (0, 23)
  line = 12  # 'Thu 00:00 a\n', one token a byte.
  shorter = make_windows(train__length=whole.length - 3 * line)
  assert shorter.make(0, [20, 21, 22], [1.0] * 3).start == 3
  least = whole.length - 16 * line
  fewer = make_windows(train__length=least - line)
  segment = fewer.make(0, [20, 21, 22], [1.0, 0.5, 0.25])
  assert (segment.start, segment.targets) == (16, [20, 21])
  assert segment.weights == [1.0, 0.5]
  check_segment(fewer, segment)
  shortest = make_windows(train__length=least - 2 * line)
  assert shortest.make(0, [20, 21, 22], [1.0] * 3).targets == [20]
  with pytest.raises(InputError, match=rf'train.length is {least - 2 * line - 1} .*'):
    plan_lib.check_lengths(shortest.prompts, 4, least - 2 * line - 1)


# Drawing.


@pytest.mark.parametrize(
  'rates',
  [{0: 1, 3: 1, 4: 1, 5: 1}, {0: 4, 3: 4, 4: 9, 5: 4}, {0: 7, 3: 1, 4: 2, 5: 0}],
)
def test_every_prefix_keeps_the_rates_and_repeats_evenly(make_windows, rates):
  samples = {
    0: np.array([5, 9, 30]),
    3: np.array([12]),
    4: np.array([]),
    5: np.array([40, 41, 42, 43, 44, 45, 46]),
  }
  windows = make_windows()
  stream = plan_lib.spread(windows, samples, rates, np.random.default_rng(0))
  owner = {s: b for b, mine in samples.items() for s in mine}
  kept = {b: m for b, m in rates.items() if m and b != 4}
  counts, draws = collections.Counter(), collections.Counter()
  for drawn, segment in enumerate(itertools.islice(stream, 300), start=1):
    check_segment(windows, segment)
    (target,) = segment.targets
    counts[owner[target]] += 1
    draws[target] += 1
    epochs = drawn / sum(kept.values())
    for b, rate in kept.items():
      # One of its own, and the others' that came early or late.
      assert abs(counts[b] - epochs * rate) < 1 + rate * len(kept) / sum(kept.values())
      times = [draws[s] for s in samples[b]]
      assert max(times) - min(times) <= 1
    if len(set(kept.values())) == 1:
      assert max(counts.values()) - min(counts[b] for b in kept) <= 1
  assert set(counts) == set(kept)


def test_neighbours_are_taught_with_class_balanced_weights(table, make_windows):
  windows = make_windows()
  budget = subset_lib.Budget(windows.samples, 'balanced', 14, 0.5)
  weight_of = budget.neighbour_weights(0.5)
  counts = windows.samples.counts
  assert min(counts) < 7 < max(counts)
  np.testing.assert_allclose(weight_of, [min(1, 7 / n) for n in counts])
  segment = windows.draw(40, weight_of)
  assert segment.targets == [*range(20, 41)]  # 24 of history, 4 without.
  expected = weight_of[table.behavior[20:40]]
  np.testing.assert_allclose(segment.weights, [*expected, 1.0], rtol=1e-6)
  # Neighbours of another split are context.
  tests = make_windows(split='test')
  assert tests.draw(50, weight_of).targets == [48, 49, 50]
  # Without room for all, the drawn sample keeps its context.
  tight = make_windows(train__length=segment.length - 1)
  assert tight.draw(40, weight_of).targets == [40]
  natural = dataclasses.replace(budget, kind='natural')
  assert natural.neighbour_weights(0.5).tolist() == [1.0] * table.known


def test_a_stage_without_samples_is_refused(make_windows):
  none, rng = make_windows(split='validation'), np.random.default_rng(0)
  for stream in (
    plan_lib.tile(none, rng),
    plan_lib.spread(none, {0: np.array([])}, {0: 1}, rng),
  ):
    with pytest.raises(InputError, match=r'data\.events.*plan\.min_context'):
      next(stream)


def test_most_answers_are_those_of_the_fullest_rows_of_a_device():
  rng = np.random.default_rng(0)
  counts = 16 * rng.integers(0, 100, 24)  # So that nothing is rounded.
  rows = [
    [types.SimpleNamespace(answers=part) for part in (n // 2, n - n // 2)]
    for n in counts
  ]
  plan = plan_lib.Plan(rows, 0, '')
  found = plan_lib.most_answers(plan, 12, 2, 3)
  # Steps of 12 rows, even and odd ones a micro-batch, 3 devices of 2 rows each.
  sums = [
    step[part::2][2 * device : 2 * device + 2].sum()
    for step in (counts[:12], counts[12:])
    for part in (0, 1)
    for device in (0, 1, 2)
  ]
  assert found == max(sums)
