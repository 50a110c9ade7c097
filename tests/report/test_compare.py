"""The numbers of the verdict: paired, over whole users, and what is missing."""

import dataclasses
import types

import numpy as np
import pyarrow as pa
import pytest

from behaviorlm_jax.evaluate import metrics
from behaviorlm_jax.report import compare, run_files


def stage(key, true, predicted, user, **config):
  names = lambda ids: [f'b{i}' for i in ids]
  return run_files.StageFiles(
    key,
    None,
    config,
    {},
    pa.table(
      {
        'sample': np.arange(len(true)),
        'user': user,
        'behavior': names(true),
        'predicted': names(predicted),
      }
    ),
  )


def run_of(*stages, anchors=2, count=5):
  behaviors = [
    {
      'name': f'b{i}',
      'train_count': 9 - i,
      'group': 'anchor' if i < anchors else 'tail',
    }
    for i in range(count)
  ]
  return run_files.RunFiles(None, {}, behaviors, {}, list(stages))


def case(seed=0, n=200, users=25):
  rng = np.random.default_rng(seed)
  return rng.integers(5, size=n), rng.integers(5, size=n), np.arange(n) % users


def test_points_are_those_of_the_metrics():
  true, guess, user = case()
  outcome = compare.outcome(run_of(stage('a_tuning', true, guess, user)))
  want = metrics.by_group(true, guess[:, None], np.arange(5) < 2)
  for name, (group, key) in compare.SCORES.items():
    value, (low, high) = outcome.scores[name]
    np.testing.assert_allclose(value, want[group][key])
    assert low < value < high
  assert outcome.samples == {group: want[group]['n'] for group in want}
  assert outcome.users == 25 and outcome.final == 'A-Tuning'


def test_intervals_hold_the_score_where_every_behavior_is_rare():
  # Each of 60 behaviors is shown once: a third of them are missing from a draw.
  true = np.arange(60)
  guess = np.where(true % 2, true, 0)
  outcome = compare.outcome(
    run_of(
      stage('base', true, np.zeros(60, int), true),
      stage('a_tuning', true, guess, true),
      count=60,
    )
  )
  value, (low, high) = outcome.scores['tail macro-F1']
  assert value == 0.5 and low < value < high
  (change,) = (
    c for c in outcome.contrasts['the untuned model'] if c.score == 'tail macro-F1'
  )
  low, high = change.interval
  assert low < change.size == 0.5 < high and change.outcome == 'better'


def simulated(rng, users):
  """Two predictors of 12 events of each user, who differ in predictability."""
  user = np.repeat(np.arange(users), 12)
  true = rng.choice(6, len(user), p=[0.3, 0.25, 0.15, 0.12, 0.1, 0.08])
  ease = rng.normal(0, 0.25, users)[user]
  arms = []
  for mean, gain in ((0.4, 0.0), (0.45, 0.5)):  # They gain with some users.
    right = rng.random(len(user)) < np.clip(mean + ease * (1 + gain), 0, 1)
    guess = np.where(right, true, rng.integers(6, size=len(user)))
    arms.append(compare.Arm(true, guess, user, np.arange(6) < 3))
  return arms


@pytest.mark.slow
def test_intervals_hold_the_true_difference_as_often_as_they_say():
  """Near 95 % of 300 simulated logs; 80 users of them can be a point below."""
  rng, score = np.random.default_rng(0), 'tail macro-F1'
  before, after = (arm.value(score) for arm in simulated(rng, 40_000))
  held = []
  for _ in range(300):
    low, high = compare.paired([simulated(rng, 80)], score, draws=200)[2]
    held.append(low < after - before < high)
  assert 0.9 < np.mean(held) < 0.98


def test_equal_predictions_differ_by_nothing():
  true, guess, user = case()
  outcome = compare.outcome(
    run_of(stage('base', true, guess, user), stage('b_tuning', true, guess, user))
  )
  changes = outcome.contrasts['the untuned model']
  assert len(changes) == 3
  assert all(c.size == 0 and c.interval == (0, 0) for c in changes)


def test_intervals_are_those_of_users_drawn_and_copied():
  true, guess, user = case(n=60, users=6)
  rng, draws = np.random.default_rng(0), []
  for _ in range(1000):
    drawn = rng.integers(6, size=6)
    rows = np.concatenate([np.flatnonzero(user == one) for one in drawn])
    f1 = metrics.per_behavior(true[rows], guess[rows], 5)[2]
    draws.append([np.mean(true[rows] == guess[rows]), f1[2:].mean(), f1[:2].mean()])
  low, high = np.quantile(draws - np.mean(draws, 0), [0.025, 0.975], axis=0)
  outcome = compare.outcome(run_of(stage('a_tuning', true, guess, user)))
  for i, score in enumerate(compare.SCORES):
    value, interval = outcome.scores[score]
    np.testing.assert_allclose(interval, (value + low[i], value + high[i]))


def test_one_user_has_no_interval():
  true, guess, _ = case()
  user = np.zeros(200, int)
  outcome = compare.outcome(
    run_of(stage('base', true, guess, user), stage('a_tuning', true, true, user))
  )
  assert outcome.users == 1 and outcome.scores['accuracy'] == (1.0, None)
  assert {c.outcome for c in outcome.contrasts['the untuned model']} == {'unknown'}


def test_a_group_without_samples_has_no_score():
  true, guess, user = case()
  outcome = compare.outcome(run_of(stage('a_tuning', true % 2, guess, user)))
  assert list(outcome.scores) == ['accuracy', 'anchor macro-F1']


def test_other_samples_cannot_be_compared():
  true, guess, user = case()
  base = stage('base', true[:-1], guess[:-1], user[:-1])
  outcome = compare.outcome(run_of(base, stage('a_tuning', true, guess, user)))
  assert outcome.contrasts == {}


def test_nothing_predicted_is_no_outcome():
  assert compare.outcome(run_of()) is None


def test_the_best_baseline_is_counted_again_from_the_events(monkeypatch):
  true, guess, user = case()
  final = stage('a_tuning', true, guess, user, seed=3, data={'history': 7})
  scores = {
    'all': {'accuracy@1': 0.4},
    'tail': {'f1_macro': 0.1},
    'anchor': {'f1_macro': 0.2},
  }
  run = run_of(final)
  run.baselines['markov'] = scores
  run.__dict__['events'] = types.SimpleNamespace()

  class Counts:
    def __init__(self, events, history, seed):
      assert (history, seed) == (7, 3)

    def scores(self, name, samples):
      assert name == 'markov'
      return np.eye(5)[true[samples]]

  monkeypatch.setattr(run_files, 'Counts', Counts)
  changes = compare.outcome(run).contrasts['the best count baseline (markov)']
  assert [c.before for c in changes] == [1.0, 1.0, 1.0]
  assert {c.outcome for c in changes} == {'worse'}


# The paired interval.


def arms(rng, users, right, lift, anchor):
  """Two predictors of 4 events a user; the second is right more often."""
  user = np.repeat(np.arange(users), 4)
  true = rng.integers(len(anchor), size=len(user))
  skill = np.repeat(rng.normal(0, 0.1, users), 4)  # Users differ.
  wrong = (true + 1) % len(anchor)
  before, after = (
    np.where(rng.random(len(user)) < right + skill + more, true, wrong)
    for more in (0, lift)
  )
  return (
    compare.Arm(true, before, user, anchor),
    compare.Arm(true, after, user, anchor),
  )


def test_a_pair_alone_changes_by_the_difference_of_its_scores():
  pair = arms(np.random.default_rng(0), 30, 0.4, 0.2, np.arange(6) < 2)
  for score in compare.SCORES:
    before, change, (low, high) = compare.paired([pair], score, draws=50)
    assert before == pytest.approx(pair[0].value(score))
    assert change == pytest.approx(pair[1].value(score) - before)
    assert low < change < high


def test_log_p_is_compared_over_the_samples_of_a_group():
  rng = np.random.default_rng(3)
  pair = arms(rng, 30, 0.4, 0.2, np.arange(6) < 2)
  log_p = rng.normal(size=(2, len(pair[0].true)))
  pair = [
    dataclasses.replace(arm, log_p=values)
    for arm, values in zip(pair, log_p, strict=True)
  ]
  tail = pair[0].true >= 2
  for score, part in (
    ('log p', slice(None)),
    ('tail log p', tail),
    ('anchor log p', ~tail),
  ):
    before, change, (low, high) = compare.paired([pair], score, draws=200)
    assert before == pytest.approx(log_p[0, part].mean())
    assert change == pytest.approx((log_p[1] - log_p[0])[part].mean())
    # Samples are independent here, so users are as good as samples.
    error = (log_p[1] - log_p[0])[part].std() / len(log_p[0, part]) ** 0.5
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.3)


def test_intervals_cover_the_true_change_at_about_their_rate():
  rng, hits = np.random.default_rng(1), 0
  for _ in range(150):
    pairs = [arms(rng, 60, 0.4, 0.15, np.arange(6) < 2) for _ in range(2)]
    _, _, (low, high) = compare.paired(pairs, 'accuracy', draws=200)
    hits += low <= 0.15 <= high
  # 95 %; 150 trials have a standard error of 2 %.
  assert 0.89 <= hits / 150 <= 0.99
