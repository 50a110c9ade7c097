"""How good probabilities are, whatever is decided by them.

  log_p       mean log-probability of the true name, in nats
  map         mean over names of the average precision with which p_y finds the
              events of y (one against the rest); names without an event are
              left out (macro mAP: HoTPP, Karpukhin et al., arXiv 2406.14341)
  coverage@5  share of the names that stand among some event's five likeliest
  ece         expected calibration error of the likeliest name (Guo et al., ICML
              2017)

A group's log_p is of its own events, map and coverage are of its own names.
"""

import numpy as np

from behaviorlm_jax.score.label_tree import best

BINS = 15  # Of confidence, of equal width.


def by_group(
  true: np.ndarray, log_p: np.ndarray, anchor: np.ndarray
) -> dict[str, dict[str, float]]:
  """{group: {log_p, map, coverage@5}} for all, anchor and tail names.

  Args:
    true: int [n], ids of the true names.
    log_p: float [n, Y], normalised.
    anchor: bool [Y].
  """
  own = log_p[np.arange(len(true)), true]
  precision = average_precision(true, log_p)
  shown = np.isin(np.arange(len(anchor)), best(log_p))
  groups = {'all': np.ones_like(anchor), 'anchor': anchor, 'tail': ~anchor}
  mean = lambda values: float(np.mean(values)) if len(values) else 0.0
  return {
    group: {
      'log_p': mean(own[inside[true]]),
      'map': mean(precision[inside & ~np.isnan(precision)]),
      'coverage@5': mean(shown[inside]),
    }
    for group, inside in groups.items()
  }


def average_precision(true: np.ndarray, log_p: np.ndarray) -> np.ndarray:
  """float64 [Y]: average precision of each name; NaN: it has no event."""
  found = np.full(log_p.shape[1], np.nan)
  for name in np.unique(true):
    hit = true == name
    # Equal scores count together: their order says nothing.
    values, place = np.unique(-log_p[:, name], return_inverse=True)
    hits = np.cumsum(np.bincount(place, hit, len(values)))
    asked = np.cumsum(np.bincount(place, minlength=len(values)))
    gained = np.diff(hits, prepend=0) / hits[-1]
    found[name] = np.sum(gained * hits / asked)
  return found


def reliability(true: np.ndarray, log_p: np.ndarray) -> np.ndarray:
  """float64 [BINS, 3] of the likeliest names: confidence, accuracy, share of n."""
  top = log_p.argmax(axis=1)
  confidence = np.exp(log_p[np.arange(len(top)), top])
  place = np.minimum((confidence * BINS).astype(int), BINS - 1)
  n = np.bincount(place, minlength=BINS)
  mean = lambda values: np.bincount(place, values, BINS) / np.maximum(n, 1)
  return np.stack([mean(confidence), mean(top == true), n / max(len(top), 1)], axis=1)


def calibration_error(table: np.ndarray) -> float:
  """ece of a table of `reliability`."""
  confidence, accuracy, share = table.T
  return float(share @ np.abs(confidence - accuracy))
