"""How good predictions are: one definition for every model and baseline.

Precision, recall and F1 of a behavior come from all evaluated samples, so a
tail behavior pays for anchors that are mistaken for it. A group (all, anchor,
tail) then averages them over its *full* behavior list, also over behaviors
that no evaluated sample shows: plainly (macro), or by true support (weighted).
Accuracy, NDCG and n count the samples whose true behavior is in the group.
A division by zero is 0. Everything is a fraction, computed in float64.
"""

from collections.abc import Sequence

import numpy as np

GROUPS = ('all', 'anchor', 'tail')


def by_group(
  true: np.ndarray | Sequence[int],
  ranked: np.ndarray | Sequence[Sequence[int]],
  anchor: np.ndarray | Sequence[bool],
) -> dict[str, dict[str, int | float]]:
  """Scores of ranked predictions for all, anchor and tail behaviors.

  Args:
    true: int [n], ids of the true behaviors.
    ranked: int [n, k], predicted ids, best first; k = min(5, Y).
    anchor: bool [Y], which behaviors are anchors.

  Returns:
    {group: {'n', 'precision_weighted', ..., 'ndcg@5'}}, plain int and float.
  """
  true, anchor = np.asarray(true, np.int64), np.asarray(anchor, bool)
  ranked = np.asarray(ranked, np.int64)
  table = per_behavior(true, ranked[:, 0], len(anchor))
  found = ranked == true[:, None]
  # From 1; infinity where the true behavior is not listed.
  rank = np.where(found.any(1), found.argmax(1) + 1.0, np.inf)
  members = {'all': np.ones_like(anchor), 'anchor': anchor, 'tail': ~anchor}
  return {  # The ranks are of the samples whose true behavior is a member.
    group: _group_scores(table, members[group], rank[members[group][true]])
    for group in GROUPS
  }


def per_behavior(
  true: np.ndarray, predicted: np.ndarray, count: int, weight: np.ndarray | None = None
) -> np.ndarray:
  """Precision, recall, F1 and support of every behavior: float64 [4, Y].

  Args:
    true, predicted: int [n], ids.
    count: Y, the number of behaviors.
    weight: float [n], of each sample; None is 1 each.
  """
  true, predicted = np.asarray(true), np.asarray(predicted)
  assert true.size == 0 or max(true.max(), predicted.max()) < count
  weight = np.ones(len(true)) if weight is None else np.asarray(weight)
  support = np.bincount(true, weight, count)
  # Of all samples, whatever their group: who is mistaken for a tail behavior
  # lowers its precision.
  claimed = np.bincount(predicted, weight, count)
  hits = np.bincount(true, weight * (true == predicted), count)
  # F1 = 2 hits / (support + claimed) equals 2PR / (P + R), also at zero.
  f1 = _divide(2 * hits, support + claimed)
  return np.stack([_divide(hits, claimed), _divide(hits, support), f1, support])


def _divide(numerator, denominator):
  zeros = np.zeros(len(numerator))
  return np.divide(numerator, denominator, out=zeros, where=denominator > 0)


def _group_scores(table, members, rank):
  """One group's row: `table` float [4, Y], `rank` of the group's samples."""
  scores = {'n': len(rank)}
  *measures, support = table[:, members]
  measures = dict(zip(('precision', 'recall', 'f1'), measures, strict=True))
  total = support.sum()
  for name, value in measures.items():
    scores[f'{name}_weighted'] = float(value @ support / total) if total else 0.0
  for name, value in measures.items():
    # Over the whole list: which rare behaviors a draw of samples shows is chance.
    scores[f'{name}_macro'] = _mean(value)
  for k in (1, 3, 5):
    scores[f'accuracy@{k}'] = _mean(rank <= k)
  for k in (3, 5):
    # One relevant item, so the ideal DCG is 1.
    scores[f'ndcg@{k}'] = _mean((rank <= k) / np.log2(rank + 1))
  return scores


def _mean(values):
  return float(np.mean(values)) if len(values) else 0.0
