"""Stage b's subset: budgets, candidates and the draw."""

import collections
import itertools

import numpy as np
import pytest

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.data import subset as subset_lib
from behaviorlm_jax.errors import InputError

TAILS = 'xyz'


def make_config(**fields):
  config = config_lib.default()
  config.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in fields.items()}
  )
  return config


# Budgets.


def test_balanced_budgets_are_equal(table):
  config = make_config(plan__per_behavior=7)
  assert subset_lib.budgets(table, config).tolist() == [7] * 6


@pytest.mark.parametrize('temper', [0.0, 0.5, 1.0])
def test_tempered_budgets_follow_their_formula_and_have_the_same_sum(table, temper):
  config = make_config(
    plan__per_behavior=50, plan__budget='tempered', plan__temper=temper
  )
  samples = samples_lib.eligible(table, 'train', config)
  n = np.bincount(table.behavior[samples], minlength=6).astype(float)
  found = subset_lib.budgets(table, config)
  rates = n**temper
  np.testing.assert_allclose(found, 300 * rates / rates.sum(), atol=0.5)
  assert abs(found.sum() - 300) <= 3


@pytest.mark.parametrize('budget', ['balanced', 'tempered'])
def test_a_budget_gives_every_learnable_behavior_one_sample_and_others_none(
  table, make_events, budget
):
  least = make_config(plan__per_behavior=1, plan__budget='tempered', plan__temper=1.0)
  assert subset_lib.budgets(table, least).min() == 1
  # The first has too little past.
  events, config = make_events(['zababababab']), make_config(plan__budget=budget)
  names = [item.name for item in events.behaviors]
  found = dict(zip(names, subset_lib.budgets(events, config).tolist(), strict=True))
  assert found.pop('z') == 0 and min(found.values()) > 0 and set(found) == {*'ab'}
  pools = subset_lib.candidates(events, config, np.random.default_rng(0))
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
  rng = np.random.default_rng(0)
  draws = subset_lib.weighted_draw(np.array([7, 8, 9]), [0.0, 1.0, 100.0], 8, rng)
  assert sorted(collections.Counter(draws.tolist()).values()) == [2, 3, 3]
  counts = collections.Counter(
    subset_lib.weighted_draw(np.array([7, 8, 9]), [1.0] * 3, 9, rng).tolist()
  )
  assert counts == {7: 3, 8: 3, 9: 3}


# The subset.


def choose(table, pools, scores=None, **fields):
  return subset_lib.choose(
    pools, scores, table, make_config(**fields), np.random.default_rng(1)
  )


def test_candidates_are_limited_and_the_subset_comes_from_them(table):
  config = make_config(difficulty__candidates=6, plan__per_behavior=5)
  pools = subset_lib.candidates(table, config, np.random.default_rng(0))
  samples = samples_lib.eligible(table, 'train', config)
  for b, pool in pools.items():
    members = samples[table.behavior[samples] == b]
    assert set(pool) <= set(members)
    assert len(set(pool)) == len(pool) == min(6, len(members))
  other = subset_lib.candidates(table, config, np.random.default_rng(1))
  assert other[0].tolist() != pools[0].tolist()
  # As many as the budget wants, however few are to be scored.
  more = subset_lib.candidates(
    table,
    make_config(difficulty__candidates=6, plan__per_behavior=9),
    np.random.default_rng(0),
  )
  assert max(map(len, more.values())) == 9
  subset = choose(table, pools, plan__per_behavior=5)
  assert {b: len(s) for b, s in subset.items()} == dict.fromkeys(
    [b for b in pools if len(pools[b])], 5
  )
  assert all(set(s) <= set(pools[b]) for b, s in subset.items())


def test_gamma_zero_draws_uniformly_and_a_large_one_the_hardest(table):
  pools = subset_lib.candidates(table, make_config(), np.random.default_rng(0))
  pools = {b: pool for b, pool in pools.items() if len(pool) > 20}
  hardest = {b: pool[[3, 11]].tolist() for b, pool in pools.items()}
  scores = {
    int(p): 10.0 if p in hardest[b] else 0.001
    for b, pool in pools.items()
    for p in pool
  }
  uniform = choose(table, pools, plan__per_behavior=2)
  flat = choose(table, pools, scores, plan__gamma=0.0, plan__per_behavior=2)
  hard = choose(table, pools, scores, plan__gamma=3.0, plan__per_behavior=2)
  assert len(pools) >= 2
  for b in pools:
    assert flat[b].tolist() == uniform[b].tolist()
    assert sorted(hard[b]) == hardest[b] != sorted(flat[b])


def test_the_natural_budget_is_as_large_but_not_balanced(table):
  config = make_config(plan__budget='natural', difficulty__candidates=8)
  pools = subset_lib.candidates(table, config, np.random.default_rng(0))
  balanced = subset_lib.candidates(
    table, make_config(difficulty__candidates=8), np.random.default_rng(0)
  )
  assert len(pools[-1]) == sum(map(len, balanced.values()))
  subset = choose(table, pools, plan__budget='natural', plan__per_behavior=3)
  assert len(subset[-1]) == 6 * 3
  assert len(set(subset[-1].tolist())) == 18


def test_negative_difficulty_is_drawn_last_and_then_uniformly(table):
  difficulty, draws = [-3.0, -1.0, 2.0, 0.5], collections.Counter()
  pools, config = {0: np.arange(4) + 100}, make_config(plan__per_behavior=3)
  scores = dict(enumerate(difficulty, start=100))
  for seed in range(3000):
    rng = np.random.default_rng(seed)
    chosen = subset_lib.choose(pools, scores, table, config, rng)[0].tolist()
    assert {102, 103} <= set(chosen)
    draws.update(chosen)
  chi = sum((draws[p] - 1500) ** 2 / 1500 for p in (100, 101))
  assert chi < 10.8  # 0.1 % of one degree.


def test_a_log_without_anything_to_draw_from_is_refused(make_events):
  events = make_events(['ab'])
  with pytest.raises(InputError, match=r'data\.events.*plan\.min_context'):
    subset_lib.budgets(events, make_config())
