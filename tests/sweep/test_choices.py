"""Choices of runs: what two predictors are compared at."""

import dataclasses

import numpy as np

from behaviorlm_jax.evaluate import adjust
from behaviorlm_jax.report import compare
from behaviorlm_jax.sweep import choices


def test_matched_arms_have_equally_good_anchors():
  rng, anchor = np.random.default_rng(2), np.arange(6) < 2
  prior = np.log(np.where(anchor, 0.4, 0.05))
  true = rng.choice(6, size=800, p=np.exp(prior))
  log_p = rng.normal(size=(800, 6)) + 1.5 * np.eye(6)[true] + prior
  as_is = compare.Arm(true, log_p.argmax(1), np.arange(800) // 4, anchor)
  goal = compare.Arm(true, (log_p - 0.7 * prior).argmax(1), as_is.user, anchor)
  chosen = adjust.first_choices(log_p, prior)
  found = choices.matched(goal, as_is, chosen)
  np.testing.assert_array_equal(found.predicted, goal.predicted)
  assert as_is.value('tail macro-F1') < found.value('tail macro-F1') - 0.05
  # Out of reach: the best anchors there are.
  perfect = dataclasses.replace(goal, predicted=true)
  found = choices.matched(perfect, as_is, chosen)
  anchors = [
    dataclasses.replace(as_is, predicted=(log_p - tau * prior).argmax(1)).value(
      'anchor macro-F1'
    )
    for tau in adjust.TAUS
  ]
  assert found.value('anchor macro-F1') == max(anchors)
