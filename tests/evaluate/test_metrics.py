"""The metrics against hand-made cases and scikit-learn."""

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from behaviorlm_jax.evaluate import metrics

KEYS = (
  ['n']
  + [
    f'{name}_{average}'
    for average in ('weighted', 'macro')
    for name in ('precision', 'recall', 'f1')
  ]
  + ['accuracy@1', 'accuracy@3', 'accuracy@5', 'ndcg@3', 'ndcg@5']
)


def random_case(seed, behaviors=12, n=300):
  """Skewed labels, some behaviors never true, some never predicted."""
  rng = np.random.default_rng(seed)
  share = 1 / np.arange(1, behaviors + 1)
  share[-2:] = 0
  true = rng.choice(behaviors, n, p=share / share.sum())
  score = rng.random((n, behaviors))
  score[np.arange(n), true] += 0.4
  score[:, 4] -= 9
  return true, np.argsort(-score, 1)[:, :5], np.arange(behaviors) < 4


@pytest.mark.parametrize('seed', range(3))
def test_scores_equal_scikit_learn(seed):
  true, ranked, anchor = random_case(seed)
  result = metrics.by_group(true, ranked, anchor)
  for group, labels in (
    ('all', np.arange(12)),
    ('anchor', np.arange(4)),
    ('tail', np.arange(4, 12)),
  ):
    for average in ('weighted', 'macro'):
      want = sk.precision_recall_fscore_support(
        true, ranked[:, 0], labels=labels, average=average, zero_division=0
      )[:3]
      got = [
        result[group][f'{name}_{average}'] for name in ('precision', 'recall', 'f1')
      ]
      np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize('k', [1, 3, 5])
def test_accuracy_and_ndcg_equal_scikit_learn(k):
  true, ranked, anchor = random_case(7)
  score = np.zeros((len(true), 12))
  np.put_along_axis(score, ranked, np.arange(5, 0, -1.0)[None], 1)
  result = metrics.by_group(true, ranked, anchor)
  members = {'all': true >= 0, 'anchor': anchor[true], 'tail': ~anchor[true]}
  for group, rows in members.items():
    assert result[group]['n'] == rows.sum()
    assert result[group][f'accuracy@{k}'] == pytest.approx(
      sk.top_k_accuracy_score(true[rows], score[rows], k=k, labels=np.arange(12))
    )
    if k > 1:
      relevant = np.eye(12)[true[rows]]
      assert result[group][f'ndcg@{k}'] == pytest.approx(
        sk.ndcg_score(relevant, score[rows], k=k, ignore_ties=True)
      )


def test_precision_of_a_tail_behavior_pays_for_mistaken_anchors():
  # Behavior 1 is the tail: right once, and claimed for two anchor samples.
  result = metrics.by_group([0, 0, 0, 1], [[0], [1], [1], [1]], [True, False])
  assert result['tail']['n'] == 1
  assert result['tail']['accuracy@1'] == 1.0
  assert result['tail']['precision_macro'] == pytest.approx(1 / 3)
  assert result['tail']['f1_macro'] == pytest.approx(0.5)


def test_macro_averages_over_behaviors_that_never_occur():
  result = metrics.by_group([0, 0], [[0], [0]], [True, False, False, False])
  assert result['all']['f1_macro'] == 0.25
  assert result['all']['f1_weighted'] == 1.0


def test_empty_group_and_empty_input_are_zeros():
  result = metrics.by_group([0, 1], [[0, 1], [1, 0]], [True, True])
  assert list(result) == ['all', 'anchor', 'tail']
  assert result['tail'] == dict.fromkeys(KEYS, 0)
  empty = metrics.by_group([], np.zeros((0, 5), int), [True, False])
  assert all(empty[group] == dict.fromkeys(KEYS, 0) for group in empty)


def test_result_is_plain_json_with_the_documented_keys():
  result = metrics.by_group(*random_case(1))
  assert json.loads(json.dumps(result)) == result
  for scores in result.values():
    assert list(scores) == KEYS
    assert type(scores['n']) is int
    assert all(type(scores[key]) is float for key in KEYS[1:])
