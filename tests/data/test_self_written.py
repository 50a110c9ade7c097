"""Conversations that the model writes: the cache, its record, and masks."""

import json
import types

import numpy as np
import pytest
import tokenizers

from behaviorlm_jax.data import conversations
from behaviorlm_jax.data import self_written
from behaviorlm_jax.errors import InputError

START, END = 256, 257
SAID = [[*b'Hello', END], [*b'No end', 1], [END]]
OPENINGS = [
  [{'role': 'user', 'content': 'Hi'}],
  [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Why?'}],
  [{'role': 'user', 'content': 'So?'}],
]


@pytest.fixture
def questions(tmp_path, monkeypatch):
  """The set whose questions are answered; the cache of the test's own."""
  path = tmp_path / 'questions.jsonl'
  answered = [
    [
      *messages,
      {'role': 'assistant', 'content': 'Given.'},
      {'role': 'user', 'content': 'More?'},
      {'role': 'assistant', 'content': 'No.'},
    ]
    for messages in OPENINGS
  ]
  path.write_text(''.join(json.dumps({'messages': one}) + '\n' for one in answered))
  monkeypatch.setattr(conversations, 'DEFAULT', path)
  monkeypatch.setenv('BEHAVIORLM_CACHE', str(tmp_path / 'cache'))
  return path


class Model:
  """A base model and its draws, which are counted."""

  def __init__(self, tokenizer, fingerprint='f', max_length=500):
    self.base = types.SimpleNamespace(
      tokenizer=tokenizer,
      fingerprint=fingerprint,
      address='random://model',
      config=types.SimpleNamespace(max_length=max_length),
    )
    self.tasks = []

  def read(self, dtype='float32', seed=0, max_length=400):
    return self_written.read(self.base, dtype, seed, max_length, self.draw)

  def draw(self, task):
    self.tasks.append(task)
    return [np.array(tokens, np.int32) for tokens in SAID]


@pytest.fixture
def model(questions, make_tokenizer):
  tokenizer = make_tokenizer()
  tokenizer.backend_tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return Model(tokenizer)


@pytest.fixture
def folder(tmp_path):
  """The only folder of the cache."""

  def find():
    (found,) = (tmp_path / 'cache/self_written').iterdir()
    return found

  return find


def prompt_of(messages):
  tokens = []
  for m in messages:
    turn = f'{m["role"]}\n{m["content"]}'.encode()
    tokens += [START, *turn, END, *b'\n']
  return [*tokens, START, *b'assistant\n']


def test_prompts_are_the_questions_up_to_the_first_answer(model):
  model.read()
  (task,) = model.tasks
  assert [p.tolist() for p in task.prompts] == list(map(prompt_of, OPENINGS))
  assert all(p.dtype == np.int32 for p in task.prompts)
  assert task.openings == OPENINGS and task.ends == (END,)


def test_what_was_drawn_is_taught_token_by_token(model):
  for talk, opening, said in zip(model.read(), OPENINGS, SAID, strict=True):
    assert talk.tokens.tolist() == prompt_of(opening) + said
    assert talk.tokens[talk.answers].tolist() == said
    assert talk.tokens.dtype == np.int32 and talk.answers.dtype == bool


def test_a_second_call_reads_what_the_first_wrote(model):
  first, second = model.read(), model.read()
  assert len(model.tasks) == 1
  for one, other in zip(first, second, strict=True):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.answers, other.answers)


def test_whatever_decides_the_draws_draws_again(model, questions, make_tokenizer):
  model.read()
  model.read(seed=1)
  model.read(dtype='bfloat16')
  assert len(model.tasks) == 3
  other = Model(make_tokenizer(), fingerprint='g')
  other.read()
  assert len(other.tasks) == 1
  questions.write_text(questions.read_text().replace('Why?', 'Where?'))
  model.read()
  assert len(model.tasks) == 4


def test_the_record_says_what_drew_the_answers(model, folder):
  model.read(seed=3)
  record = json.loads((folder() / 'record.json').read_text())
  assert len(record.pop('prompts_sha256')) == 64
  assert record.pop('written').endswith('+00:00')
  assert record == {
    'model': 'random://model',
    'fingerprint': 'f',
    'dtype': 'float32',
    'seed': 3,
    'temperature': 1.0,
    'tokens': self_written.TOKENS,
    'ends': [END],
    'conversations': 3,
    'answer_tokens': 14,
    'cut_at_their_end': 1,
  }


def test_the_file_is_one_of_messages_too(model, folder):
  model.read()
  lines = (folder() / 'conversations.jsonl').read_text().splitlines()
  texts = [json.loads(line)['messages'][-1] for line in lines]
  assert texts == [
    {'role': 'assistant', 'content': content} for content in ('Hello', 'No end\x01', '')
  ]


def test_nothing_is_left_when_drawing_stops(model, tmp_path):
  def stop(task):
    raise KeyboardInterrupt

  model.draw = stop
  with pytest.raises(KeyboardInterrupt):
    model.read()
  assert not list((tmp_path / 'cache').rglob('*.jsonl'))


def refused(model, match, **options):
  with pytest.raises(InputError, match=match) as caught:
    model.read(**options)
  assert '\n' not in str(caught.value)


def test_long_conversations_are_cut_and_those_without_answer_left_out(model, caplog):
  length = len(prompt_of(OPENINGS[0])) + 2
  found = model.read(max_length=length)
  assert [talk.answers.sum() for talk in found] == [2, 1]
  assert all(len(talk.tokens) <= length for talk in found)
  assert '1 of 3 conversations left out' in caplog.text
  refused(model, r'^train\.length is 16 tokens, which holds no answer', max_length=16)


def test_a_model_of_few_positions_is_refused(questions, make_tokenizer):
  model = Model(make_tokenizer(), max_length=150)
  refused(
    model,
    r"^data\.conversations is 'self', but questions and answers "
    r'need \d+ tokens and model\.address takes 150; ',
  )
  assert not model.tasks


@pytest.mark.parametrize('damage', ['{"prompt": [1]}', '{', '[]', 'null'])
def test_a_damaged_file_is_refused(model, folder, damage):
  model.read()
  path = folder() / 'conversations.jsonl'
  lines = path.read_text().splitlines()
  path.write_text('\n'.join([lines[0], damage, lines[2]]) + '\n')
  refused(model, r'conversations\.jsonl line 2 is not what this program wrote')
