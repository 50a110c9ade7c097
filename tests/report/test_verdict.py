"""The verdict on made numbers: what it claims, and what it does not."""

import dataclasses

from behaviorlm_jax.report.verdict import Change, headline, Outcome, verdict


def change(score, before, after, interval, other='untuned'):
  return Change(score, other, before, after, interval)


BETTER = change('accuracy', 0.3, 0.4, (0.05, 0.15))
WORSE = change('tail macro-F1', 0.2, 0.1, (-0.15, -0.02))
WITHIN = change('anchor macro-F1', 0.2, 0.25, (-0.02, 0.12))
WHOLE = Outcome(
  final='B-Tuning',
  samples={'all': 900, 'anchor': 700, 'tail': 200},
  scores={'accuracy': (0.4, (0.35, 0.45)), 'tail macro-F1': (0.1, None)},
  users=80,
  contrasts={'the untuned model': [BETTER, WORSE, WITHIN]},
)


def with_changes(*changes):
  return verdict(dataclasses.replace(WHOLE, contrasts={'X': list(changes)}))


def test_better_and_worse_only_where_the_interval_leaves_zero_out():
  text = verdict(WHOLE)
  assert text == (
    'On 900 test events of 80 users, B-Tuning reaches accuracy 0.400 (0.350 '
    'to 0.450) and tail macro-F1 0.100. Against the untuned model it is '
    'better in accuracy +0.100 (0.050 to 0.150) and worse in tail macro-F1 '
    '-0.100 (-0.150 to -0.020), larger than the uncertainty; within it: '
    'anchor macro-F1 +0.050 (-0.020 to 0.120). Brackets hold 95 % intervals '
    'from redrawn users.'
  )


def test_an_interval_that_ends_at_zero_does_not_leave_it_out():
  assert change('s', 0.1, 0.2, (0.0, 0.3)).outcome == 'within'
  assert change('s', 0.2, 0.1, (-0.3, 0.0)).outcome == 'within'


def test_a_large_change_within_its_uncertainty_is_no_gain():
  text = with_changes(change('accuracy', 0.1, 0.9, (-0.1, 0.99)), WITHIN)
  assert 'Against X, no change is larger than its uncertainty: accuracy' in text
  assert 'better' not in text and 'worse' not in text


def test_clear_changes_alone_need_no_second_half():
  text = with_changes(BETTER)
  assert text.split('. ')[1] == (
    'Against X it is better in accuracy +0.100 (0.050 to 0.150), larger than '
    'the uncertainty'
  )


def test_equal_predictions_are_called_so():
  same = change('accuracy', 0.3, 0.3, (0.0, 0.0))
  assert 'Against X, nothing changed in accuracy.' in with_changes(same)


def test_baselines_are_named_where_they_differ():
  markov = dataclasses.replace(BETTER, other='markov')
  counts = dataclasses.replace(WORSE, other='user_frequent')
  text = with_changes(markov, counts)
  assert 'accuracy +0.100 against markov (0.050' in text
  assert 'tail macro-F1 -0.100 against user_frequent (' in text
  assert 'against' not in with_changes(markov).split('Against X')[1]


def test_one_user_gives_no_claim_and_no_interval():
  text = verdict(
    dataclasses.replace(
      WHOLE,
      users=1,
      scores={'accuracy': (0.4, None)},
      contrasts={'X': [dataclasses.replace(BETTER, interval=None)]},
    )
  )
  assert 'of 1 user,' in text
  assert 'Against X it differs by accuracy +0.100.' in text
  assert text.endswith('one user, so no uncertainty can be given.')
  assert 'better' not in text and 'Brackets' not in text


def test_small_groups_and_few_users_are_warned_of():
  text = verdict(
    dataclasses.replace(WHOLE, samples={'all': 739, 'anchor': 700, 'tail': 39}, users=4)
  )
  assert 'Caution: few test events (39 tail; below 50)' in text
  assert text.endswith('; with 4 users the intervals are rough.')
  assert 'Caution' not in verdict(WHOLE)


def test_no_tail_sample_is_said_rather_than_scored():
  text = verdict(
    dataclasses.replace(WHOLE, samples={'all': 700, 'anchor': 700, 'tail': 0})
  )
  assert text.endswith('so nothing is known of the tail.')
  assert 'few' not in text


def test_nothing_to_compare_with_leaves_the_scores():
  text = verdict(dataclasses.replace(WHOLE, final='the untuned model', contrasts={}))
  assert 'the untuned model reaches accuracy' in text and 'Against' not in text


def test_three_to_six_sentences():
  fullest = dataclasses.replace(
    WHOLE,
    samples={'all': 90, 'anchor': 70, 'tail': 20},
    contrasts={name: [BETTER, WORSE, WITHIN] for name in ('X', 'Y', 'Z')},
  )
  assert verdict(fullest).count('. ') + 1 == 6


def test_the_headline_claims_only_what_its_interval_allows():
  def said(before, after, interval):
    found = change('log p', before, after, interval, 'markov')
    return headline('the tuned model', (0.412, 0.3), 1234, found)

  assert said(-2.5, -2.25, (0.2, 0.3)) == (
    'By log p on 1,234 test events the best predictor that does more than count is the '
    'tuned model: it names the next behavior in 41.2 % of them, counting (markov) in '
    '30.0 %, and '
    'its mean log p is 0.250 nats higher (95 % interval +0.200 to +0.300, by users), '
    'so it beats counting.'
  )
  assert '0.250 nats higher (95 % interval -0.' in said(-2.5, -2.25, (-0.1, 0.6))
  for interval in ((-0.1, 0.6), None):
    assert said(-2.5, -2.25, interval).endswith('so it is not shown to beat counting.')
  text = said(-2.0, -2.5, (-0.6, -0.4))
  assert '0.500 nats lower' in text and text.endswith('so it is worse than counting.')
  assert 'there is a single user' in said(-2.5, -2.25, None)
