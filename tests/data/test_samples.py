"""Samples: who may be asked for, or learned."""

import numpy as np
import pytest

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data import samples as samples_lib

TAILS = 'xyz'


@pytest.fixture
def config():
  return config_lib.default()


def test_samples_have_enough_past_and_belong_to_the_split(table, config):
  samples = samples_lib.eligible(table, 'train', config)
  assert 60 not in samples  # The short user has 4 training events.
  assert len(samples) == 48 - 4 + 0 + 10 - 4 + 64 - 4
  assert (table.split[samples] == 0).all()
  anchors = samples_lib.eligible(table, 'train', config, anchors_only=True)
  names = [table.behaviors[b].name for b in table.behavior[samples]]
  expected = [s for s, n in zip(samples, names, strict=True) if n not in TAILS]
  assert anchors.tolist() == expected
  assert 0 < len(anchors) < len(samples)
  tests = samples_lib.eligible(table, 'test', config)
  assert (table.split[tests] == 2).all() and len(tests) == 12 + 1 + 2 + 16


def test_behaviors_of_the_test_split_alone_are_no_samples(make_events, config):
  events = make_events(['ababababzz'], train=0.8)
  object.__setattr__(events, 'known', 2)
  assert not len(samples_lib.eligible(events, 'test', config))


def test_samples_fall_into_behaviors(table, config):
  samples = samples_lib.eligible(table, 'train', config)
  groups = samples_lib.by_behavior(table, samples)
  assert sorted(np.concatenate(list(groups.values()))) == samples.tolist()
  assert all((table.behavior[mine] == b).all() for b, mine in groups.items())


@pytest.mark.parametrize('block', [1, 7, 1000])
def test_blocks_hold_whole_users_and_change_nothing(table, config, monkeypatch, block):
  every = samples_lib.eligible(table, 'train', config)
  monkeypatch.setattr(samples_lib, '_BLOCK', block)
  spans = list(samples_lib.spans(table))
  assert [span.start for span in spans] == [0, *(s.stop for s in spans[:-1])]
  assert all(table.first[span.start] == span.start for span in spans)
  assert len(spans) == {1: 4, 7: 4, 1000: 1}[block]
  samples = samples_lib.of_split(table, 'train', config)
  np.testing.assert_array_equal(np.concatenate(list(samples)), every)
  ranks = np.array([0, 3, len(every) - 1])
  assert samples.at(ranks).tolist() == every[ranks].tolist()
  pools = samples_lib.by_behavior(table, every)
  ranks = {b: np.arange(0, len(pool), 2) for b, pool in pools.items()}
  found = samples.at_of_behaviors(ranks | {5: np.zeros(0, int)})
  for b, pool in pools.items():
    assert found[b].tolist() == (pool[::2].tolist() if b != 5 else [])
  np.testing.assert_array_equal(
    samples_lib.behavior_counts(table, 'train', config),
    np.bincount(table.behavior[every], minlength=table.known),
  )


@pytest.mark.parametrize('most', [0, 5, 1000])
def test_ranks_are_drawn_as_positions_would_be(most):
  positions = np.arange(100) * 3
  one, other = np.random.default_rng(0), np.random.default_rng(0)
  ranks = samples_lib.draw_ranks(one, len(positions), most)
  drawn = np.sort(other.permutation(positions)[:most])
  assert positions[ranks].tolist() == drawn.tolist()
  assert one.random() == other.random()
