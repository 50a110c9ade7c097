"""What is said of any predictor: its scores, its probabilities, three points.

The same for a model, a mix and a baseline, so that they can be compared. What is
calibrated and which rule chooses is settled by the validation split; the test
split is then decided event by event (evaluate.decisions).

Shapes: n test samples, m validation samples, Y behaviors.
"""

import dataclasses
from typing import Any

import numpy as np

from behaviorlm_jax.evaluate import decisions, metrics, probabilities
from behaviorlm_jax.score import label_tree


@dataclasses.dataclass(frozen=True)
class Truth:
  """What happened, by which all predictors of a run are assessed."""

  true: np.ndarray  # Ids int [n] of the test samples.
  validation: np.ndarray  # Ids int [m]; of none nothing is calibrated.
  anchor: np.ndarray  # bool [Y]
  log_pi: np.ndarray  # Of the training frequencies, float [Y].
  tolerance: float  # Anchor F1 that the point `tail` may cost.


@dataclasses.dataclass(frozen=True)
class Assessed:
  """What is known of one predictor."""

  summary: dict[str, Any]  # As in evaluation.json, without what is fitted on top.
  log_prob: np.ndarray | None  # Of the true name, float64 [n].
  chosen: dict[str, np.ndarray]  # {point: ids int64 [n]}; empty: not calibrated.


def assess(
  truth: Truth,
  scores: np.ndarray,
  validation: np.ndarray | None = None,
  likely: bool = True,
) -> Assessed:
  """Assesses a predictor by its scores float [n, Y], higher is better.

  Args:
    validation: the same of validation samples, float [m, Y]; None where nothing is
      calibrated.
    likely: whether the softmax of scores is the predictor's p. Where it is not, p
      is what calibration makes of them; without it there is none.
  """
  log_p = label_tree.log_softmax(scores) if likely else None
  decided, chosen = {}, {}
  if validation is not None:
    calibration = decisions.calibrate(validation, truth.log_pi, truth.validation)
    decided, chosen = _decide(truth, calibration, scores, validation)
    if log_p is None:
      log_p = calibration.log(scores)
  summary = rank(truth, scores)
  if log_p is None:
    return Assessed(summary | decided, None, chosen)
  for group, found in probabilities.by_group(truth.true, log_p, truth.anchor).items():
    summary[group] |= found
  table = probabilities.reliability(truth.true, log_p)
  summary['ece'] = probabilities.calibration_error(table)
  summary['reliability'] = table.tolist()
  log_prob = log_p[np.arange(len(log_p)), truth.true]
  return Assessed(summary | decided, log_prob, chosen)


def rank(truth: Truth, scores: np.ndarray) -> dict[str, dict[str, int | float]]:
  """metrics.by_group of scores [n, Y]."""
  return metrics.by_group(truth.true, label_tree.best(scores), truth.anchor)


def _decide(truth, calibration, scores, validation):
  """The parts `calibration` and `points` of a summary, and {point: ids [n]}."""
  p = calibration(scores)
  rules = decisions.fit_rules(
    calibration(validation),
    truth.validation,
    truth.log_pi,
    truth.anchor,
    truth.tolerance,
  )
  numbers = {
    'a': calibration.a,
    'b': calibration.b,
    'validation_samples': len(truth.validation),
  }
  points = {
    name: {'how': rule.how, **rank(truth, rule.values(p))}
    for name, rule in rules.items()
  }
  chosen = {name: rule.choose(p) for name, rule in rules.items()}
  return {'calibration': numbers, 'points': points}, chosen
