"""A tiny Llama in torch and in JAX, an adapter, and packed batches."""

import jax
import numpy as np
import pytest

from behaviorlm_jax.model import lora, weights

VOCAB, RANK = 300, 3
TARGETS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')


@pytest.fixture(scope='session')
def llama(make_llama):
  """The opened base of a tiny random Llama that transformers saved."""
  return make_llama(tied=True, spread=0.2)[1]


@pytest.fixture(scope='session')
def params(llama):
  return weights.read_params(llama, np.float32)


@pytest.fixture
def adapter(llama):
  """An adapter in the middle of training: B is not zero."""
  fresh = lora.init(llama.config, RANK, TARGETS, jax.random.key(0))
  generator = np.random.default_rng(0)
  draw = lambda b: generator.normal(0, 0.05, b.shape).astype(np.float32)
  return {
    name: {'a': np.asarray(ab['a']), 'b': draw(ab['b'])} for name, ab in fresh.items()
  }


@pytest.fixture
def make_batch():
  """A packed batch as data.loader makes it, of segments of given lengths."""

  def make(rows, length=24, answers=10, seed=0):
    generator = np.random.default_rng(seed)
    batch = {
      name: np.zeros((len(rows), length), np.int32)
      for name in ('tokens', 'segments', 'positions')
    }
    for name in ('answer_positions', 'answer_tokens'):
      batch[name] = np.zeros((len(rows), answers), np.int32)
    batch['answer_nodes'] = np.full((len(rows), answers), -1, np.int32)
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
