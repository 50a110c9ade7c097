"""Conversations: exact tokens and masks, wrong files.

The tokenizer is one of bytes whose ids are the byte values, so an expected
token list is the text itself.
"""

import collections
import gzip
import json
import logging

import numpy as np
import pytest

from behaviorlm_jax.data import chat, conversations
from behaviorlm_jax.errors import InputError

START, END, EOS = 256, 257, 258


def talk(*contents):
  """Messages of user and assistant in turn."""
  roles = ('user', 'assistant')
  return [
    {'role': roles[i % 2], 'content': content} for i, content in enumerate(contents)
  ]


def write(tmp_path, *items):
  path = tmp_path / 'talks.jsonl'
  path.write_text(''.join(json.dumps({'messages': item}) + '\n' for item in items))
  return path


@pytest.fixture
def read(tmp_path, make_tokenizer):
  def write_and_read(*talks, tokenizer=None, length=100):
    """Conversations of a file of these messages; by default as ChatML."""
    path = write(tmp_path, *talks)
    tokenizer = tokenizer or make_tokenizer()
    return conversations.read_conversations(path, tokenizer, length)

  return write_and_read


def said(conversation):
  """The answer tokens as one list, in order."""
  return conversation.tokens[conversation.answers].tolist()


def refused(path, tokenizer, *parts):
  with pytest.raises(InputError) as error:
    conversations.read_conversations(path, tokenizer, 100)
  message = str(error.value)
  assert '\n' not in message
  for part in (str(path), *parts):
    assert part in message


def test_exact_tokens_and_mask_of_two_turns(read):
  (found,) = read(talk('ab', 'cd', 'e', 'f'))
  pieces = [
    ([START, *b'user\n', *b'ab', END, *b'\n'], False),
    ([START, *b'assistant\n'], False),
    ([*b'cd', END], True),
    ([*b'\n'], False),
    ([START, *b'user\n', *b'e', END, *b'\n'], False),
    ([START, *b'assistant\n'], False),
    ([*b'f', END], True),
    ([*b'\n'], False),
  ]
  assert found.tokens.tolist() == [t for tokens, _ in pieces for t in tokens]
  assert found.answers.tolist() == [a for p, a in pieces for _ in p]
  assert (found.tokens.dtype, found.answers.dtype) == (np.int32, bool)


def test_plain_format_closes_answers_with_the_eos_token(read, make_tokenizer):
  tokenizer = make_tokenizer(None, eos_token='<eos>')
  (found,) = read(talk('ab', 'cd'), tokenizer=tokenizer)
  asked = [*b'User: ab\nAssistant:']
  assert found.tokens.tolist() == [*asked, *b' cd', EOS, *b'\n']
  assert found.answers.tolist() == [False] * len(asked) + [True] * 4 + [False]
  assert tokenizer.chat_template is None


def test_plain_format_without_eos_closes_answers_with_the_newline(read, make_tokenizer):
  (found,) = read(talk('ab', 'cd', 'e', 'f'), tokenizer=make_tokenizer(None))
  text = b'User: ab\nAssistant: cd\nUser: e\nAssistant: f\n'
  assert found.tokens.tolist() == [*text]
  assert said(found) == [*b' cd\n f\n']


def test_plain_template_set_on_a_tokenizer_reads_the_same(read, make_tokenizer):
  (a,), (b,) = (
    read(
      talk('ab', 'cd'),
      tokenizer=make_tokenizer(template, eos_token='<eos>', bos_token='<|im_start|>'),
    )
    for template in (None, chat.PLAIN_TEMPLATE)
  )
  assert a.tokens.tolist() == b.tokens.tolist()
  assert a.answers.tolist() == b.answers.tolist()
  assert a.tokens[0] == START


@pytest.mark.parametrize('trim_offsets', [False, True])
def test_mask_is_exact_for_blanks_and_characters_of_many_bytes(
  read, trim_offsets, make_tokenizer
):
  tokenizer = make_tokenizer(trim_offsets=trim_offsets)
  talks = talk('é 😀', '😀  né \n\n x', '東', '京')
  (found,) = read(talks, tokenizer=tokenizer, length=200)
  assert said(found) == [*'😀  né \n\n x'.encode(), END, *'京'.encode(), END]


def test_end_of_turn_is_not_looked_for_inside_the_content(read):
  (found,) = read(talk('a', 'end <|im_end|> im_end'))
  assert said(found) == [*b'end ', END, *b' im_end', END]


def test_end_text_and_blanks_around_contents_are_dropped(read):
  dirty = talk(' ab\n', 'cd <|endoftext|>\n<|endoftext|> ')
  a, b = read(dirty, talk('ab', 'cd'))
  assert a.tokens.tolist() == b.tokens.tolist()


def test_empty_answers_are_skipped_and_counted_in_one_warning(read, caplog):
  with caplog.at_level(logging.WARNING):
    (found,) = read(talk('a', '<|endoftext|>'), talk('b', 'c'), talk('d', ' '))
  assert said(found) == [*b'c', END]
  (record,) = caplog.records
  assert 'of 3 conversations 2 left out (2 with' in record.getMessage()


def test_long_ones_are_cut_and_skipped_when_no_answer_is_left(read, caplog):
  # 'assistant' starts at token 9 and its content at token 20.
  with caplog.at_level(logging.WARNING):
    (found,) = read(talk('a', 'bcdef'), talk('a' * 9, 'b'), length=22)
  assert len(found.tokens) == 22
  assert said(found) == [*b'bc']
  (record,) = caplog.records
  assert '1 left out (0 with an empty answer, 1 with' in record.getMessage()
  assert record.getMessage().endswith('and 1 cut at their end')


def test_nothing_left_is_refused(tmp_path, make_tokenizer):
  path = write(tmp_path, talk('a' * 200, 'b'))
  refused(path, make_tokenizer(), 'of 1 conversations 1 left out', '100')


def test_a_clean_file_warns_of_nothing(read, caplog):
  with caplog.at_level(logging.WARNING):
    read(talk('a', 'b'))
  assert not caplog.records


def test_what_follows_the_last_answer_is_dropped(read):
  a, b = read(talk('a', 'b', 'c'), talk('a', 'b'))
  assert a.tokens.tolist() == b.tokens.tolist()


def test_a_conversation_that_the_template_refuses_is_an_input_error(
  tmp_path, make_tokenizer, chatml
):
  strict = (
    '{% if messages|length > 2 %}'
    "{{ raise_exception('too long a talk') }}{% endif %}" + chatml
  )
  path = write(tmp_path, talk('a', 'b'), talk('a', 'b', 'c', 'd'))
  refused(path, make_tokenizer(strict), 'line 2', 'too long a talk')


def test_a_system_message_goes_to_the_user_where_the_template_has_none(
  read, make_tokenizer, chatml
):
  strict = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}" + chatml
  )
  system = {'role': 'system', 'content': 'be brief'}
  messages = [system, *talk('a', 'b')]
  (folded,) = read(messages, tokenizer=make_tokenizer(strict))
  user = [START, *b'user\nbe brief\n\na', END, *b'\n']
  assert folded.tokens.tolist()[: len(user)] == user
  assert said(folded) == [*b'b', END]
  (kept,) = read(messages)
  assert kept.tokens.tolist()[:16] == [START, *b'system\nbe brief']


def test_gzip_and_blank_lines_read_the_same(tmp_path, make_tokenizer):
  path = write(tmp_path, talk('a', 'b'))
  packed = tmp_path / 'talks.jsonl.gz'
  packed.write_bytes(gzip.compress(b'\n' + path.read_bytes() + b'\n'))
  (a,), (b,) = (
    conversations.read_conversations(p, make_tokenizer(), 100) for p in (path, packed)
  )
  assert a.tokens.tolist() == b.tokens.tolist()


@pytest.mark.parametrize(
  'line, part',
  [
    ('{"messages": [', 'not JSON'),
    ('{"text": "a"}', 'no list `messages`'),
    ('["a"]', 'no list `messages`'),
    ('{"messages": "a"}', 'no list `messages`'),
    ('{"messages": ["a"]}', "role 'a'"),
    ('{"messages": [{"role": "bot", "content": "a"}]}', "role 'bot'"),
    ('{"messages": [{"role": ["user"]}]}', "role ['user']"),
    (
      '{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}',
      'the content of the user is None',
    ),
    ('{"messages": []}', 'without an assistant turn'),
    ('{"messages": [{"role": "user", "content": "a"}]}', 'without an assis'),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', 'before any'),
  ],
)
def test_wrong_lines_are_named(tmp_path, line, part, make_tokenizer):
  path = write(tmp_path, talk('a', 'b'))
  path.write_text(path.read_text() + line + '\n')
  refused(path, make_tokenizer(), 'line 2', part)


def test_missing_empty_and_broken_files_are_named(tmp_path, make_tokenizer):
  refused(tmp_path / 'none.jsonl', make_tokenizer(), 'no such file')
  refused(tmp_path, make_tokenizer(), 'no such file')
  empty = tmp_path / 'empty.jsonl'
  empty.write_text('\n')
  refused(empty, make_tokenizer(), 'is empty')
  latin = tmp_path / 'latin.jsonl'
  latin.write_bytes(b'{"messages": "\xe9"}\n')
  refused(latin, make_tokenizer(), 'UTF-8')
  packed = gzip.compress(write(tmp_path, talk('a', 'b')).read_bytes())
  broken = tmp_path / 'broken.jsonl.gz'
  for content in (packed[:-12], b'no gzip'):
    broken.write_bytes(content)
    refused(broken, make_tokenizer(), 'cannot be read')


def test_the_default_set_is_large_varied_and_readable(caplog, make_tokenizer):
  lines = conversations.DEFAULT.read_text().splitlines()
  messages = [json.loads(line)['messages'] for line in lines]
  with caplog.at_level(logging.WARNING):
    read = conversations.read_conversations(
      conversations.DEFAULT, make_tokenizer(), 4096
    )
  assert len(read) == len(lines) >= 240
  assert not caplog.records
  answers = collections.Counter(m[-1]['content'] for m in messages)
  questions = collections.Counter(m[0]['content'] for m in messages)
  assert max(answers.values()) == 1
  assert len(questions) > 0.95 * len(messages)
  several = sum(sum(m['role'] == 'user' for m in talk) > 1 for talk in messages)
  assert 0.1 < several / len(messages) < 0.25
