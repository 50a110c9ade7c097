"""A tiny Llama, in torch and as our decoder reads it."""

import numpy as np
import pytest
import torch
import transformers

from behaviorlm_jax.model import weights

VOCAB = 300


@pytest.fixture(scope='session')
def llama(tmp_path_factory):
  """The torch model and the opened base of the same random weights."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, tie_word_embeddings=False, max_position_embeddings=512,
  ))
  for parameter in model.parameters():
    spread = 0.3 if parameter.ndim == 2 else 1.0
    torch.nn.init.normal_(parameter, std=spread)
  folder = tmp_path_factory.mktemp('llama')
  model.save_pretrained(folder)
  weights.open_base('random://tiny').tokenizer.save_pretrained(folder)
  return model.eval(), weights.open_base(str(folder))


@pytest.fixture(scope='session')
def brute_force():
  """One forward pass of transformers per prompt and name."""

  def score(model, prompts, names):
    with torch.no_grad():
      return np.array([[score_one(model, prompt, name) for name in names]
                       for prompt in prompts])

  return score


def score_one(model, prompt, name):
  """log p(name | prompt), both token ids."""
  tokens = torch.tensor([[*prompt, *name]])
  logits = model(tokens).logits[0, len(prompt) - 1:-1]
  scores = torch.log_softmax(logits, -1)
  return float(scores[range(len(name)), list(name)].sum())
