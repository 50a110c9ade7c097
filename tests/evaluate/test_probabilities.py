"""Scores of probabilities, held against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from behaviorlm_jax.evaluate import probabilities
from behaviorlm_jax.score.label_tree import log_softmax


def draw(n=300, names=7, seed=0):
  rng = np.random.default_rng(seed)
  log_p = log_softmax(2 * rng.standard_normal((n, names)))
  return rng.integers(0, names - 1, n), log_p  # The last name has no event.


@pytest.mark.parametrize('ties', [False, True])
def test_average_precision_is_that_of_scikit_learn(ties):
  true, log_p = draw()
  if ties:
    log_p = np.round(log_p)
  found = probabilities.average_precision(true, log_p)
  for name in range(6):
    expected = sklearn_metrics.average_precision_score(true == name, log_p[:, name])
    assert found[name] == pytest.approx(expected)
  assert np.isnan(found[6])


def test_log_p_is_scikit_learns_log_loss():
  true, log_p = draw()
  scores = probabilities.by_group(true, log_p, np.arange(7) < 2)
  expected = -sklearn_metrics.log_loss(true, np.exp(log_p), labels=range(7))
  assert scores['all']['log_p'] == pytest.approx(expected)


def test_groups_have_their_own_events_and_names():
  log_p = np.log([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
  scores = probabilities.by_group(
    np.array([0, 1]), log_p, np.array([True, False, False])
  )
  assert scores['anchor']['log_p'] == pytest.approx(np.log(0.7))
  assert scores['tail']['log_p'] == pytest.approx(np.log(0.3))
  assert scores['tail']['map'] == 1.0  # Of name 1 alone: name 2 has no event.
  assert scores['all']['coverage@5'] == 1.0
  empty = probabilities.by_group(np.array([0, 0]), log_p, np.ones(3, bool))['tail']
  assert empty == {'log_p': 0.0, 'map': 0.0, 'coverage@5': 0.0}


def test_coverage_counts_names_among_the_five_likeliest():
  log_p = log_softmax(-np.arange(8.0)[None].repeat(3, axis=0))
  scores = probabilities.by_group(np.zeros(3, int), log_p, np.arange(8) < 4)
  assert scores['all']['coverage@5'] == 5 / 8
  assert scores['tail']['coverage@5'] == 1 / 4


def test_calibration_error_by_hand():
  log_p = np.log([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
  table = probabilities.reliability(np.array([0, 1, 0, 1]), log_p)
  # Half of the events at 0.9 are right half of the time, the others always.
  assert probabilities.calibration_error(table) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)
  assert table[:, 2].sum() == 1


def test_probabilities_that_are_true_have_no_calibration_error():
  rng = np.random.default_rng(0)
  log_p = log_softmax(2 * rng.standard_normal((50_000, 4)))
  true = (np.exp(log_p).cumsum(axis=1) < rng.random((50_000, 1))).sum(axis=1)
  table = probabilities.reliability(np.minimum(true, 3), log_p)
  assert probabilities.calibration_error(table) < 0.01
