"""The peer of SASRec sees the same past, and learns."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest

from behaviorlm_jax.evaluate import sasrec

sys.path.append(str(Path(__file__).parents[2] / 'benchmarks'))

import sasrec_peer


@pytest.fixture
def recipe():
  return sasrec.Recipe(
    steps=60,
    width=16,
    layers=2,
    weekday=True,
    min_context=2,
    seed=0,
    history=6,
    batch=16,
    dropout=0.0,
    learning_rate=1e-2,
  )


@pytest.fixture
def events():
  """12 users of 30 events, of whom each does two things in turns."""
  rows = np.random.default_rng(0).integers(5, size=(12, 30))
  for t in range(2, 30):
    rows[:, t] = rows[:, t - 2]
  place = np.tile(np.arange(30), 12)
  return types.SimpleNamespace(
    behavior=rows.ravel(),
    known=5,
    first=np.repeat(np.arange(12) * 30, 30),
    time=np.arange(360) * 5000,
    split=np.where(place < 20, 0, np.where(place < 25, 1, 2)).astype(np.int8),
  )


def test_windows_are_those_of_ours_from_the_left(events, recipe):
  events.behavior[3::11] = 5  # Not known in training.
  ends = np.array([22, 33, 100, 359])
  rows, last = sasrec_peer.stack(events, ends, recipe)
  ours = sasrec.windows(events, ends, recipe)
  learned = sasrec.targets(events, ours, 'train')
  for row in range(len(ends)):
    real = ours['real'][row]
    part = rows[:, row, : int(last[row]) + 1].numpy()
    for values, name in zip(part[[0, 2, 3]], ('behavior', 'hour', 'day'), strict=True):
      np.testing.assert_array_equal(values, ours[name][row][real])
    np.testing.assert_array_equal(part[1], np.flatnonzero(real))
    target = np.where(learned['weight'][row] > 0, learned['target'][row], -1)
    np.testing.assert_array_equal(part[4], target[real])
    assert (rows[4, row, int(last[row]) + 1 :] == -1).all()


def test_the_peer_learns_what_follows(events, recipe):
  ends = sasrec_peer.positions(events, 'test', recipe)
  assert len(ends) == 60
  accuracy, log_p = sasrec_peer.scores(
    sasrec_peer.train(events, recipe), events, ends, recipe
  )
  assert accuracy > 0.6 and log_p > np.log(1 / 5) + 0.5
