"""Worked examples: which predictions are shown."""

import numpy as np

from behaviorlm_jax.report import examples


def test_examples_mix_groups_and_outcomes():
  groups = np.array(['anchor'] * 900 + ['tail'] * 100)
  right = np.arange(1000) % 10 == 0
  chosen = examples.pick(groups, right)
  kinds = {(groups[i], bool(right[i])) for i in chosen}
  assert len(set(chosen.tolist())) == 10 and len(kinds) == 4
  np.testing.assert_array_equal(chosen, examples.pick(groups, right))
