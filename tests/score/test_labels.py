"""The label tree gives what scoring every name by itself gives."""

import jax
import numpy as np
import pytest
import scipy.special
import torch
import transformers

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import lora
from behaviorlm_jax.model import weights
from behaviorlm_jax.score import labels
from behaviorlm_jax.train import sharding
from behaviorlm_jax.train import step

END = 299  # closes every name below; itself a name, the one-token one
NAMES = [
  [5, 6, 7, END], [5, 6, 8, END], [5, 6, 6, 6, 6, END], [5, END], [END],
  [9, 6, 7, END], [10, 10, END],
]
LENGTHS = (40, 1, 17, 90, 40)  # two widths, not sorted, no multiple of a batch


def make_prompts(lengths=LENGTHS):
  generator = np.random.default_rng(0)
  return [generator.integers(0, 300, n).astype(np.int32) for n in lengths]


def make_scorer(base, names=NAMES, **fields):
  """A Scorer in float32 on all devices (here: one)."""
  config = config_lib.default()
  config.score.update({'batch': 2} | fields)
  mesh = sharding.make_mesh(config.mesh, config.train.batch)
  params = weights.read_params(base, np.float32, sharding.placer(mesh))
  attach = step.attacher(base.config, config, mesh, 'float32')
  answers = [np.array(name, np.int32) for name in names]
  return labels.Scorer(attach, params, answers, config.score, mesh)


def test_build_gives_the_tree_of_a_hand_example():
  """
  root -5-> 1 -6-> 2 -9->
              -7-> 3 -9->
       -8-> 4 -9->
       -9->
  """
  tree = labels.build([[5, 6, 9], [5, 7, 9], [8, 9], [9]])
  assert tree.tokens.tolist() == [5, 6, 7, 8]
  assert tree.depths.tolist() == [1, 2, 2, 1]
  assert tree.ancestors.astype(int).tolist() == [
    [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]
  ]
  assert tree.edge_nodes.tolist() == [0, 1, 2, 1, 3, 0, 4, 0]
  assert tree.edge_tokens.tolist() == [5, 6, 9, 7, 9, 8, 9, 9]
  assert tree.paths.tolist() == [[0, 1, 2], [0, 3, 4], [5, 6, 8], [7, 8, 8]]


@pytest.mark.parametrize('names', [
  pytest.param([[1, 2], [3], [1, 2]], id='equal'),
  pytest.param([[1, 2], [3], [1, 2, 3]], id='beginning of another'),
  pytest.param([[1, 2, 3], [1]], id='longer one first'),
])
def test_names_that_cannot_be_told_apart_are_refused(names):
  with pytest.raises(InputError, match=r'data\.events: two behavior names'):
    labels.build(names)


def test_a_clash_between_two_chunks_is_refused(llama):
  with pytest.raises(InputError, match='two behavior names'):
    make_scorer(llama[1], [[1, 2], [3], [4], [1, 2]], names_per_pass=2)


def test_scores_equal_one_forward_per_name(llama, brute_force):
  """Shared prefixes, a one-token name, padded prompts of all lengths."""
  model, base = llama
  prompts = make_prompts()
  found = make_scorer(base)(None, prompts)
  expected = brute_force(model, prompts, NAMES)
  assert expected.std() > 1
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize('chosen, chunk', [
  pytest.param(slice(None), 3, id='rest of one name'),
  pytest.param(slice(3, 6), 1, id='a tree without inner nodes'),
])
def test_names_cut_into_chunks_score_as_the_whole_list(llama, chosen, chunk):
  prompts = make_prompts((40, 1, 17))
  whole = make_scorer(llama[1])(None, prompts)
  parts = make_scorer(llama[1], NAMES[chosen], names_per_pass=chunk)
  np.testing.assert_allclose(
    parts(None, prompts), whole[:, chosen], rtol=0, atol=1e-4
  )


def test_scores_of_a_complete_tree_sum_to_one(llama):
  """Every token that can follow is a name: nothing is counted twice."""
  names = [[token] for token in range(299)] + [[END, t] for t in range(300)]
  scores = make_scorer(llama[1], names)(None, make_prompts((5,)))
  assert np.exp(scores.astype(np.float64)).sum() == pytest.approx(1, abs=1e-4)


def test_an_adapter_changes_the_scores(llama):
  _, base = llama
  scorer, prompts = make_scorer(base), make_prompts((9, 30))
  key = jax.random.key(0)
  adapter = lora.init(base.config, 2, ('q_proj', 'down_proj'), key)
  bare = scorer(None, prompts)
  np.testing.assert_allclose(scorer(adapter, prompts), bare, atol=1e-5)
  adapter['down_proj']['b'] += 0.1
  assert np.abs(scorer(adapter, prompts) - bare).max() > 0.01


def test_scorer_compiles_once_per_width(llama):
  scorer = make_scorer(llama[1])
  scorer(None, make_prompts((3, 64, 10, 1, 33)))
  assert scorer._run._cache_size() == 1
  scorer(None, make_prompts((65, 128, 5)))
  assert scorer._run._cache_size() == 2


def test_progress_counts_every_prompt_once(llama):
  counts = []
  make_scorer(llama[1])(None, make_prompts(), counts.append)
  assert counts == [2, 2, 1]


def test_log_softmax_equals_scipys():
  generator = np.random.default_rng(0)
  scores = generator.normal(-800, 300, (4, 50)).astype(np.float32)
  expected = scipy.special.log_softmax(scores.astype(np.float64), axis=1)
  np.testing.assert_allclose(labels.log_softmax(scores), expected, rtol=1e-12)


def test_best_falls_and_breaks_ties_by_id():
  scores = np.array([[0.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 4.0]])
  assert labels.best(scores, 3).tolist() == [[1, 3, 2], [3, 0, 1]]
  assert labels.best(scores, 9).shape == (2, 4)


BEHAVIORS = (
  'home', 'home office', 'coffee shop', 'coffee break', 'gym', 'bar',
  'bus station', 'train station', 'metro station', 'department store',
  'drugstore / pharmacy', 'bookstore', 'movie theater', 'park', 'mall',
  'American restaurant', 'Italian restaurant', 'sandwich place', 'museum',
)
LOGS = (
  'Mon 08:10 home\nMon 08:55 coffee shop\nMon 19:02',
  'The log of one person.\nFri 07:30 home\nFri 07:58 metro station\n'
  'Fri 12:20 sandwich place\nFri 18:45 gym\nFri 20:15 bar\nSat 11:40',
)


@pytest.mark.slow
def test_smollm2_scores_equal_one_forward_per_name(brute_force):
  base = weights.open_base(config_lib.SMOLLM2)
  encode = lambda text: base.tokenizer.encode(text, add_special_tokens=False)
  names = [encode(prompts_lib.answer_text(name)) for name in BEHAVIORS]
  prompts = [np.array(encode(log), np.int32) for log in LOGS]
  found = make_scorer(base, names)(None, prompts)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    base.folder, dtype=torch.float32
  ).eval()
  expected = brute_force(model, prompts, names)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
