"""The scorer gives what scoring every name by itself gives."""

import jax
import numpy as np
import pytest
import torch
import transformers

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import lora, weights
from behaviorlm_jax.score import scorer as scorer_lib
from behaviorlm_jax.train import sharding, step

END = 299  # closes every name below; itself a name, the one-token one
NAMES = [
  [5, 6, 7, END],
  [5, 6, 8, END],
  [5, 6, 6, 6, 6, END],
  [5, END],
  [END],
  [9, 6, 7, END],
  [10, 10, END],
]
LENGTHS = (40, 1, 17, 90, 40)  # two widths, not sorted, no multiple of a batch


def make_prompts(lengths=LENGTHS):
  generator = np.random.default_rng(0)
  return [generator.integers(0, 300, n).astype(np.int32) for n in lengths]


def make_scorer(base, names=NAMES, softmax='vocabulary', names_per_pass=256):
  """A Scorer in float32 on all devices (here: one)."""
  config = config_lib.default()
  config.model.dtype = 'float32'
  layout = sharding.make_layout(config.mesh, config.train)
  params = weights.read_params(base, np.float32, layout.place)
  attach = step.attacher(
    base.config, layout, config.model, config.train, config.lora.alpha
  )
  score = {'batch': 2, 'softmax': softmax}
  return scorer_lib.Scorer(attach, params, names, score, layout, names_per_pass)


def scores_of(base, prompts, *arguments):
  return make_scorer(base, *arguments)(None, prompts)


def test_a_clash_between_two_chunks_is_refused(llama):
  with pytest.raises(InputError, match='two behavior names'):
    make_scorer(llama[1], [[1, 2], [3], [4], [1, 2]], 'vocabulary', 2)


def test_scores_equal_one_forward_per_name(llama, brute_force):
  """Shared prefixes, a one-token name, padded prompts of all lengths."""
  model, base = llama
  prompts = make_prompts()
  found = scores_of(base, prompts)
  expected = brute_force(model, prompts, NAMES)
  assert expected.std() > 1
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
  'chosen, chunk',
  [
    pytest.param(slice(None), 3, id='rest of one name'),
    pytest.param(slice(3, 6), 1, id='a tree without inner nodes'),
  ],
)
def test_names_cut_into_chunks_score_as_the_whole_list(llama, chosen, chunk):
  prompts = make_prompts((40, 1, 17))
  whole = scores_of(llama[1], prompts)
  parts = scores_of(llama[1], prompts, NAMES[chosen], 'vocabulary', chunk)
  np.testing.assert_allclose(parts, whole[:, chosen], rtol=0, atol=1e-4)


def test_scores_of_a_complete_tree_sum_to_one(llama):
  """Every token that can follow is a name: nothing is counted twice."""
  names = [[token] for token in range(299)] + [[END, t] for t in range(300)]
  scores = scores_of(llama[1], make_prompts((5,)), names)
  assert np.exp(scores.astype(np.float64)).sum() == pytest.approx(1, abs=1e-4)


def within_names(model, prompts, names):
  """log p of each name, every token among those that go on with some name."""
  found = np.zeros((len(prompts), len(names)))
  for row, prompt in enumerate(prompts):
    for column, name in enumerate(names):
      for i in range(len(name)):
        nexts = {
          other[i] for other in names if len(other) > i and other[:i] == name[:i]
        }
        tokens = torch.tensor([[*prompt, *name[:i]]])
        with torch.no_grad():
          logits = model(tokens.long()).logits[0, -1].double()
        total = torch.logsumexp(logits[sorted(nexts)], 0)
        found[row, column] += float(logits[name[i]] - total)
  return found


@pytest.mark.parametrize('chunk', [256, 2])
def test_scores_within_names_equal_a_softmax_over_what_goes_on(llama, chunk):
  model, base = llama
  prompts = make_prompts()
  found = scores_of(base, prompts, NAMES, 'names', chunk)
  np.testing.assert_allclose(
    found, within_names(model, prompts, NAMES), rtol=0, atol=1e-3
  )
  np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(axis=1), 1, atol=1e-5)


def test_within_names_only_what_tells_names_apart_is_run(llama):
  nodes = lambda scorer: len(scorer.trees[0].tokens)
  assert nodes(make_scorer(llama[1])) == 12
  assert nodes(make_scorer(llama[1], softmax='names')) == 2  # 5 and 5, 6.


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
  scorer(None, make_prompts((3, 32, 10, 1, 17)))
  assert scorer._score._cache_size() == 1
  scorer(None, make_prompts((33, 64, 5, 40)))
  assert scorer._score._cache_size() == 2


def test_progress_counts_every_prompt_once(llama):
  counts = []
  make_scorer(llama[1])(None, make_prompts(), progress=counts.append)
  assert counts == [2, 2, 1]


BEHAVIORS = (
  'home',
  'home office',
  'coffee shop',
  'coffee break',
  'gym',
  'bar',
  'bus station',
  'train station',
  'metro station',
  'department store',
  'drugstore / pharmacy',
  'bookstore',
  'movie theater',
  'park',
  'mall',
  'American restaurant',
  'Italian restaurant',
  'sandwich place',
  'museum',
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
  found = scores_of(base, prompts, names)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    base.folder, dtype=torch.float32
  ).eval()
  expected = brute_force(model, prompts, names)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
