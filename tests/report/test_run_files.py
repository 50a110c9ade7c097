"""What the report and the tables read of a work directory."""

import numpy as np
import pytest

from behaviorlm_jax.report import run_files


@pytest.mark.parametrize(
  ('key', 'plan', 'left'),
  [
    ('b_tuning', {'shots': 5}, 5),
    ('a_tuning', {'shots': 7}, 7),
    ('b_tuning', {'shots': None}, 70),
    ('b_tuning', {}, 70),
    ('base', {'shots': 5}, 70),
    ('sasrec', {'shots': 5}, 70),
    (None, {}, 70),
  ],
)
def test_the_prior_is_of_what_a_stage_could_learn(key, plan, left):
  behaviors = [
    {'name': name, 'train_count': n, 'group': group}
    for name, n, group in (
      ('home', 900, 'anchor'),
      ('zoo', 70, 'tail'),
      ('fair', 9, 'tail'),
    )
  ]
  run = run_files.RunFiles(None, {}, behaviors, 0, {}, [])
  stage = key and run_files.Stage(key, None, {'plan': plan}, {}, None)
  counts = np.array([900, left, 9]) + 1
  np.testing.assert_allclose(run.log_prior(stage), np.log(counts / counts.sum()))
