"""Retention equals a plain computation in torch, and knows its input."""

import copy
import gzip
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data import conversations
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.evaluate import retention
from behaviorlm_jax.model import lora
from behaviorlm_jax.model import weights
from behaviorlm_jax.train import sharding
from behaviorlm_jax.train import step

LENGTHS = (40, 9, 64, 17, 30)  # two widths, not sorted, no multiple of a batch
RIGHT = {'question': 'Go on.', 'choices': ['abcdefgh', 'az'], 'answer': 0}


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


def make_questions(sizes=(2, 4, 3)):
  return [
    retention.Question(make_talks(range(8, 8 + n), n), [5] * n, n - 1) for n in sizes
  ]


def make_adapter(base):
  adapter = lora.init(base.config, 2, ('q_proj', 'down_proj'), jax.random.key(0))
  rng = np.random.default_rng(0)
  for sides in adapter.values():
    b = rng.standard_normal(sides['b'].shape) * 0.02
    sides['b'] = b.astype(np.float32)
  return adapter


def make_retention(base, talks=None, questions=None, batch=2):
  config = config_lib.default()
  layout = sharding.make_layout(config)
  params = weights.read_params(base, np.float32, layout.place)
  attach = step.attacher(base.config, config, layout, 'float32')
  return retention.Retention(attach, params, layout, talks, questions, batch)


class Alphabet:
  """Stands in for a decoder: after byte i comes i + 1, with logit 5, not 0."""

  def packed_hidden(self, tokens, positions, segments):
    return jax.nn.one_hot(tokens + 1, 300), None

  def logits(self, hidden):
    return 5 * hidden


def make_alphabet(talks=None, questions=None):
  layout = sharding.make_layout(config_lib.default())
  attach = lambda params, adapter: Alphabet()
  return retention.Retention(attach, jnp.zeros(()), layout, talks, questions)


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
  """A Retention of both sources, and what it says of the adapter."""
  found = make_retention(llama[1], make_talks(), make_questions())
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


def test_choices_equal_a_computation_in_torch(llama, tuned):
  questions = make_questions()
  numbers = make_retention(llama[1], None, questions)._run(
    make_adapter(llama[1]), lambda n: None
  )
  expected = [
    float(log_probs(tuned, choice)[1].sum())
    for one in questions
    for choice in one.choices
  ]
  np.testing.assert_allclose(numbers.choices, expected, rtol=0, atol=1e-3)


def test_the_base_model_is_at_no_distance_from_itself(measured):
  found = measured[0].measure(None)
  assert found['conversations']['kl_to_base'] == 0
  assert found['conversations']['kl_to_base_interval'] == [0, 0]
  assert found['conversations']['perplexity_ratio'] == 1
  assert found['conversations']['perplexity_ratio_interval'] == [1, 1]
  assert found['questions']['accuracy_change'] == 0
  assert found['questions']['accuracy_per_byte_change_interval'] == [0, 0]


def test_a_fresh_adapter_is_at_no_distance_from_the_base(llama, measured):
  adapter = lora.init(llama[1].config, 2, ('q_proj',), jax.random.key(0))
  found = measured[0].measure(adapter)['conversations']
  assert found['kl_to_base'] == pytest.approx(0, abs=1e-5)
  assert found['perplexity_ratio'] == pytest.approx(1, abs=1e-5)


def test_batches_and_padding_do_not_change_results(llama, measured):
  again = make_retention(llama[1], make_talks(), make_questions(), batch=7)
  found = again.measure(make_adapter(llama[1]))
  for part, numbers in measured[1].items():
    for name, value in numbers.items():
      assert found[part][name] == pytest.approx(value, rel=1e-4), name


def test_one_program_per_width_and_one_for_all_answers(measured):
  found, _ = measured
  assert found._log_probs._cache_size() == found._divergence._cache_size() == 1
  found.measure(None)
  widths = {-(-length // 32) for length in LENGTHS}
  assert found._hidden._cache_size() <= 3 * len(widths)  # base and adapters


def test_numbers_are_plain_and_finite(measured):
  json.dumps(measured[1], allow_nan=False)


def test_progress_counts_the_base_once():
  found = make_alphabet(make_talks(), make_questions())
  for adapter, rows in (({}, 28), ({}, 14), (None, 0)):
    counts = []
    assert found.rows(adapter) == rows
    found.measure(adapter, counts.append)
    assert sum(counts) == rows


def test_what_is_absent_is_left_out():
  assert make_alphabet().measure(None) == {}
  assert list(make_alphabet(make_talks()).measure(None)) == ['conversations']
  assert list(make_alphabet([], make_questions()).measure(None)) == ['questions']


@pytest.mark.parametrize(
  'record, accuracy, per_byte',
  [
    pytest.param({'choices': ['abcd', 'dcba', 'acbd']}, 1, 1, id='certain'),
    pytest.param({'choices': ['dcba', 'abcd']}, 0, 0, id='certain and wrong'),
    # Seven steps that the model knows cost more than one it does not.
    pytest.param({}, 0, 1, id='long and certain'),
  ],
)
def test_the_likeliest_text_is_the_models_answer(tmp_path, record, accuracy, per_byte):
  questions = read(write(tmp_path, RIGHT | record))
  found = make_alphabet(None, questions).measure(None)['questions']
  assert found['accuracy'] == accuracy
  assert found['accuracy_per_byte'] == per_byte


def test_chance_is_that_of_each_question():
  found = make_alphabet(None, make_questions((2, 4))).measure(None)
  assert found['questions']['chance'] == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_intervals_contain_the_value_and_shrink_with_more_items(tmp_path):
  other = RIGHT | {'answer': 1}
  questions = read(write(tmp_path, RIGHT, other, other))
  talks = [one.choices[0] for one in questions] + make_talks()
  few, many = (make_alphabet(talks * n, questions * n).measure(None) for n in (1, 16))
  for part, name in (('conversations', 'perplexity'), ('questions', 'accuracy')):
    spans = []
    for found in (few, many):
      low, high = found[part][f'{name}_interval']
      assert low < found[part][name] < high
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


def write(folder, *records, name='questions.jsonl'):
  path = folder / name
  lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
  opener = gzip.open if name.endswith('gz') else open
  with opener(path, 'wt') as file:
    file.write(''.join(line + '\n' for line in lines))
  return path


def read(path, max_length=200):
  tokenizer = weights.open_base('random://tiny').tokenizer
  return retention.read_questions(path, tokenizer, max_length)


@pytest.mark.parametrize('name', ['q.jsonl', 'q.jsonl.gz'])
def test_a_choice_is_what_the_assistant_says(tmp_path, name):
  tokenizer = weights.open_base('random://tiny').tokenizer
  record = {'question': ' 1 + 1? ', 'choices': ['two', ' é '], 'answer': 1}
  (found,) = read(write(tmp_path, record, name=name))
  assert (found.sizes, found.answer) == ([3, 2], 1)
  for row, choice in zip(found.choices, ('two', 'é'), strict=True):
    said = tokenizer.decode(row.tokens[row.answers])
    assert said == f'{choice}<|im_end|>'
    asked = tokenizer.decode(row.tokens[: row.answers.argmax()])
    assert asked == ('<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n')


def test_questions_that_cannot_be_asked_are_left_out_and_counted(tmp_path, caplog):
  equal = RIGHT | {'choices': ['12', '12 ', '4']}
  path = write(tmp_path, equal, RIGHT | {'question': 'a' * 300}, RIGHT)
  with caplog.at_level(logging.WARNING, 'absl'):
    assert len(read(path)) == 1
  assert (
    'of 3 questions 2 left out (1 with equal choices, 1 longer than 200 tokens)'
  ) in caplog.text


@pytest.mark.parametrize(
  'record, said',
  [
    ('{"question": ', 'line 2: not JSON'),
    ('[1, 2]', 'line 2: `question` is None; give its text'),
    (RIGHT | {'question': ' '}, "line 2: `question` is ' '; give its text"),
    ({'question': 'a'}, 'line 2: `choices` is None; give a list of texts'),
    (
      RIGHT | {'choices': ['a', '']},
      "line 2: `choices` is ['a', '']; give a list of texts",
    ),
    (RIGHT | {'choices': ['a']}, 'line 2: there are 1 choices; give two'),
    (
      RIGHT | {'answer': 2},
      'line 2: `answer` is 2 and there are 2 choices; '
      'give the index of the right one, 0 to 1',
    ),
    (RIGHT | {'answer': -1}, 'line 2: `answer` is -1'),
    (RIGHT | {'answer': 'A'}, "line 2: `answer` is 'A'"),
    (RIGHT | {'answer': True}, 'line 2: `answer` is True'),
  ],
)
def test_a_wrong_question_is_refused_with_its_line(tmp_path, record, said):
  refused(write(tmp_path, RIGHT, record), said)


def refused(path, said):
  with pytest.raises(InputError) as error:
    read(path)
  assert str(error.value).startswith(str(path))
  assert said in str(error.value)
  assert '\n' not in str(error.value)


def test_a_file_without_a_question_is_refused(tmp_path):
  refused(tmp_path / 'no.jsonl', 'no such file')
  refused(write(tmp_path, ' '), 'is empty; give one question a line')
  equal = RIGHT | {'choices': ['a', 'a']}
  refused(write(tmp_path, equal), 'none is left: give other questions')
