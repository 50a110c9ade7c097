"""The label tree over names, and what is made of its scores."""

import numpy as np
import pytest
import scipy.special

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.score import label_tree


def test_build_gives_the_tree_of_a_hand_example():
  """
  root -5-> 1 -6-> 2 -9->
              -7-> 3 -9->
       -8-> 4 -9->
       -9->
  """
  tree = label_tree.build([[5, 6, 9], [5, 7, 9], [8, 9], [9]])
  assert tree.tokens.tolist() == [5, 6, 7, 8]
  assert tree.depths.tolist() == [1, 2, 2, 1]
  assert tree.ancestors.astype(int).tolist() == [
    [1, 0, 0, 0],
    [1, 1, 0, 0],
    [1, 0, 1, 0],
    [0, 0, 0, 1],
  ]
  assert tree.edge_nodes.tolist() == [0, 1, 2, 1, 3, 0, 4, 0]
  assert tree.edge_tokens.tolist() == [5, 6, 9, 7, 9, 8, 9, 9]
  assert tree.edge_children.tolist() == [1, 2, 0, 3, 0, 4, 0, 0]
  assert tree.paths.tolist() == [[0, 1, 2], [0, 3, 4], [5, 6, 8], [7, 8, 8]]


def test_a_token_is_a_choice_where_another_could_follow():
  tree = label_tree.build([[5, 6, 9], [5, 6, 7, 7, 9], [8, 9]])
  assert [tree.choices(y).tolist() for y in range(3)] == [[0, 2], [0, 2], [0]]
  assert label_tree.build([[5, 6, 9]]).choices(0).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
  'names',
  [
    pytest.param([[1, 2], [3], [1, 2]], id='equal'),
    pytest.param([[1, 2], [3], [1, 2, 3]], id='beginning of another'),
    pytest.param([[1, 2, 3], [1]], id='longer one first'),
  ],
)
def test_names_that_cannot_be_told_apart_are_refused(names):
  with pytest.raises(InputError, match=r'data\.events: two behavior names'):
    label_tree.build(names)


def test_shortest_cuts_behind_the_first_token_of_its_own():
  names = [[5, 6, 9], [5, 7, 8, 9], [8, 9, 9], [9], [5, 7, 7, 7, 9]]
  assert label_tree.shortest(names) == [(5, 6), (5, 7, 8), (8,), (9,), (5, 7, 7)]


def test_log_softmax_equals_scipys():
  generator = np.random.default_rng(0)
  scores = generator.normal(-800, 300, (4, 50)).astype(np.float32)
  expected = scipy.special.log_softmax(scores.astype(np.float64), axis=1)
  np.testing.assert_allclose(label_tree.log_softmax(scores), expected, rtol=1e-12)


def test_best_falls_and_breaks_ties_by_id():
  scores = np.array([[0.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 4.0]])
  assert label_tree.best(scores, 3).tolist() == [[1, 3, 2], [3, 0, 1]]
  assert label_tree.best(scores, 9).shape == (2, 4)
