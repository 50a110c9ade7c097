"""Rows of questions: what each is asked, of which context, and where it stands."""

import itertools

import numpy as np
import pytest

from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.data import questions
from behaviorlm_jax.model import weights


@pytest.fixture(scope='module')
def tokenizer():
  return weights.open_base('random://tiny').tokenizer


@pytest.fixture
def prompts(table, tokenizer):
  return prompts_lib.Prompts(table, tokenizer, 'Go on.', history=6, weekday=True)


def draw_targets(prompts, share, seed=0):
  size = len(prompts.events.user)
  return np.flatnonzero(np.random.default_rng(seed).random(size) < share)


@pytest.mark.parametrize('share', [0.1, 0.5, 1.0])
@pytest.mark.parametrize('most', [6, 11, 40])
@pytest.mark.parametrize('length', [10, 150, 400])
def test_every_target_is_asked_once_with_the_context_it_is_promised(
  prompts, share, most, length
):
  targets = draw_targets(prompts, share)
  found = list(questions.windows(prompts, targets, most, length))
  np.testing.assert_array_equal(np.concatenate([w.targets for w in found]), targets)
  for window in found:
    context = window.targets - window.start
    past = window.targets - prompts.events.first[window.targets]
    # At least data.history where the user has it; no event of another user.
    assert (context >= np.minimum(past, 6)).all()
    assert (context <= np.minimum(past, most)).all()
    assert window.length <= length or len(window.targets) == 1


def test_fewer_windows_would_not_do(prompts):
  """A window ends where the next target would see too much or does not fit."""
  found = list(questions.windows(prompts, draw_targets(prompts, 1.0), 11, 400))
  for window, after in itertools.pairwise(found):
    following = after.targets[0]
    same = prompts.events.first[following] <= window.start
    length = len(prompts.question(following, window.start))
    assert not same or following - window.start > 11 or length > 400


def test_a_row_holds_the_questions_of_its_windows(prompts):
  found = list(questions.windows(prompts, draw_targets(prompts, 0.5), 11, 300))
  packed = questions.pack(found, 300)
  assert len(packed) < len(found)
  asked = []
  for part in packed:
    row = questions.row_of(prompts, part, 300)
    asked += row.targets.tolist()
    for root, target, start in zip(row.roots, row.targets, row.starts, strict=True):
      tokens, spans = prompts.window(int(start), int(target) + 1)
      question = tokens[: spans[-1, 0]]
      where = slice(root + 1 - len(question), root + 1)
      np.testing.assert_array_equal(row.tokens[where], question)
      np.testing.assert_array_equal(row.positions[where], np.arange(len(question)))
      assert set(row.segments[where]) == {row.segments[root]}
    used = sum(window.length for window in part)
    assert (row.segments > 0).sum() == used <= 300
    assert not row.tokens[used:].any()
  assert sorted(asked) == draw_targets(prompts, 0.5).tolist()


def test_windows_are_packed_into_the_fewest_rows_that_best_fit_finds():
  window = lambda length: questions.Window(0, np.array([0]), length)
  packed = questions.pack(list(map(window, (3, 7, 5, 5, 2, 8))), 10)
  assert [[w.length for w in row] for row in packed] == [[8, 2], [7, 3], [5, 5]]
