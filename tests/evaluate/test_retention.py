"""Retention equals a plain computation in torch."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data import conversations
from behaviorlm_jax.evaluate import retention
from behaviorlm_jax.model import lora, weights
from behaviorlm_jax.train import sharding, step

LENGTHS = (40, 9, 64, 17, 30)  # two widths, not sorted, no multiple of a batch


def make_talks(lengths=LENGTHS, seed=0):
  """Random tokens, about half of them answers, in runs and alone."""
  rng = np.random.default_rng(seed)
  talks = []
  for length in lengths:
    answers = rng.random(length) < 0.5
    answers[0], answers[-1] = False, True
    tokens = rng.integers(0, 300, length).astype(np.int32)
    talks.append(conversations.Conversation(tokens, answers))
  return talks


def make_adapter(base):
  adapter = lora.init(base.config, 2, ('q_proj', 'down_proj'), jax.random.key(0))
  rng = np.random.default_rng(0)
  for sides in adapter.values():
    b = rng.standard_normal(sides['b'].shape) * 0.02
    sides['b'] = b.astype(np.float32)
  return adapter


def make_retention(base, talks, batch=2):
  config = config_lib.default()
  config.model.dtype = 'float32'
  layout = sharding.make_layout(config.mesh, config.train)
  params = weights.read_params(base, np.float32, layout.place)
  attach = step.attacher(
    base.config, layout, config.model, config.train, config.lora.alpha
  )
  return retention.Retention(attach, params, layout, talks, batch)


class Alphabet:
  """Stands in for a decoder: after byte i comes i + 1, with logit 5, not 0."""

  def packed_hidden(self, tokens, positions, segments):
    return jax.nn.one_hot(tokens + 1, 300), None

  def logits(self, hidden):
    return 5 * hidden


def make_alphabet(talks):
  config = config_lib.default()
  layout = sharding.make_layout(config.mesh, config.train)
  attach = lambda params, adapter: Alphabet()
  return retention.Retention(attach, jnp.zeros(()), layout, talks)


@pytest.fixture(scope='module')
def llama(make_llama):
  return make_llama(tied=False, spread=0.2)


@pytest.fixture(scope='module')
def tuned(llama):
  """The torch model with the adapter added to its weights."""
  model, base = llama
  model, scale = copy.deepcopy(model), config_lib.default().lora.alpha / 2
  for name, sides in make_adapter(base).items():
    for i, layer in enumerate(model.model.layers):
      (module,) = (m for n, m in layer.named_modules() if n.endswith(name))
      product = np.asarray(sides['b'][i]) @ np.asarray(sides['a'][i])
      module.weight.data += scale * torch.tensor(product)
  return model


@pytest.fixture(scope='module')
def measured(llama):
  """A Retention, and what it says of the adapter."""
  found = make_retention(llama[1], make_talks())
  return found, found.measure(make_adapter(llama[1]))


def log_probs(model, talk):
  """float64 log p [n, V] at the answers of a conversation, and log p [n]."""
  tokens = torch.tensor(talk.tokens.astype(np.int64))
  with torch.no_grad():
    logits = model(tokens[None]).logits[0, :-1].double()
  mask = torch.tensor(talk.answers[1:])
  table = torch.log_softmax(logits, -1)[mask]
  return table, table[range(len(table)), tokens[1:][mask]]


def test_conversations_equal_a_computation_in_torch(llama, tuned, measured):
  before = [log_probs(llama[0], talk) for talk in make_talks()]
  after = [log_probs(tuned, talk) for talk in make_talks()]
  kl = torch.cat(
    [(p.exp() * (p - q)).sum(-1) for (p, _), (q, _) in zip(before, after, strict=True)]
  )
  old, new = (torch.cat([told for _, told in x]) for x in (before, after))
  found = measured[1]['conversations']
  assert found['n'] == len(LENGTHS)
  assert found['answer_tokens'] == len(kl)
  assert kl.mean() > 0.05
  close = lambda x: pytest.approx(float(x), rel=1e-4)
  assert found['perplexity'] == close(torch.exp(-new.mean()))
  assert found['kl_to_base'] == close(kl.mean())
  assert found['perplexity_ratio'] == close(torch.exp((old - new).mean()))


def test_the_base_model_is_at_no_distance_from_itself(measured):
  found = measured[0].measure(None)
  assert found['conversations']['kl_to_base'] == 0
  assert found['conversations']['kl_to_base_interval'] == [0, 0]
  assert found['conversations']['perplexity_ratio'] == 1
  assert found['conversations']['perplexity_ratio_interval'] == [1, 1]


def test_a_fresh_adapter_is_at_no_distance_from_the_base(llama, measured):
  adapter = lora.init(llama[1].config, 2, ('q_proj',), jax.random.key(0))
  found = measured[0].measure(adapter)['conversations']
  assert found['kl_to_base'] == pytest.approx(0, abs=1e-5)
  assert found['perplexity_ratio'] == pytest.approx(1, abs=1e-5)


def test_batches_and_padding_do_not_change_results(llama, measured):
  again = make_retention(llama[1], make_talks(), batch=7)
  found = again.measure(make_adapter(llama[1]))['conversations']
  for name, value in measured[1]['conversations'].items():
    assert found[name] == pytest.approx(value, rel=1e-4), name


def test_one_program_per_width_and_one_for_all_answers(measured):
  found, _ = measured
  assert found._log_probs._cache_size() == found._divergence._cache_size() == 1
  found.measure(None)
  widths = {-(-length // 32) for length in LENGTHS}
  assert found._hidden._cache_size() <= 3 * len(widths)  # base and adapters


def test_numbers_are_plain_and_finite(measured):
  json.dumps(measured[1], allow_nan=False)


def test_progress_counts_the_base_once():
  found = make_alphabet(make_talks())
  for adapter, rows in (({}, 10), ({}, 5), (None, 0)):
    counts = []
    assert found.rows(adapter) == rows
    found.measure(adapter, counts.append)
    assert sum(counts) == rows


def alphabetical(length):
  """A conversation whose next byte the model always knows."""
  answers = np.arange(length) > 0
  return conversations.Conversation(np.arange(length, dtype=np.int32), answers)


def test_intervals_contain_the_value_and_shrink_with_more_conversations():
  talks, spans = [*map(alphabetical, (10, 20, 30)), *make_talks()], []
  for times in (1, 16):
    found = make_alphabet(talks * times).measure(None)['conversations']
    low, high = found['perplexity_interval']
    assert low < found['perplexity'] < high
    spans.append(high - low)
  assert spans[1] < spans[0] / 2


def test_a_single_item_has_no_interval():
  found = make_alphabet(make_talks((9,))).measure(None)['conversations']
  assert found['perplexity'] > 1
  assert found['perplexity_interval'] is None


def test_holding_out_goes_by_content_and_not_by_order():
  talks = make_talks((5,) * 2000)
  training, held = retention.hold_out(talks, 0.1)
  assert 150 < len(held) < 250
  assert len(training) + len(held) == len(talks)
  tokens = lambda some: {talk.tokens.tobytes() for talk in some}
  backwards = retention.hold_out(copy.deepcopy(talks[:500:-1]), 0.1)
  assert tokens(backwards[1]) == tokens(held) & tokens(talks[501:])
  assert not tokens(backwards[0]) & tokens(held)
  assert retention.hold_out(talks, 0.0) == (talks, [])
