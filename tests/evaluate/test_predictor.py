"""What is said of a predictor: against scikit-learn and brute force."""

import dataclasses

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from behaviorlm_jax.evaluate import decisions, metrics, predictor
from behaviorlm_jax.score.label_tree import log_softmax

NAMES, ANCHOR = 8, np.arange(8) < 3
LOG_PI = log_softmax(-np.log(np.arange(1, 9))[None])[0]


def draw(n, seed, sharp=1.5):
  """log p [n, Y] that is true, and labels [n]."""
  rng = np.random.default_rng(seed)
  log_p = log_softmax(LOG_PI + sharp * rng.standard_normal((n, NAMES)))
  true = (np.exp(log_p).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
  return log_p, np.minimum(true, NAMES - 1)


@pytest.fixture(scope='module')
def drawn():
  """(truth, test scores, validation scores)."""
  (test, true), (held, labels) = draw(500, 0), draw(400, 1)
  return predictor.Truth(true, labels, ANCHOR, LOG_PI, 0.01), test, held


def test_each_group_has_scores_of_ranks_and_of_probabilities(drawn):
  truth, test, held = drawn
  found = predictor.assess(truth, 2 * test, 2 * held).summary  # Too sure by half.
  assert list(found) == [
    *metrics.GROUPS,
    *('ece', 'reliability', 'calibration', 'points'),
  ]
  p = np.exp(log_softmax(2 * test))
  loss = sklearn_metrics.log_loss(truth.true, p, labels=range(NAMES))
  assert found['all']['log_p'] == pytest.approx(-loss)
  f1 = sklearn_metrics.f1_score(truth.true, p.argmax(axis=1), average='macro')
  assert found['all']['f1_macro'] == pytest.approx(f1)
  confidence, accuracy, share = np.transpose(found['reliability'])
  assert found['ece'] == pytest.approx(share @ abs(confidence - accuracy))
  # As it is sharpened by 2, so is it softened.
  assert found['calibration']['a'] == pytest.approx(0.5, abs=0.1)
  assert found['calibration']['validation_samples'] == 400


def test_a_point_has_the_scores_of_what_it_chooses(drawn):
  found = predictor.assess(*drawn)
  truth, points = drawn[0], found.summary['points']
  assert tuple(points) == tuple(found.chosen) == decisions.POINTS
  for name, chosen in found.chosen.items():
    assert points[name]['all']['accuracy@1'] == np.mean(chosen == truth.true)
    for group, members in (('anchor', ANCHOR), ('tail', ~ANCHOR)):
      f1 = sklearn_metrics.f1_score(
        truth.true, chosen, labels=np.flatnonzero(members), average='macro'
      )
      assert points[name][group]['f1_macro'] == pytest.approx(f1)
  assert points['accuracy']['how'] == 'argmax'
  f1 = lambda point, group: points[point][group]['f1_macro']
  assert f1('macro_f1', 'all') > f1('accuracy', 'all')
  assert f1('tail', 'tail') > f1('accuracy', 'tail')


def test_points_are_frozen_and_decide_event_by_event(drawn):
  """Neither labels nor other events of the test split change a choice."""
  truth, test, held = drawn
  chosen = predictor.assess(truth, test, held).chosen
  other = dataclasses.replace(truth, true=np.roll(truth.true, 1))
  shuffled = predictor.assess(other, test, held).chosen
  few = dataclasses.replace(truth, true=truth.true[:7])
  alone = predictor.assess(few, test[:7], held).chosen
  for point in decisions.POINTS:
    np.testing.assert_array_equal(shuffled[point], chosen[point])
    np.testing.assert_array_equal(alone[point], chosen[point][:7])


def test_scores_that_are_no_probabilities_become_some(drawn):
  """Places in the order of the list; the best a and b of a grid."""
  truth, *both = drawn
  test, held = (np.argsort(np.argsort(scores, axis=1), axis=1) for scores in both)
  found = predictor.assess(truth, test, held, likely=False)
  a, b = (found.summary['calibration'][name] for name in 'ab')

  def loss(a, b):
    log_p = log_softmax(a * held + b * LOG_PI)
    return -log_p[np.arange(len(held)), truth.validation].mean()

  grid = [loss(x, y) for x in np.linspace(0, 2, 21) for y in np.linspace(-1, 2, 31)]
  assert min(grid) - 0.01 < loss(a, b) <= min(grid)
  expected = log_softmax(a * test + b * LOG_PI)[np.arange(len(test)), truth.true]
  np.testing.assert_allclose(found.log_prob, expected)
  assert found.summary['all']['log_p'] == pytest.approx(expected.mean())
  assert found.summary['ece'] < 0.1


def test_without_validation_samples_nothing_is_calibrated_or_decided(drawn):
  truth, test, _ = drawn
  truth = dataclasses.replace(truth, validation=np.zeros(0, int))
  found = predictor.assess(truth, test)
  assert not found.chosen and not {'calibration', 'points'} & set(found.summary)
  own = test[np.arange(len(test)), truth.true]
  np.testing.assert_allclose(found.log_prob, own)
  # Scores that are no probabilities have none then.
  other = predictor.assess(truth, test, likely=False)
  assert other.log_prob is None and list(other.summary) == list(metrics.GROUPS)
  assert 'log_p' not in other.summary['all']
