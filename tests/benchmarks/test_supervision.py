"""Arms of the supervision benchmark: what they set, count and reach."""

import sys
from pathlib import Path

import pytest

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data.plan import Segment
from behaviorlm_jax.errors import InputError

sys.path.append(str(Path(__file__).parents[2] / 'benchmarks'))

import arms


@pytest.mark.parametrize(
  'name, targets, window', [('1', 1, 9), ('24', 24, 32), ('24@16', 24, 40)]
)
def test_an_arm_sets_targets_and_window_and_nothing_else(name, targets, window):
  config = config_lib.default()
  changed = arms.arm_config(config, name)
  assert (config.plan.targets_per_row, config.plan.window) == (40, 48)
  config.plan.update({'targets_per_row': targets, 'window': window})
  assert changed == config


@pytest.mark.parametrize('name', ['', '0', '-4', 'many', '4@x', '4@0', '4@8@8'])
def test_what_is_no_arm_is_refused(name):
  with pytest.raises(InputError, match=r'--arms: .* is no arm'):
    arms.arm_config(config_lib.default(), name)


@pytest.mark.parametrize('context', [3, 25])
def test_context_stays_between_min_context_and_history(context):
  with pytest.raises(InputError, match=rf'{context} .* is 4 .* 24'):
    arms.arm_config(config_lib.default(), f'8@{context}')


def test_work_sums_targets_with_their_context_and_pairs_of_each_segment():
  segments = [
    Segment('window', 10, 19, [14, 15, 18], [1.0] * 3, length=3, answers=7),
    Segment('window', 0, 9, [8], [1.0], length=2, answers=1),
  ]
  assert arms.work(segments) == {
    'targets': 4,
    'context': 4 + 5 + 8 + 8,
    'tokens': 5,
    'answers': 8,
    'pairs': 6 + 3,
  }


def test_a_curve_reaches_a_loss_between_two_marks_for_the_first_time():
  curve = [(0.0, 9.0), (10.0, 5.0), (20.0, 6.0), (30.0, 4.0)]
  assert arms.first_time(curve, 6.0) == 7.5
  assert arms.first_time(curve, 4.0) == 30.0
  assert arms.first_time(curve, 4.5) == 27.5
  assert arms.first_time(curve, 3.9) == float('inf')
