"""Difficulty scores against their formulas, one sample at a time."""

import math

import numpy as np
import pytest

from behaviorlm_jax.score import difficulty

NAMES = ('nll', 'error', 'margin')


@pytest.fixture
def scores():
  rng = np.random.default_rng(0)
  return rng.normal(-6, 3, (40, 7)).astype(np.float32), rng.integers(7, size=40)


def brute_force(name, row, true):
  loss = lambda s: -math.log(math.exp(s[true]) / sum(map(math.exp, s)))
  if name == 'nll':
    return loss(row)
  if name == 'error':
    return 1 - math.exp(row[true]) / sum(map(math.exp, row))
  return max(s for y, s in enumerate(row) if y != true) - row[true]


@pytest.mark.parametrize('name', NAMES)
def test_each_score_equals_a_brute_force_computation(name, scores):
  mine, true = scores
  found = difficulty.compute(name, mine, true)
  expected = [
    brute_force(name, *row) for row in zip(mine.tolist(), true.tolist(), strict=True)
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  # Far from uniform: the samples can be told apart.
  assert np.ptp(found) > 0.5


@pytest.mark.parametrize('name', NAMES)
def test_certain_and_hopeless_samples_have_finite_scores(name):
  mine = np.array([[0.0, -500.0], [0.0, -500.0]])
  found = difficulty.compute(name, mine, np.array([0, 1]))
  assert np.isfinite(found).all()
  assert found[1] >= found[0]


@pytest.mark.parametrize('name', NAMES)
def test_a_list_of_one_behavior_is_not_hard(name):
  ones = np.array([[-3.0]])
  assert difficulty.compute(name, ones, np.array([0])).tolist() == [0.0]
