"""The plan: what each stream promises, packing, the file, and no leak."""

import collections
import itertools

import numpy as np
import pytest

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import weights

TAILS = 'xyz'


def make_config(**fields):
  config = config_lib.default()
  config.data.instruction = 'Go on.'
  config.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in fields.items()})
  return config


@pytest.fixture(scope='module')
def tokenizer():
  return weights.open_base('random://tiny').tokenizer


@pytest.fixture
def table(make_events):
  """Four users, 157 events, 80 % of them for training; one user is short."""
  generator = np.random.default_rng(0)
  p = [0.4, 0.3, 0.2, 0.05, 0.03, 0.02]
  histories = [''.join(generator.choice(list('abcxyz'), size, p=p))
               for size in (60, 5, 12, 80)]
  return make_events(histories, train=0.8, tails=TAILS)


@pytest.fixture
def make_windows(table, tokenizer):
  def make(events=None, **fields):
    config = make_config(**fields)
    prompts = prompts_lib.Prompts(
      table if events is None else events, tokenizer, config.data)
    return plan_lib.Windows(prompts, config)
  return make


def check_segment(windows, segment):
  """What holds for every window, whatever made it."""
  log, targets = windows.events, np.array(segment.targets)
  tokens, spans = windows.prompts.window(segment.start, segment.stop)
  assert segment.length == len(tokens) <= windows.length
  assert 0 < segment.stop - segment.start <= windows.plan.window
  assert segment.start >= log.first[targets[-1]]
  assert targets[0] - segment.start >= windows.plan.min_context
  assert targets[-1] == segment.stop - 1
  assert (np.diff(targets) > 0).all()
  assert len(segment.weights) == len(targets)
  sizes = np.diff(spans[targets - segment.start])
  assert segment.answers == sizes.sum()


# Tiling.


@pytest.mark.parametrize(('per_row', 'window', 'context', 'length'), [
  (24, 32, 4, 512), (24, 32, 4, 220), (1, 32, 4, 512), (5, 6, 2, 512),
  (100, 10, 1, 512), (3, 32, 4, 150)])
def test_every_sample_is_a_target_once_per_epoch(
  table, make_windows, per_row, window, context, length
):
  windows = make_windows(
    plan__targets_per_row=per_row, plan__window=window,
    plan__min_context=context, train__length=length)
  samples = plan_lib.eligible(table, 'train', context)
  stream = plan_lib.tile(windows, samples, np.random.default_rng(0))
  for _ in range(3):
    seen = []
    while len(seen) < len(samples):
      segment = next(stream)
      check_segment(windows, segment)
      assert len(segment.targets) <= per_row
      assert set(segment.weights) == {1.0}
      seen += segment.targets
    assert sorted(seen) == samples.tolist()


def test_samples_have_enough_past_and_belong_to_the_split(table):
  samples = plan_lib.eligible(table, 'train', 4)
  assert 60 not in samples  # The short user has 4 training events.
  assert len(samples) == 48 - 4 + 0 + 10 - 4 + 64 - 4
  assert (table.split[samples] == 0).all()
  anchors = plan_lib.eligible(table, 'train', 4, anchors_only=True)
  names = [table.behaviors[b].name for b in table.behavior[samples]]
  expected = [s for s, n in zip(samples, names, strict=True) if n not in TAILS]
  assert anchors.tolist() == expected
  assert 0 < len(anchors) < len(samples)
  tests = plan_lib.eligible(table, 'test', 4)
  assert (table.split[tests] == 2).all() and len(tests) == 12 + 1 + 2 + 16


def test_behaviors_of_the_test_split_alone_are_no_samples(make_events):
  events = make_events(['ababababzz'], train=0.8)
  object.__setattr__(events, 'known', 2)
  assert not len(plan_lib.eligible(events, 'test', 4))


def test_only_users_with_more_targets_than_a_window_are_cut_at_random(
  table, make_windows
):
  windows = make_windows(plan__targets_per_row=20, plan__window=28,
                         train__length=2048)
  samples = plan_lib.eligible(table, 'train', 4)
  few, many = (samples[table.user[samples] == user] for user in (2, 3))
  assert len(few) == 6 and len(many) == 60
  firsts = set()
  for seed in range(10):
    rng = np.random.default_rng(seed)
    whole, = windows.user_tiles(few, rng)
    assert whole.targets == tuple(few)
    assert whole.start == table.first[few[0]]  # All of their past.
    firsts.add(len(windows.user_tiles(many, rng)[0].targets))
  assert len(firsts) > 3 and max(firsts) <= 20


def test_one_target_per_row_is_the_classic_prompt(table, make_windows):
  windows = make_windows(plan__targets_per_row=1, data__history=6,
                         plan__window=9)
  samples = plan_lib.eligible(table, 'train', 4)
  stream = plan_lib.tile(windows, samples, np.random.default_rng(0))
  for segment in itertools.islice(stream, len(samples)):
    target, = segment.targets
    assert segment.start == windows.prompts.question_start(target)


def test_a_long_window_loses_context_then_targets_and_is_then_refused(
  table, make_windows
):
  whole = make_windows().make(0, [20, 21, 22], [1.0] * 3)
  assert (whole.start, whole.stop) == (0, 23)
  line = 12  # 'Thu 00:00 a\n', one token a byte.
  shorter = make_windows(train__length=whole.length - 3 * line)
  assert shorter.make(0, [20, 21, 22], [1.0] * 3).start == 3
  least = whole.length - 16 * line
  fewer = make_windows(train__length=least - line)
  segment = fewer.make(0, [20, 21, 22], [1.0, 0.5, 0.25])
  assert (segment.start, segment.targets) == (16, (20, 21))
  assert segment.weights == (1.0, 0.5)
  check_segment(fewer, segment)
  too_short = make_windows(train__length=least - 2 * line - 1)
  with pytest.raises(InputError) as caught:
    too_short.make(0, [20, 21, 22], [1.0] * 3)
  assert f'train.length is {least - 2 * line - 1}' in str(caught.value)
  assert f'needs {least - 2 * line};' in str(caught.value)


# Drawing.


def test_every_prefix_is_balanced_and_repeats_evenly(make_windows):
  subset = {0: np.array([5, 9, 30]), 3: np.array([12]), 4: np.array([]),
            5: np.array([40, 41, 42, 43, 44, 45, 46])}
  windows = make_windows()
  stream = plan_lib.balanced(windows, subset, np.random.default_rng(0))
  owner = {s: b for b, samples in subset.items() for s in samples}
  counts, draws = collections.Counter({0: 0, 3: 0, 5: 0}), collections.Counter()
  for segment in itertools.islice(stream, 200):
    check_segment(windows, segment)
    target, = segment.targets
    counts[owner[target]] += 1
    draws[target] += 1
    assert max(counts.values()) - min(counts.values()) <= 1
    for samples in subset.values():
      drawn = [draws[s] for s in samples]
      assert max(drawn, default=0) - min(drawn, default=0) <= 1


def test_neighbours_are_taught_with_class_balanced_weights(table, make_windows):
  windows = make_windows()
  counts = [b.train_count for b in table.behaviors]
  weight_of = plan_lib.neighbour_weights(table, make_config(
    plan__per_behavior=7))
  assert min(counts) < 7 < max(counts)
  np.testing.assert_allclose(weight_of, [min(1, 7 / n) for n in counts])
  segment = windows.draw(40, weight_of)
  assert segment.targets == tuple(range(20, 41))  # 24 of history, 4 without.
  expected = weight_of[table.behavior[20:40]]
  np.testing.assert_allclose(segment.weights, [*expected, 1.0], rtol=1e-6)
  # Neighbours of another split are context.
  assert windows.draw(50, weight_of).targets == (48, 49, 50)
  # Without room for all, the drawn sample keeps its context.
  tight = make_windows(train__length=segment.length - 1)
  assert tight.draw(40, weight_of).targets == (40,)
  natural = plan_lib.neighbour_weights(table, make_config(
    plan__budget='natural'))
  assert natural.tolist() == [1.0] * table.known


def sequential_draws(weights, size):
  """Exact probability of every set drawn one after another by weight."""
  chances = collections.Counter()
  for order in itertools.permutations(range(len(weights)), size):
    chance, left = 1.0, sum(weights)
    for i in order:
      chance, left = chance * weights[i] / left, left - weights[i]
    chances[frozenset(order)] += chance
  return chances


@pytest.mark.parametrize('size', [1, 2, 3])
def test_draws_follow_the_weights_without_replacement(size):
  weights, n = [0.5, 1.0, 2.0, 4.0, 1.5], 8000
  rng = np.random.default_rng(0)
  draws = collections.Counter(
    frozenset(plan_lib.weighted_draw(np.arange(5), weights, size, rng).tolist())
    for _ in range(n))
  expected = sequential_draws(weights, size)
  if size == 1:
    assert expected[frozenset([3])] == 4 / 9
  assert set(draws) <= set(expected)
  chi = sum((draws[s] - n * p) ** 2 / (n * p) for s, p in expected.items())
  assert chi < {1: 18.5, 2: 27.9, 3: 27.9}[size]  # 0.1 % of 4 and 9 degrees.


def test_a_class_with_too_few_repeats_all_of_them_evenly():
  rng = np.random.default_rng(0)
  draws = plan_lib.weighted_draw(np.array([7, 8, 9]), [0.0, 1.0, 100.0], 8, rng)
  assert sorted(collections.Counter(draws.tolist()).values()) == [2, 3, 3]
  counts = collections.Counter(plan_lib.weighted_draw(
    np.array([7, 8, 9]), [1.0] * 3, 9, rng).tolist())
  assert counts == {7: 3, 8: 3, 9: 3}


def choose(table, pools, scores=None, **fields):
  return plan_lib.choose_subset(pools, scores, table, make_config(**fields),
                                np.random.default_rng(1))


def test_candidates_are_limited_and_the_subset_comes_from_them(table):
  config = make_config(difficulty__candidates=6)
  pools = plan_lib.candidates(table, config, np.random.default_rng(0))
  samples = plan_lib.eligible(table, 'train', 4)
  for b, pool in pools.items():
    members = samples[table.behavior[samples] == b]
    assert set(pool) <= set(members)
    assert len(set(pool)) == len(pool) == min(6, len(members))
  other = plan_lib.candidates(table, config, np.random.default_rng(1))
  assert other[0].tolist() != pools[0].tolist()
  subset = choose(table, pools, plan__per_behavior=5)
  assert {b: len(s) for b, s in subset.items()} == dict.fromkeys(
    [b for b in pools if len(pools[b])], 5)
  assert all(set(s) <= set(pools[b]) for b, s in subset.items())


def test_gamma_zero_draws_uniformly_and_a_large_one_the_hardest(table):
  pools = plan_lib.candidates(table, make_config(), np.random.default_rng(0))
  pools = {b: pool for b, pool in pools.items() if len(pool) > 20}
  hardest = {b: pool[[3, 11]].tolist() for b, pool in pools.items()}
  scores = {int(p): 10.0 if p in hardest[b] else 0.001
            for b, pool in pools.items() for p in pool}
  uniform = choose(table, pools, plan__per_behavior=2)
  flat = choose(table, pools, scores, plan__gamma=0.0, plan__per_behavior=2)
  hard = choose(table, pools, scores, plan__gamma=3.0, plan__per_behavior=2)
  assert len(pools) >= 2
  for b in pools:
    assert flat[b].tolist() == uniform[b].tolist()
    assert sorted(hard[b]) == hardest[b] != sorted(flat[b])


def test_per_anchor_sets_the_anchors_apart(table):
  pools = plan_lib.candidates(table, make_config(), np.random.default_rng(0))
  tails = [b for b, item in enumerate(table.behaviors) if item.name in TAILS]
  none = choose(table, pools, plan__per_anchor=0, plan__per_behavior=3)
  assert {b: len(s) for b, s in none.items()} == dict.fromkeys(tails, 3)
  some = choose(table, pools, plan__per_anchor=1, plan__per_behavior=3)
  assert {b: len(s) for b, s in some.items()} == {
    b: 3 if b in tails else 1 for b in pools}


def test_the_natural_budget_is_as_large_but_not_balanced(table, make_windows):
  config = make_config(plan__budget='natural', difficulty__candidates=8)
  pools = plan_lib.candidates(table, config, np.random.default_rng(0))
  balanced = plan_lib.candidates(
    table, make_config(difficulty__candidates=8), np.random.default_rng(0))
  assert len(pools[-1]) == sum(map(len, balanced.values()))
  subset = choose(table, pools, plan__budget='natural', plan__per_anchor=1,
                  plan__per_behavior=4)
  assert len(subset[-1]) == 3 * 1 + 3 * 4
  assert len(set(subset[-1].tolist())) == 15
  stream = plan_lib.natural(make_windows(), subset, np.random.default_rng(0))
  targets = [s.targets[0] for s in itertools.islice(stream, 30)]
  assert sorted(targets) == sorted([*subset[-1]] * 2)


def test_a_stage_without_samples_is_refused(make_windows):
  rng = np.random.default_rng(0)
  for stream in (plan_lib.tile(make_windows(), np.array([], int), rng),
                 plan_lib.balanced(make_windows(), {0: np.array([])}, rng)):
    with pytest.raises(InputError, match=r'data\.events.*plan\.min_context'):
      next(stream)


def test_most_answers_are_those_of_the_fullest_rows_of_a_device():
  rng = np.random.default_rng(0)
  counts = 16 * rng.integers(0, 100, 24)  # So that nothing is rounded.
  rows = [[{'answers': int(n) // 2}, {'answers': int(n) - int(n) // 2}]
          for n in counts]
  found = plan_lib.most_answers(plan_lib.Plan(rows, 0, ''), 12, 2, 3)
  # Steps of 12 rows, even and odd ones a micro-batch, 3 devices of 2 rows each.
  sums = [step[part::2][2 * device:2 * device + 2].sum()
          for step in (counts[:12], counts[12:]) for part in (0, 1)
          for device in (0, 1, 2)]
  assert found == max(sums)
