"""A search never claims more than what it has run allows.

No model: every node's distribution over its children is drawn at random, with
some mass for tokens that are in no name.
"""

import numpy as np
import pytest

from behaviorlm_jax.score import label_tree
from behaviorlm_jax.score import search

ALPHABET = 6


def make_tree(rng, count=60, longest=5):
  """A tree over random names, each closed by the token 0."""
  names = {
    (*rng.integers(1, ALPHABET, n).tolist(), 0)
    for n in rng.integers(1, longest + 1, count)
  }
  return label_tree.build(sorted(names))


def make_log_probs(tree, rng, spread):
  """log p of every edge, and s(y) of every name by adding them up."""
  edges = np.zeros(len(tree.edge_tokens))
  for node in range(len(tree.tokens) + 1):
    mine = tree.edge_nodes == node
    logits = rng.normal(0, spread, mine.sum() + 1)  # One for all other tokens.
    logits -= np.logaddexp.reduce(logits)
    edges[mine] = logits[:-1]
  return edges, np.append(edges, 0)[tree.paths].sum(axis=1)


def run(index, edges, one, most=4, rounds=1000):
  """Runs a search to its certificate; returns what was run, by round."""
  chosen = []
  while not one.certified() and len(chosen) < rounds:
    chosen.append(one.choose(most))
    one.learn(chosen[-1], [edges[index.edges[n]] for n in chosen[-1]])
  return chosen


def start(index, edges, tolerance=1e-3, top=3, wanted=None, guesses=None):
  return search.Search(
    index,
    guesses or search.Guesses(index),
    edges[index.edges[0]],
    tolerance,
    top,
    wanted,
  )


@pytest.mark.parametrize('spread', [0.3, 2.0, 6.0])
@pytest.mark.parametrize('tolerance', [1e-4, 1e-2, 0.5])
def test_what_is_certified_holds(spread, tolerance):
  for seed in range(20):
    rng = np.random.default_rng(seed)
    tree = make_tree(rng)
    index = search.Index(tree)
    edges, expected = make_log_probs(tree, rng, spread)
    wanted = int(rng.integers(len(expected)))
    one = start(index, edges, tolerance, 3, wanted)
    run(index, edges, one)
    found = one.result().astype(np.float64)
    exact = [wanted, *one.scores]
    np.testing.assert_allclose(found[exact], expected[exact], atol=1e-5)
    moved = label_tree.log_softmax(found[None]) - label_tree.log_softmax(expected[None])
    assert np.abs(moved[0, exact]).max() <= tolerance + 1e-5
    assert (label_tree.best(found[None], 3) == label_tree.best(expected[None], 3)).all()


def test_a_sure_model_needs_few_nodes():
  rng = np.random.default_rng(0)
  tree = make_tree(rng, 300)
  index = search.Index(tree)
  edges, _ = make_log_probs(tree, rng, 12.0)
  one = start(index, edges, top=1)
  ran = sum(map(len, run(index, edges, one, most=1)))
  assert ran < len(tree.tokens) / 4


def test_searching_on_ends_with_the_whole_tree():
  rng = np.random.default_rng(1)
  tree = make_tree(rng)
  index = search.Index(tree)
  edges, expected = make_log_probs(tree, rng, 1.0)
  one = start(index, edges, tolerance=0.0)
  ran = [node for some in run(index, edges, one) for node in some]
  assert sorted(ran) == list(range(1, len(tree.tokens) + 1))
  np.testing.assert_allclose(one.result(), expected, rtol=1e-5)


def test_parents_come_before_their_children():
  rng = np.random.default_rng(2)
  tree = make_tree(rng)
  index = search.Index(tree)
  edges, _ = make_log_probs(tree, rng, 1.0)
  seen = {0}
  for some in run(index, edges, start(index, edges, tolerance=0.0), most=7):
    assert 0 < len(some) <= 7
    for node in some:
      assert tree.parents[node] in seen
      seen.add(node)


def test_a_node_sees_itself_and_its_ancestors():
  """
  root -5-> 1 -6-> 2 -9->
              -7-> 3 -9->
       -8-> 4 -9->
  """
  index = search.Index(label_tree.build([[5, 6, 9], [5, 7, 9], [8, 9]]))
  one = search.Search(index, search.Guesses(index), np.log([0.5, 0.2]), 0, 1)
  seen, children = np.zeros((2, 8), bool), np.zeros((2, 2), int)
  one.place([1, 3], 0, seen, children)
  assert np.argwhere(seen).tolist() == [[0, 0], [1, 0], [1, 1]]
  assert children.tolist() == [[6, 7], [9, 0]]
  seen = np.zeros((2, 8), bool)
  one.place([2], 4, seen, children)  # Later; some slots before are empty.
  assert np.argwhere(seen).tolist() == [[0, 0], [0, 4]]


def test_names_below_an_open_prefix_share_its_mass():
  index = search.Index(label_tree.build([[5, 6, 9], [5, 7, 9], [8, 9], [9]]))
  one = search.Search(index, search.Guesses(index), np.log([0.5, 0.2, 0.1]), 1, 1)
  np.testing.assert_allclose(np.exp(one.result()), [0.25, 0.25, 0.2, 0.1], rtol=1e-6)


def test_guesses_are_mean_log_probabilities():
  index = search.Index(label_tree.build([[5, 6, 9], [5, 7, 9]]))
  guesses = search.Guesses(index)
  np.testing.assert_allclose(guesses.mean, np.log([1, 0.5, 1, 0.5, 1]))
  guesses.learn([1, 3], np.array([-1.0, -2.0]))
  guesses.learn([1, 3], np.array([-3.0, -4.0]))
  np.testing.assert_allclose(
    guesses.mean, [0, (-4 - np.log(2)) / 3, 0, (-6 - np.log(2)) / 3, 0]
  )


def test_guesses_save_work_and_change_nothing_certified():
  rng = np.random.default_rng(3)
  tree = make_tree(rng, 300)
  index, found, counts = search.Index(tree), [], []
  edges, _ = make_log_probs(tree, rng, 4.0)
  guesses = search.Guesses(index)
  for _ in range(3):
    one = start(index, edges, guesses=guesses)
    counts.append(sum(map(len, run(index, edges, one, most=24))))
    found.append(label_tree.log_softmax(one.result()[None])[0])
  assert counts[-1] < counts[0]
  np.testing.assert_allclose(
    found[-1][list(one.scores)], found[0][list(one.scores)], atol=2e-3
  )
