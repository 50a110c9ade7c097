"""Stage b's subset: budgets, candidates and the draw."""

import collections
import itertools

import numpy as np
import pytest

from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.data import subset as subset_lib
from behaviorlm_jax.errors import InputError


@pytest.fixture
def make_budget(table):
  def make(per_behavior=20, kind='balanced', temper=0.5, events=None):
    samples = samples_lib.of_split(events or table, 'train', 4)
    return subset_lib.Budget(samples, kind, per_behavior, temper)

  return make


# Budgets.


def test_balanced_budgets_are_equal(make_budget):
  assert make_budget(7).sizes.tolist() == [7] * 6


@pytest.mark.parametrize('temper', [0.0, 0.5, 1.0])
def test_tempered_budgets_follow_their_formula_and_have_the_same_sum(
  table, make_budget, temper
):
  budget = make_budget(50, 'tempered', temper)
  samples = budget.samples.all()
  n = np.bincount(table.behavior[samples], minlength=6).astype(float)
  found = budget.sizes
  rates = n**temper
  np.testing.assert_allclose(found, 300 * rates / rates.sum(), atol=0.5)
  assert abs(found.sum() - 300) <= 3


@pytest.mark.parametrize('kind', ['balanced', 'tempered'])
def test_a_budget_gives_every_learnable_behavior_one_sample_and_others_none(
  make_budget, make_events, kind
):
  assert make_budget(1, 'tempered', 1.0).sizes.min() == 1
  # The first has too little past.
  events = make_events(['zababababab'])
  budget = make_budget(kind=kind, events=events)
  names = [item.name for item in events.behaviors]
  found = dict(zip(names, budget.sizes.tolist(), strict=True))
  assert found.pop('z') == 0 and min(found.values()) > 0 and set(found) == {*'ab'}
  pools = budget.candidates(64, np.random.default_rng(0))
  assert {names[b] for b in pools} == {*'ab'}


# Draws.


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
    frozenset(subset_lib.weighted_draw(np.arange(5), weights, size, rng).tolist())
    for _ in range(n)
  )
  expected = sequential_draws(weights, size)
  if size == 1:
    assert expected[frozenset([3])] == 4 / 9
  assert set(draws) <= set(expected)
  chi = sum((draws[s] - n * p) ** 2 / (n * p) for s, p in expected.items())
  assert chi < {1: 18.5, 2: 27.9, 3: 27.9}[size]  # 0.1 % of 4 and 9 degrees.


def test_a_class_with_too_few_repeats_all_of_them_evenly():
  rng, positions = np.random.default_rng(0), np.array([7, 8, 9])
  for weights, size, times in (([0, 1, 100], 8, [2, 3, 3]), ([1, 1, 1], 9, [3, 3, 3])):
    drawn = subset_lib.weighted_draw(positions, weights, size, rng)
    assert sorted(collections.Counter(drawn.tolist()).values()) == times


# The subset.


def choose(budget, pools, scores=None, gamma=1.0):
  return budget.choose(pools, scores, gamma, np.random.default_rng(1))


def test_candidates_are_limited_and_the_subset_comes_from_them(table, make_budget):
  budget = make_budget(5)
  pools = budget.candidates(6, np.random.default_rng(0))
  samples = budget.samples.all()
  for b, pool in pools.items():
    members = samples[table.behavior[samples] == b]
    assert set(pool) <= set(members)
    assert len(set(pool)) == len(pool) == min(6, len(members))
  other = budget.candidates(6, np.random.default_rng(1))
  assert other[0].tolist() != pools[0].tolist()
  # As many as the budget wants, however few are to be scored.
  more = make_budget(9).candidates(6, np.random.default_rng(0))
  assert max(map(len, more.values())) == 9
  subset = choose(budget, pools)
  assert {b: len(s) for b, s in subset.items()} == dict.fromkeys(pools, 5)
  assert all(set(s) <= set(pools[b]) for b, s in subset.items())


def test_gamma_zero_draws_uniformly_and_a_large_one_the_hardest(make_budget):
  pools = make_budget().candidates(64, np.random.default_rng(0))
  pools = {b: pool for b, pool in pools.items() if len(pool) > 20}
  hardest = {b: pool[[3, 11]].tolist() for b, pool in pools.items()}
  scores = {
    int(p): 10.0 if p in hardest[b] else 0.001
    for b, pool in pools.items()
    for p in pool
  }
  budget = make_budget(2)
  uniform = choose(budget, pools)
  flat, hard = (choose(budget, pools, scores, gamma) for gamma in (0.0, 3.0))
  assert len(pools) >= 2
  for b in pools:
    assert flat[b].tolist() == uniform[b].tolist()
    assert sorted(hard[b]) == hardest[b] != sorted(flat[b])


def test_the_natural_budget_is_as_large_but_not_balanced(make_budget):
  natural = make_budget(3, 'natural')
  pools = natural.candidates(8, np.random.default_rng(0))
  balanced = make_budget(3).candidates(8, np.random.default_rng(0))
  assert len(pools[-1]) == sum(map(len, balanced.values()))
  drawn = choose(natural, pools)[-1]
  assert len(drawn) == len(set(drawn.tolist())) == 6 * 3


def test_negative_difficulty_is_drawn_last_and_then_uniformly(make_budget):
  difficulty, draws = [-3.0, -1.0, 2.0, 0.5], collections.Counter()
  pools, budget = {0: np.arange(4) + 100}, make_budget(3)
  scores = dict(enumerate(difficulty, start=100))
  for seed in range(3000):
    rng = np.random.default_rng(seed)
    chosen = budget.choose(pools, scores, 1.0, rng)[0].tolist()
    assert {102, 103} <= set(chosen)
    draws.update(chosen)
  chi = sum((draws[p] - 1500) ** 2 / 1500 for p in (100, 101))
  assert chi < 10.8  # 0.1 % of one degree.


def test_a_log_without_anything_to_draw_from_is_refused(make_budget, make_events):
  with pytest.raises(InputError, match=r'data\.events.*plan\.min_context'):
    _ = make_budget(events=make_events(['ab'])).sizes
