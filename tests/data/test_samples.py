"""Samples: who may be asked for, or learned."""

import dataclasses

import numpy as np
import pytest

from behaviorlm_jax.data import samples as samples_lib


def of_split(events, split='train', anchors_only=False):
  return samples_lib.Samples(events, split, 4, anchors_only)


def test_samples_have_enough_past_and_belong_to_the_split(table):
  samples = of_split(table).all()
  assert 60 not in samples  # The short user has 4 training events.
  assert len(samples) == 48 - 4 + 0 + 10 - 4 + 64 - 4
  assert (table.split[samples] == 0).all()
  anchors = of_split(table, anchors_only=True).all()
  names = [table.behaviors[b].name for b in table.behavior[samples]]
  expected = [s for s, n in zip(samples, names, strict=True) if n not in 'xyz']
  assert anchors.tolist() == expected
  assert 0 < len(anchors) < len(samples)
  tests = of_split(table, 'test').all()
  assert (table.split[tests] == 2).all() and len(tests) == 12 + 1 + 2 + 16


def test_behaviors_of_the_test_split_alone_are_no_samples(make_events):
  events = dataclasses.replace(make_events(['ababababzz'], train=0.8), known=2)
  assert not len(of_split(events, 'test').all())


@pytest.mark.parametrize('block', [1, 7, 1000])
def test_blocks_hold_whole_users_and_change_nothing(table, monkeypatch, block):
  every = of_split(table).all()
  monkeypatch.setattr(samples_lib, '_BLOCK', block)
  spans = list(samples_lib.spans(table))
  assert [span.start for span in spans] == [0, *(s.stop for s in spans[:-1])]
  assert all(table.first[span.start] == span.start for span in spans)
  assert len(spans) == {1: 4, 7: 4, 1000: 1}[block]
  samples = of_split(table)
  assert samples.all().tolist() == every.tolist()
  ranks = np.array([0, 3, len(every) - 1])
  assert samples.at(ranks).tolist() == every[ranks].tolist()
  behavior = table.behavior[every]
  np.testing.assert_array_equal(samples.counts, np.bincount(behavior))
  pools, ranks = samples.by_behavior(), {5: np.zeros(0, int)}
  assert list(pools) == np.unique(behavior).tolist()
  for b, pool in pools.items():
    assert pool.tolist() == every[behavior == b].tolist()
    ranks.setdefault(b, np.arange(0, len(pool), 2))
  for b, found in samples.at_of_behaviors(ranks).items():
    assert found.tolist() == (pools[b][::2].tolist() if b != 5 else [])


@pytest.mark.parametrize('most', [0, 5, 1000])
def test_ranks_are_drawn_as_positions_would_be(most):
  positions = np.arange(100) * 3
  one, other = np.random.default_rng(0), np.random.default_rng(0)
  ranks = samples_lib.draw_ranks(one, len(positions), most)
  drawn = np.sort(other.permutation(positions)[:most])
  assert positions[ranks].tolist() == drawn.tolist()
  assert one.random() == other.random()
