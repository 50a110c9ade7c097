"""The scorer gives what scoring every name by itself gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.data.questions import QuestionRow
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import lora, weights
from behaviorlm_jax.score import scorer as scorer_lib
from behaviorlm_jax.score import tree_scores
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
LENGTHS = (40, 1, 17, 90, 40)  # not sorted, no multiple of a batch
LENGTH = 128  # of a row


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


def row_of(prompts):
  """A row with one window for each prompt, and what is asked of all of them."""
  sizes = [len(prompt) for prompt in prompts]
  fill = lambda parts: np.pad(np.concatenate(parts), (0, LENGTH - sum(sizes)))
  roots = np.cumsum(sizes) - 1
  return QuestionRow(
    fill(prompts).astype(np.int32),
    fill([np.arange(size) for size in sizes]).astype(np.int32),
    fill([np.full(size, i + 1) for i, size in enumerate(sizes)]).astype(np.int32),
    roots.astype(np.int32),
    roots,
    roots,
  )


def run(scorer, prompts, adapter=None):
  """Scores of prompts [n, Y]: two of a row, and a last one by itself."""
  rows = [row_of(prompts[i : i + 2]) for i in range(0, len(prompts), 2)]
  return np.concatenate(scorer(adapter, rows))


def scores_of(base, prompts, *arguments):
  return run(make_scorer(base, *arguments), prompts)


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
  bare = run(scorer, prompts)
  np.testing.assert_allclose(run(scorer, prompts, adapter), bare, atol=1e-5)
  adapter['down_proj']['b'] += 0.1
  assert np.abs(run(scorer, prompts, adapter) - bare).max() > 0.01


@pytest.mark.parametrize('softmax', ['names', 'vocabulary'])
def test_every_question_of_a_window_scores_as_if_it_stood_alone(llama, softmax):
  """Beginnings of one text, many of a window: more than are asked at once."""
  scorer = make_scorer(llama[1], NAMES, softmax)
  texts, row = make_prompts((90, 38)), row_of(make_prompts((90, 38)))
  roots = np.array([*range(2, 90, 4), 90, 108, 127], np.int32)
  scorer.asked = 5
  [dense] = scorer(None, [dataclasses.replace(row, roots=roots)])
  begins = [0 if root < 90 else 90 for root in roots]
  alone = [
    np.concatenate(texts)[begin : root + 1]
    for begin, root in zip(begins, roots, strict=True)
  ]
  found = np.concatenate(scorer(None, [row_of([prompt]) for prompt in alone]))
  np.testing.assert_allclose(dense, found, rtol=0, atol=1e-4)


def test_a_question_sees_nothing_later_and_no_other_question(llama):
  """By gradient: of each score, to what the model holds at each place."""
  scorer, row = make_scorer(llama[1], NAMES, 'names'), row_of(make_prompts((60, 20)))
  model, [tree] = scorer.attach(scorer.params, None), scorer.trees
  roots = jnp.array([[10, 30, 70]])
  arrays = [jnp.asarray(x)[None] for x in (row.tokens, row.positions, row.segments)]
  rows = tree_scores.read_rows(model, *arrays)

  def scores(hidden, keys):
    changed = dataclasses.replace(rows, hidden=hidden, cache=(keys, rows.cache[1]))
    return tree_scores.question_scores(model, tree, changed, roots, 'names')[0]

  of_hidden, of_keys = jax.jacrev(scores, (0, 1))(rows.hidden, rows.cache[0])
  for question, seen in enumerate([range(11), range(31), range(60, 71)]):
    hidden = np.abs(of_hidden[question]).sum(axis=(0, 1, 3))
    keys = np.abs(of_keys[question]).sum(axis=(0, 1, 2, 4, 5))
    assert np.flatnonzero(hidden).tolist() == [roots[0, question]]
    assert np.flatnonzero(keys).tolist() == list(seen)


def test_two_programs_are_compiled_for_all_rows_of_a_length(llama):
  scorer = make_scorer(llama[1])
  run(scorer, make_prompts((3, 32, 10, 1, 17)))
  run(scorer, make_prompts((33, 64, 5, 40)))
  assert scorer._read._cache_size() == scorer._ask._cache_size() == 1


def test_progress_counts_every_question_once(llama):
  counts = []
  rows = [row_of(make_prompts(sizes)) for sizes in ((5, 9), (7,), (1, 2, 3))]
  make_scorer(llama[1])(None, rows, progress=counts.append)
  assert counts == [5, 1]  # Two rows of a batch, of those with most first.


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
