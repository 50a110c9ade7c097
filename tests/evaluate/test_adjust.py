"""What is fitted on the validation split, against brute force."""

import itertools
import math

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from behaviorlm_jax.evaluate import adjust

COUNTS = np.array([600, 300, 80, 15, 5])


@pytest.fixture
def make_predictions():
  def make(n=400, seed=0, noise=1.0):
    """True ids by frequency, and log p that know some of them."""
    rng = np.random.default_rng(seed)
    true = rng.choice(5, n, p=COUNTS / COUNTS.sum())
    logits = rng.normal(0, noise, (n, 5)) + np.log(COUNTS)
    logits[np.arange(n), true] += 2
    return logits - np.log(np.exp(logits).sum(1, keepdims=True)), true

  return make


def test_the_prior_is_the_training_frequency_and_never_zero():
  prior = np.exp(adjust.log_prior([3, 0, 1]))
  np.testing.assert_allclose(prior, [4 / 7, 1 / 7, 2 / 7])


def test_adjusted_choices_equal_a_brute_force_computation(make_predictions):
  log_p, _ = make_predictions(50)
  prior = adjust.log_prior(COUNTS)
  found = adjust.apply({'tau': 0.7}, log_p, None, prior).argmax(1)
  for row, choice in zip(log_p, found, strict=True):
    scores = [
      row[y] - 0.7 * math.log((COUNTS[y] + 1) / (COUNTS.sum() + 5)) for y in range(5)
    ]
    assert scores.index(max(scores)) == choice
  assert (found != log_p.argmax(1)).any()


def test_tau_has_the_best_macro_f1_of_all(make_predictions):
  log_p, true = make_predictions()
  prior = adjust.log_prior(COUNTS)
  tau = adjust.fit_tau(log_p, prior, true)
  f1 = {
    t: sklearn_metrics.f1_score(
      true,
      (log_p - t * prior).argmax(1),
      labels=range(5),
      average='macro',
      zero_division=0,
    )
    for t in adjust.TAUS
  }
  assert f1[tau] == pytest.approx(max(f1.values()))
  assert tau > 0 and f1[tau] > f1[0.0]


def test_tau_below_zero_undoes_a_balanced_model(make_predictions):
  log_p, true = make_predictions(2000)
  prior = adjust.log_prior(COUNTS)
  # Rare names raised twice over, as a model would that saw them too often.
  assert adjust.fit_tau(log_p - 2 * prior, prior, true) < 0


def test_tau_stays_zero_where_it_changes_nothing():
  log_p = np.log(np.full((4, 5), 1e-9) + np.eye(5)[[0, 1, 0, 1]])
  assert adjust.fit_tau(log_p, adjust.log_prior(COUNTS), np.array([0, 1, 0, 1])) == 0.0


def test_the_mix_has_the_least_loss_and_lies_between(make_predictions):
  log_p, true = make_predictions()
  rng = np.random.default_rng(5)
  counted = rng.normal(0, 1, log_p.shape)
  counted[np.arange(len(true)), true] += 1.5
  counted -= np.log(np.exp(counted).sum(1, keepdims=True))

  def loss(a, b):
    total = 0.0
    for p, c, y in zip(log_p, counted, true, strict=True):
      scores = a * p + b * c
      total -= scores[y] - math.log(np.exp(scores).sum())
    return total / len(true)

  a, b = adjust.fit_mix(log_p, counted, true)
  grid = itertools.product(adjust.WEIGHTS[::3], adjust.WEIGHTS[::3])
  assert loss(a, b) <= min(loss(*pair) for pair in grid) + 1e-9
  assert loss(a, b) < min(loss(1, 0), loss(0, 1))
  np.testing.assert_allclose(np.exp(adjust.mix_log_p(log_p, counted, a, b)).sum(1), 1)


def test_a_useless_count_model_gets_no_weight(make_predictions):
  log_p, true = make_predictions()
  wrong = np.full_like(log_p, -9.0)
  wrong[np.arange(len(true)), (true + 1) % 5] = 0.0
  assert adjust.fit_mix(log_p, wrong, true)[1] == 0.0


def test_fit_gives_what_apply_takes(make_predictions):
  log_p, true = make_predictions()
  counted, _ = make_predictions(seed=1)
  prior = adjust.log_prior(COUNTS)
  numbers = adjust.fit(log_p, counted, prior, true)
  assert tuple(numbers) == adjust.NAMES
  mixed = adjust.apply(numbers['mixed'], log_p, counted, prior)
  both = adjust.apply(numbers['mixed_adjusted'], log_p, counted, prior)
  np.testing.assert_allclose(both, mixed - numbers['mixed_adjusted']['tau'] * prior)


def test_the_trade_off_moves_from_anchors_to_the_tail(make_predictions):
  log_p, true = make_predictions(3000)
  prior, anchor = adjust.log_prior(COUNTS), COUNTS > 50
  points = adjust.trade_off(adjust.first_choices(log_p, prior), true, anchor)
  assert points.shape == (len(adjust.TAUS), 2)
  here = adjust.TAUS.index(0.5)
  predicted = (log_p - 0.5 * prior).argmax(1)
  for column, members in enumerate(([0, 1, 2], [3, 4])):
    assert points[here, column] == pytest.approx(
      sklearn_metrics.f1_score(
        true, predicted, labels=members, average='macro', zero_division=0
      )
    )
  assert points[0, 1] < points[here, 1]
