"""Sampling: transformers' greedy text, seeds, ends, and the model's odds."""

import jax
import numpy as np
import pytest
import torch

from behaviorlm_jax.model import sample
from behaviorlm_jax.model import weights

TOKENS = 12


@pytest.fixture(scope='module')
def pair(make_llama):
  """A tiny Llama in torch, and its config and params as we read them."""
  model, base = make_llama(tied=True, spread=0.2)
  return model, base.config, weights.read_params(base, np.float32)


@pytest.fixture(scope='module')
def prompts():
  """More than a batch, of more than one width."""
  rng = np.random.default_rng(0)
  return [
    rng.integers(0, 300, n).astype(np.int32)
    for n in rng.integers(1, 2 * sample.WIDTH, sample.BATCH + 3)
  ]


def draw(pair, prompts, seed=0, temperature=1.0, ends=(), tokens=TOKENS):
  _, config, params = pair
  settings = sample.Settings(tokens, temperature, ends)
  return sample.answers(config, params, prompts, seed, settings)


def greedy(model, prompt):
  with torch.no_grad():
    whole = model.generate(
      torch.tensor(prompt[None], dtype=torch.long),
      do_sample=False,
      attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
      max_new_tokens=TOKENS,
      eos_token_id=None,
      pad_token_id=0,
    )
  return whole[0, len(prompt) :].tolist()


def test_greedy_answers_equal_those_of_transformers(pair, prompts):
  expected = [greedy(pair[0], prompt) for prompt in prompts]
  assert len({tuple(answer) for answer in expected}) > len(prompts) // 2
  found = draw(pair, prompts, temperature=0.0)
  assert [answer.tolist() for answer in found] == expected
  assert all(answer.dtype == np.int32 for answer in found)


def test_an_answer_ends_with_its_first_end_token(pair, prompts):
  whole = draw(pair, prompts)
  ends = (int(whole[0][5]), int(whole[1][2]))
  for answer, cut in zip(whole, draw(pair, prompts, ends=ends), strict=True):
    places = np.flatnonzero(np.isin(answer, ends))
    stop = places[0] + 1 if len(places) else TOKENS
    assert cut.tolist() == answer[:stop].tolist()


def test_a_seed_decides_the_draws_and_not_the_batch(pair, prompts):
  texts = lambda found: [answer.tolist() for answer in found]
  first = texts(draw(pair, prompts))
  assert texts(draw(pair, prompts)) == first
  assert texts(draw(pair, prompts[:5])) == first[:5]
  others = texts(draw(pair, prompts, seed=1))
  assert sum(a == b for a, b in zip(first, others, strict=True)) <= 1
  same = texts(draw(pair, [prompts[0]] * 6))
  assert len(set(map(tuple, same))) == 6  # Each prompt has its own draws.


@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_tokens_come_as_often_as_the_model_says(pair, prompts, temperature):
  model, n = pair[0], 1500
  prompt = prompts[0][:6]
  with torch.no_grad():
    logits = model(torch.tensor(prompt[None], dtype=torch.long)).logits[0, -1]
  expected = torch.softmax(logits / temperature, -1).numpy()
  found = draw(pair, [prompt] * n, temperature=temperature, tokens=1)
  shares = np.bincount(np.concatenate(found), minlength=300) / n
  spread = np.sqrt(expected * (1 - expected) / n)
  assert np.abs(shares - expected).max() < 5 * spread.max()
  assert (np.abs(shares - expected) < 5 * spread + 2 / n).all()


def test_progress_counts_prompts_and_may_stop(pair, prompts):
  counts = []
  _, config, params = pair
  sample.answers(config, params, prompts, 0, sample.Settings(2, 1.0, ()), counts.append)
  assert counts == [sample.BATCH, 3]

  def stop(count):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    sample.answers(config, params, prompts, 0, sample.Settings(2, 1.0, ()), stop)


def test_bfloat16_answers_are_tokens_too(make_llama, prompts):
  _, base = make_llama(tied=False, spread=0.2)
  params = weights.read_params(base, jax.numpy.bfloat16)
  found = draw((None, base.config, params), prompts[:4])
  assert all(len(answer) == TOKENS and (answer < 300).all() for answer in found)
