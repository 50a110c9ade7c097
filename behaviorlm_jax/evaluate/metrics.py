"""How good predictions are: one definition for every model and baseline.

Precision, recall and F1 of a behavior come from all evaluated samples, so a
tail behavior pays for anchors that are mistaken for it. A group (all, anchor,
tail) then averages them over its *full* behavior list, also over behaviors
that no evaluated sample shows: plainly (macro), or by true support (weighted).
Accuracy, NDCG and n count the samples whose true behavior is in the group.
A division by zero is 0. Everything is a fraction, computed in float64.
"""

import numpy as np

GROUPS = ('all', 'anchor', 'tail')


def evaluate(true, ranked, anchor) -> dict:
  """Scores of ranked predictions for all, anchor and tail behaviors.

  Args:
    true: int[n], ids of the true behaviors, below len(anchor).
    ranked: int[n, k], predicted ids, best first; k = min(5, behaviors).
    anchor: bool[Y], whether behavior id is an anchor.

  Returns:
    {group: {'n', 'precision_weighted', ..., 'ndcg@5'}}, plain int and float.
  """
  true = np.asarray(true, np.int64)
  anchor = np.asarray(anchor, bool)
  ranked = np.asarray(ranked, np.int64)
  assert (ranked.ndim == 2 and len(ranked) == len(true)) or not len(true)
  top = ranked[:, 0] if len(true) else true
  table = per_behavior(true, top, len(anchor))
  rank = _rank(true, ranked)
  members = {'all': np.ones_like(anchor), 'anchor': anchor, 'tail': ~anchor}
  return {
    group: _group_scores(table, members[group], rank[members[group][true]])
    for group in GROUPS
  }


def per_behavior(true, predicted, count, weight=None):
  """Precision, recall, F1 and support of every behavior.

  Args:
    true, predicted: int[n] ids below count.
    count: Y, the number of behaviors.
    weight: float[n] weight of each sample; None is 1 each.

  Returns:
    float64[4, Y]: precision, recall, F1, support.
  """
  true, predicted = np.asarray(true), np.asarray(predicted)
  assert true.size == 0 or max(true.max(), predicted.max()) < count
  weight = np.ones(len(true)) if weight is None else np.asarray(weight)
  support = np.bincount(true, weight, count)
  claimed = np.bincount(predicted, weight, count)
  hits = np.bincount(true, weight * (true == predicted), count)
  # F1 = 2 hits / (support + claimed) equals 2PR / (P + R), also at zero.
  return np.stack(
    [
      _divide(hits, claimed),
      _divide(hits, support),
      _divide(2 * hits, support + claimed),
      support,
    ]
  )


def bootstrap_macro_f1(true, predicted, members, user, draws=1000, seed=0):
  """Macro-F1 of a group under redrawn users: float64[draws].

  Whole users are drawn with replacement, because the events of one user are
  not independent. Calls with the same users and seed share their draws, so
  the difference of two results is a paired one.

  Args:
    true, predicted: int[n] ids.
    members: bool[Y], the behaviors of the group.
    user: [n], any values that tell users apart.
  """
  rng = np.random.default_rng(seed)
  names, owner = np.unique(np.asarray(user), return_inverse=True)
  result = np.zeros(draws)
  if not len(names) or not members.any():
    return result
  for draw in range(draws):
    times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
    f1 = per_behavior(true, predicted, len(members), times[owner])[2]
    result[draw] = f1[members].mean()
  return result


def _divide(numerator, denominator):
  return np.divide(
    numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0
  )


def _rank(true, ranked):
  """Rank of the true behavior from 1; infinity where it is not listed."""
  if not len(true):
    return np.zeros(0)
  found = ranked == true[:, None]
  return np.where(found.any(1), found.argmax(1) + 1.0, np.inf)


def _group_scores(table, members, rank) -> dict:
  """One group's row: `table` float[4, Y], `rank` of the group's samples."""
  scores = {'n': len(rank)}
  *measures, support = table[:, members]
  names = ('precision', 'recall', 'f1')
  total = support.sum()
  for name, value in zip(names, measures, strict=True):
    weighted = value @ support / total if total else 0.0
    scores[f'{name}_weighted'] = float(weighted)
  for name, value in zip(names, measures, strict=True):
    scores[f'{name}_macro'] = float(value.mean()) if len(value) else 0.0
  for k in (1, 3, 5):
    scores[f'accuracy@{k}'] = _mean(rank <= k)
  for k in (3, 5):
    # One relevant item, so the ideal DCG is 1.
    scores[f'ndcg@{k}'] = _mean((rank <= k) / np.log2(rank + 1))
  return scores


def _mean(values) -> float:
  return float(np.mean(values)) if len(values) else 0.0
