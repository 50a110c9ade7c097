"""A tiny Llama in torch and in JAX, an adapter, and packed batches."""

import jax
import numpy as np
import pytest
import torch
import transformers

from behaviorlm_jax.model import lora
from behaviorlm_jax.model import weights

VOCAB, RANK = 300, 3
TARGETS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj',
           'down_proj')


@pytest.fixture(scope='session')
def llama(tmp_path_factory):
  """The opened base of a tiny random Llama that transformers saved."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, tie_word_embeddings=True, max_position_embeddings=512,
  ))
  for parameter in model.parameters():
    spread = 0.2 if parameter.ndim == 2 else 1.0
    torch.nn.init.normal_(parameter, std=spread)
  folder = tmp_path_factory.mktemp('llama')
  model.save_pretrained(folder)
  weights.open_base('random://tiny').tokenizer.save_pretrained(folder)
  return weights.open_base(str(folder))


@pytest.fixture(scope='session')
def params(llama):
  return weights.read_params(llama, np.float32)


@pytest.fixture
def adapter(llama):
  """An adapter in the middle of training: B is not zero."""
  fresh = lora.init(llama.config, RANK, TARGETS, jax.random.key(0))
  generator = np.random.default_rng(0)
  draw = lambda b: generator.normal(0, 0.05, b.shape).astype(np.float32)
  return {name: {'a': np.asarray(ab['a']), 'b': draw(ab['b'])}
          for name, ab in fresh.items()}


@pytest.fixture
def make_batch():
  """A packed batch as data.loader makes it, of segments of given lengths."""

  def make(rows, length=24, answers=10, seed=0):
    generator = np.random.default_rng(seed)
    batch = {name: np.zeros((len(rows), length), np.int32)
             for name in ('tokens', 'segments', 'positions')}
    for name in ('answer_positions', 'answer_tokens'):
      batch[name] = np.zeros((len(rows), answers), np.int32)
    batch['answer_weights'] = np.zeros((len(rows), answers), np.float32)
    batch['samples'] = np.ones(len(rows), np.int32)
    for row, segments in enumerate(rows):
      fill(batch, row, segments, generator)
    return batch

  return make


def fill(batch, row, segments, generator):
  """Writes segments (tokens, answers) into a row; the last tokens count."""
  begin = filled = 0
  for number, (length, answers) in enumerate(segments, start=1):
    stop = begin + length
    tokens = generator.integers(0, VOCAB, length)
    batch['tokens'][row, begin:stop] = tokens
    batch['segments'][row, begin:stop] = number
    batch['positions'][row, begin:stop] = np.arange(length)
    chosen = slice(filled, filled + answers)
    where = np.arange(stop - answers, stop)
    batch['answer_positions'][row, chosen] = where - 1
    batch['answer_tokens'][row, chosen] = batch['tokens'][row, where]
    batch['answer_weights'][row, chosen] = generator.uniform(0.2, 3, answers)
    begin, filled = stop, filled + answers
