"""Rules: the plug-in one is the best there is, and each keeps its promise."""

import itertools

import numpy as np
import pytest

from behaviorlm_jax.evaluate import decisions, metrics
from behaviorlm_jax.score.label_tree import log_softmax


def draw(n, names, seed=0, sharp=2.0):
  """Contexts of which p is true: p [n, Y] with rare names, and labels [n]."""
  rng = np.random.default_rng(seed)
  rare = -np.log(np.arange(1, names + 1))
  p = np.exp(log_softmax(rare + sharp * rng.standard_normal((n, names))))
  true = (p.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
  return p, np.minimum(true, names - 1)


def test_expected_f1_is_the_f1_of_labels_drawn_from_p():
  p, _ = draw(400, 5)
  chosen = decisions.of_tau(0.5, np.log(p.mean(axis=0))).choose(p)
  rng = np.random.default_rng(1)
  found = []
  for _ in range(300):
    true = (p.cumsum(axis=1) < rng.random((len(p), 1))).sum(axis=1)
    found.append(metrics.per_behavior(np.minimum(true, 4), chosen, 5)[2])
  np.testing.assert_allclose(
    decisions.expected_f1(p, chosen), np.mean(found, axis=0), atol=0.01
  )


@pytest.mark.parametrize('seed', range(5))
def test_the_plug_in_rule_is_the_best_of_an_exhaustive_search(seed):
  """Of all choices of eight contexts' kinds, each standing for many."""
  kinds, _ = draw(8, 3, seed)
  p = np.repeat(kinds, 50, axis=0)  # One context has no weight by itself.
  weights = np.full(3, 1 / 3)
  value = lambda chosen: weights @ decisions.expected_f1(p, chosen)
  best = max(
    value(np.repeat(choice, 50)) for choice in itertools.product(range(3), repeat=8)
  )
  found = value(decisions.plug_in(p, weights).choose(p))
  assert found == pytest.approx(best, abs=0.01)
  assert found > value(p.argmax(axis=1)) + 0.005 or found == pytest.approx(best)


def test_the_plug_in_rule_beats_argmax_and_tau_on_events_to_come():
  seen, _ = draw(4000, 40, 1)
  new, true = draw(20_000, 40, 2)
  log_pi = np.log(seen.mean(axis=0))
  f1 = lambda rule: metrics.per_behavior(true, rule.choose(new), 40)[2].mean()
  found = f1(decisions.plug_in(seen, np.full(40, 1 / 40)))
  others = [f1(decisions.of_tau(tau, log_pi)) for tau in np.linspace(0, 1.5, 16)]
  assert found > max(others) > others[0]


@pytest.mark.parametrize('seed', range(5))
def test_the_plug_in_rule_is_never_worse_than_argmax(seed):
  """Whatever is weighted, of contexts however few."""
  rng = np.random.default_rng(seed)
  for n in (1, 3, 50):
    p, _ = draw(n, 6, seed, sharp=4.0)
    weights = rng.dirichlet(np.full(6, 0.3))
    rule = decisions.plug_in(p, weights)
    value = lambda chosen, p=p, w=weights: w @ decisions.expected_f1(p, chosen)
    assert value(rule.choose(p)) >= value(p.argmax(axis=1))


def test_what_is_certain_is_chosen_by_argmax():
  rule = decisions.plug_in(np.eye(4)[[0, 1, 2, 3, 0]], np.full(4, 0.25))
  assert rule.how == 'argmax'


def test_calibration_finds_what_was_done_to_log_p():
  p, true = draw(20_000, 6)
  log_pi = np.log(p.mean(axis=0))
  spoilt = log_softmax((np.log(p) - 0.4 * log_pi) / 1.5)
  found = decisions.calibrate(spoilt, log_pi, true)
  assert found.a == pytest.approx(1.5, abs=0.06)
  assert found.b == pytest.approx(0.4, abs=0.06)
  np.testing.assert_allclose(found(spoilt), p, atol=0.02)
  # What is calibrated stays so.
  again = decisions.calibrate(np.log(p), log_pi, true)
  assert (again.a, again.b) == pytest.approx((1, 0), abs=0.05)


def test_calibration_has_the_least_loss():
  """Of a grid around it."""
  p, true = draw(300, 6)
  log_pi = np.log(p.mean(axis=0))
  scores = 3 * p  # Neither normalised nor logs.
  found = decisions.calibrate(scores, log_pi, true)

  def loss(a, b):
    log_p = log_softmax(a * scores + b * log_pi)
    return -log_p[np.arange(len(true)), true].mean()

  near = [
    (found.a + x, found.b + y) for x in (-0.01, 0, 0.01) for y in (-0.01, 0, 0.01)
  ]
  assert loss(found.a, found.b) == min(loss(*pair) for pair in near)
  np.testing.assert_allclose(np.exp(found.log(scores)), found(scores))


@pytest.mark.parametrize('n', [0, 1])
def test_too_few_labels_leave_log_p_as_it_is(n):
  log_p = np.log([[0.7, 0.2, 0.1]])[:n].reshape(n, 3)
  found = decisions.calibrate(log_p, np.log([0.5, 0.3, 0.2]), np.zeros(n, int))
  assert (found.a, found.b) == (1, 0)
  np.testing.assert_allclose(found.log(log_p), log_p)


def test_one_name_alone_is_certain():
  found = decisions.calibrate(np.zeros((5, 1)), np.zeros(1), np.zeros(5, int))
  np.testing.assert_array_equal(found(np.zeros((2, 1))), 1)


def test_constant_scores_become_the_frequencies_of_the_labels():
  log_pi, true = np.log([0.75, 0.25]), np.repeat([0, 1], [75, 25])
  found = decisions.calibrate(np.zeros((100, 2)), log_pi, true)
  np.testing.assert_allclose(found(np.zeros((1, 2))), [[0.75, 0.25]], atol=1e-6)


@pytest.mark.parametrize('lowest', [-np.inf, -1e30, -300.0])
def test_a_true_name_of_no_probability_breaks_nothing(lowest):
  p, true = draw(200, 4)
  log_p, log_pi = np.log(p), np.log(p.mean(axis=0))
  log_p[0, true[0]] = lowest
  found = decisions.calibrate(log_p, log_pi, true)
  # It was far too sure, and is trusted less; what it cannot tell pi says.
  assert 0 <= found.a < 0.5
  q = found(log_p)
  np.testing.assert_allclose(q.sum(axis=1), 1)
  assert -np.log(q[np.arange(200), true]).mean() < np.log(4)


@pytest.mark.parametrize('sign', [1, -1])
def test_calibration_stays_in_its_bounds(sign):
  """Where a predictor is right, or wrong, about every label."""
  true = np.arange(20) % 4
  log_p = log_softmax(sign * np.eye(4)[true])
  found = decisions.calibrate(log_p, np.log(np.full(4, 0.25)), true)
  assert found.a == (10 if sign > 0 else 0) and abs(found.b) <= 10
  assert np.isfinite(found.log(log_p)).all()


def fitted(n, tolerance=0.01, seed=3):
  p, true = draw(n, 30, seed)
  anchor = np.arange(30) < 4
  log_pi = np.log(p.mean(axis=0))
  rules = decisions.fit_rules(p, true, log_pi, anchor, tolerance)
  table = {
    name: metrics.per_behavior(true, rule.choose(p), 30)[2]
    for name, rule in rules.items()
  }
  return rules, table, anchor


def test_the_tail_point_keeps_the_anchors_within_the_tolerance():
  for tolerance in (0.0, 0.01, 0.1, 1.0):
    _, f1, anchor = fitted(4000, tolerance)
    least = f1['accuracy'][anchor].mean() - tolerance
    assert f1['tail'][anchor].mean() >= least
    assert f1['tail'][~anchor].mean() >= f1['accuracy'][~anchor].mean()
  # With all of the anchors to give, it is the best there is.
  assert f1['tail'][~anchor].mean() >= f1['macro_f1'][~anchor].mean()


def test_a_small_validation_split_is_decided_by_tau():
  rules, f1, _ = fitted(decisions.PLUG_IN_SAMPLES - 1)
  assert rules['macro_f1'].how.startswith('tau ')
  assert f1['macro_f1'].mean() > f1['accuracy'].mean()
  assert fitted(decisions.PLUG_IN_SAMPLES)[0]['macro_f1'].how == 'plug-in'


def test_an_event_is_decided_by_itself():
  rules, _, _ = fitted(3000)
  p, _ = draw(50, 30, 9)
  for rule in rules.values():
    one_by_one = np.concatenate([rule.choose(row[None]) for row in p])
    np.testing.assert_array_equal(rule.choose(p), one_by_one)
