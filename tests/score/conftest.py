"""A tiny Llama in torch and as we open it, and scores by brute force."""

import numpy as np
import pytest
import torch


@pytest.fixture(scope='session')
def llama(make_llama):
  """The torch model and the opened base of the same random weights."""
  return make_llama(tied=False, spread=0.3)


@pytest.fixture(scope='session')
def brute_force():
  """One forward pass of transformers per prompt and name."""

  def score(model, prompts, names):
    with torch.no_grad():
      return np.array(
        [[score_one(model, prompt, name) for name in names] for prompt in prompts]
      )

  return score


def score_one(model, prompt, name):
  """log p(name | prompt), both token ids."""
  tokens = torch.tensor([[*prompt, *name]])
  logits = model(tokens).logits[0, len(prompt) - 1 : -1]
  scores = torch.log_softmax(logits, -1)
  return float(scores[range(len(name)), list(name)].sum())
