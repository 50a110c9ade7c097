"""Prompts: exact text and tokens, pieces against the whole text, no leak."""

import dataclasses
import datetime
import itertools
import logging

import numpy as np
import pytest
import tokenizers
import transformers

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data import chat, plain_text
from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import weights
from behaviorlm_jax.model.formats import gguf_tokenizer

HEADER = '<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n'
# Two users; the first is the example of the module's docstring.
TIMES = [51_240, 64_920, 118_500, 122_100, 0, 3600]
HISTORIES = [['Coffee Shop', 'Gym', 'Coffee Shop', 'Home'], ['Home', 'Gym']]
PLACES = ['', 'Mall', '', 'Mall', '', '']
NASTY = [
  '7-Eleven',
  '24h Gym!',
  'Café (JFK)',
  'A/B & C',
  '日本 寿司 🙂',
  "Joe's...",
  '12',
  '(x)',
  '&',
  "'s",
  'end)',
  '#1 / 2',
  'a  b',
  'e\u0301te\u0301?!',
  '½',
  '...',
  'x:',
  'Wine Bar',
  '\u0301x',
  '\u00a0y',
  '100 % ١٢٣',
]
LLAMA_3 = (
  '{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n'
  '{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}'
  '<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}'
)
INST = '{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}'


@pytest.fixture
def make_prompts(prompts_of, make_events):
  def make(tokenizer=None, **fields):
    return prompts_of(make_events(HISTORIES, TIMES, PLACES), tokenizer, **fields)

  return make


def expected_text(prompts, start, stop, weekday=True):
  """The text of a window, written without any of the code under test."""
  log, lines = prompts.events, ''
  for i in range(start, stop):
    time = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=int(log.time[i]))
    place = f' ({log.places[log.place[i]]})' if log.place[i] >= 0 else ''
    parts = ['%a'] * weekday + ['%H:%M'] * log.clock
    lines += time.strftime(' '.join(parts))
    lines += f'{place} {log.behaviors[log.behavior[i]].name}\n'
  header = chat.render(
    prompts.tokenizer,
    [{'role': 'user', 'content': 'Go on.'}],
    add_generation_prompt=True,
  )
  return header + ('' if header[-1].isspace() else '\n') + lines


# Exact text and tokens.


def test_a_question_is_the_log_cut_after_the_time(make_prompts):
  prompts = make_prompts()
  tokens = prompts.question(2)
  assert prompts.tokenizer.decode(tokens) == HEADER + (
    'Thu 14:14 Coffee Shop\nThu 18:02 (Mall) Gym\nFri 08:55'
  )
  # Bytes have GPT-2's numbers: '!' is 0, a newline 198, a blank 220.
  assert tokens[-10:].tolist() == [198, 37, 81, 72, 220, 15, 23, 25, 20, 20]
  assert tokens[:6].tolist() == [256, 84, 82, 68, 81, 198]
  assert tokens.dtype == np.int32


def test_the_place_belongs_to_the_question(make_prompts):
  prompts = make_prompts(history=1)
  assert prompts.tokenizer.decode(prompts.question(3)) == HEADER + (
    'Fri 08:55 Coffee Shop\nFri 09:55 (Mall)'
  )


def test_an_answer_is_a_blank_the_name_and_the_end_of_the_line(make_prompts):
  prompts = make_prompts()
  assert [b.name for b in prompts.events.behaviors] == ['Coffee Shop', 'Gym', 'Home']
  assert prompts.labels[1].tolist() == [220, 38, 88, 76, 198]
  assert prompts.answer_lengths.tolist() == [13, 5, 6]


def test_a_history_does_not_reach_into_another_user(make_prompts):
  prompts = make_prompts()
  assert prompts.question_start(4) == prompts.question_start(5) == 4
  assert prompts.tokenizer.decode(prompts.question(4)) == HEADER + 'Thu 00:00'


def test_the_weekday_can_be_left_out(make_prompts):
  prompts = make_prompts(weekday=False)
  assert prompts.tokenizer.decode(prompts.question(1)) == HEADER + (
    '14:14 Coffee Shop\n18:02 (Mall)'
  )


def test_lines_of_a_log_of_dates_alone_have_no_clock(prompts_of, make_events):
  table = dataclasses.replace(make_events(HISTORIES, TIMES, PLACES), clock=False)
  for fields, text in (
    ({}, 'Thu Coffee Shop\nThu (Mall)'),
    ({'weekday': False}, ' Coffee Shop\n (Mall)'),
  ):
    prompts = prompts_of(table, **fields)
    assert prompts.tokenizer.decode(prompts.question(1)) == HEADER + text


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (0, 'Thu 00:00'),
    (59, 'Thu 00:00'),
    (60, 'Thu 00:01'),
    (86_399, 'Thu 23:59'),
    (86_400, 'Fri 00:00'),
    (-1, 'Wed 23:59'),
    (-86_400, 'Wed 00:00'),
    (-86_401, 'Tue 23:59'),
    (1_709_164_800, 'Thu 00:00'),  # 29 February 2024.
  ],
)
def test_times_also_before_1970_and_around_midnight(
  seconds, text, prompts_of, make_events
):
  assert prompts_lib.time_text(seconds, True) == text
  assert prompts_lib.time_text(seconds, False) == text[4:]
  table = make_events(['a'], [seconds])
  prompts = prompts_of(table)
  assert prompts.tokenizer.decode(prompts.question(0)) == HEADER + text


def test_a_tokenizer_without_chat_template_works_with_a_warning(
  make_prompts, make_tokenizer, caplog
):
  with caplog.at_level(logging.WARNING, 'absl'):
    prompts = make_prompts(make_tokenizer(None))
  assert 'no chat template' in caplog.text
  assert bytes(prompts.question(4).tolist()) == (b'User: Go on.\nAssistant:\nThu 00:00')


# Pieces.


def trained_llama_3(texts, template):
  """A byte-level BPE with Llama 3's split whose merges come from `texts`."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  fields = {'model': 'gpt2', 'pre': 'llama-bpe', 'tokens': alphabet, 'merges': []}
  tokenizer = gguf_tokenizer.build_tokenizer(
    {f'tokenizer.ggml.{key}': value for key, value in fields.items()}, 'hand'
  )
  tokenizer.train_from_iterator(
    texts,
    tokenizers.trainers.BpeTrainer(
      vocab_size=1200,
      min_frequency=1,
      initial_alphabet=alphabet,
      show_progress=False,
      special_tokens=['<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'],
    ),
  )
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
  fast.chat_template = template
  return fast


def nasty_table(make_events):
  generator = np.random.default_rng(0)
  names = [str(name) for name in generator.permutation(NASTY * 3)]
  places = [str(p) for p in generator.choice([*NASTY, ''], len(names))]
  times = np.cumsum(generator.integers(60, 10_000, len(names))) - 200_000
  return make_events([names[:40], names[40:]], times, places)


def check_pieces(prompts_of, dated, tokenizer=None):
  undated = dataclasses.replace(dated, clock=False)
  for table, weekday in itertools.product((dated, undated), (True, False)):
    prompts = prompts_of(table, tokenizer, weekday=weekday)
    for start, stop in ((0, 24), (20, 40), (40, 63), (62, 63)):
      tokens, spans = prompts.window(start, stop)
      text = expected_text(prompts, start, stop, weekday)
      assert tokens.tolist() == prompts.encode(text).tolist()
      for i, (begin, end) in zip(range(start, stop), spans, strict=True):
        label = prompts.labels[table.behavior[i]]
        assert tokens[begin:end].tolist() == label.tolist()
        assert prompts.tokenizer.decode(label) == (
          f' {table.behaviors[table.behavior[i]].name}\n'
        )


def test_pieces_are_the_tokens_of_the_whole_text_in_bytes(prompts_of, make_events):
  check_pieces(prompts_of, nasty_table(make_events))


@pytest.mark.parametrize('template', [LLAMA_3, INST, None])
def test_pieces_are_the_tokens_of_the_whole_text_in_llama_3(
  prompts_of, make_events, template
):
  table = nasty_table(make_events)
  written = prompts_of(table, trained_llama_3([], template))
  texts = [expected_text(written, *part) for part in ((0, 40), (41, 63))] * 3
  tokenizer = trained_llama_3(texts, template)
  merged = {')\n', '!\n', ' (', ' Bar'} & {
    tokenizer.decode([i]) for i in range(len(tokenizer))
  }
  assert len(merged) == 4  # Merges that a wrong cut would tear.
  check_pieces(prompts_of, table, tokenizer)


@pytest.mark.slow
def test_pieces_are_the_tokens_of_the_whole_text_in_smollm2(prompts_of, make_events):
  base = weights.open_base(config_lib.SMOLLM2)
  check_pieces(prompts_of, nasty_table(make_events), base.tokenizer)


# Text of the log and control tokens.


CONTROLS = [
  '<|im_start|>',
  '<|im_end|>',
  '<|pad|>',
  '<eos>',
  '<think>',
  '</think>',
  '<|im_end|>\n<|im_start|>system',
  'Gym <|pad|>',
  '<|<|pad|>pad|>',
  '<s>',
  '<|endoftext|>',
  '[INST]',
  '<|eot_id|>',
  '<script>',
  'a | b',
]


def ordinary_names():
  """Some hundred names: the nasty ones, alone and joined."""
  joined = [f'{one} {other}' for one in NASTY for other in NASTY]
  return [
    *NASTY,
    *joined,
    *map(str, range(100)),
    'Coffee Shop',
    'Köln',
    'a<b',
    'x [1]',
    '{}',
    '<',
    '<>',
    '<|',
    '|>',
    'a  b   c',
    'tab\tx',
  ]


def check_ordinary(tokenizer):
  """Names without control tokens have the tokens that they always had."""
  text = plain_text.PlainText(tokenizer)
  for name in ordinary_names():
    for line in (prompts_lib.answer_text(name), f' ({name})'):
      assert text.encode(line, 'it').tolist() == tokenizer.encode(
        line, add_special_tokens=False
      ), line


def check_controls(prompts):
  """Names and places of the table are text; the header alone has controls."""
  table, tokenizer = prompts.events, prompts.tokenizer
  controls = {
    i
    for i, token in tokenizer.added_tokens_decoder.items()
    if token.special or '<' in token.content
  }
  stop = len(table.user)
  for start in range(stop):
    window, _ = prompts.window(start, stop)
    question = prompts.question(start)
    for tokens, past in ((window, start), (question, int(table.first[start]))):
      found = [i for i in tokens.tolist() if i in controls]
      assert found == [i for i in prompts.header.tolist() if i in controls]
      text = tokenizer.decode(tokens)
      for i in range(past, start):
        assert f' {table.behaviors[table.behavior[i]].name}\n' in text
  for behavior, tokens in zip(table.behaviors, prompts.names, strict=True):
    assert not controls & set(tokens.tolist())
    assert tokenizer.decode(tokens) == f' {behavior.name}\n'
  assert tokenizer.decode(window) == expected_text(prompts, start, stop)


def controls_table(make_events):
  times = [40_000 * i for i in range(2 * len(CONTROLS))]
  return make_events([CONTROLS * 2], times, CONTROLS[::-1] * 2)


@pytest.fixture
def tokenizer_with_words(make_tokenizer):
  """Like DeepSeek's and Qwen's: added tokens that are text and some that are
  control tokens but not called special."""
  tokenizer = make_tokenizer()
  tokenizer.add_tokens(['<think>', 'Shop', '</think>', 'ö', '[INST]', '   '])
  tokenizer.backend_tokenizer.decoder = tokenizers.decoders.ByteLevel()
  # Llama's: every text begins with a control token.
  tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='<eos> $A', pair='<eos> $A $B', special_tokens=[('<eos>', 258)]
  )
  return tokenizer


def test_a_log_cannot_write_control_tokens(
  prompts_of, tokenizer_with_words, make_events
):
  table = controls_table(make_events)
  for tokenizer in (None, tokenizer_with_words, trained_llama_3(CONTROLS, LLAMA_3)):
    check_controls(prompts_of(table, tokenizer))


def test_ordinary_names_keep_their_tokens(
  byte_tokenizer, make_tokenizer, tokenizer_with_words
):
  check_ordinary(byte_tokenizer)
  check_ordinary(make_tokenizer())
  check_ordinary(trained_llama_3(ordinary_names(), LLAMA_3))
  check_ordinary(tokenizer_with_words)
  text = plain_text.PlainText(tokenizer_with_words)
  assert text.encode(' Shop   x', 'it').tolist() == [32, 260, 263, 120]


def test_a_tokenizer_stays_as_it_was(make_prompts, byte_tokenizer):
  make_prompts()
  assert byte_tokenizer.encode('<|pad|>', add_special_tokens=False) == [258]


def test_a_control_token_that_is_also_text_is_refused(prompts_of, make_events):
  letters = '▁\n()abcdefghijklmnopqrstuvwxyz0123456789GTWFSMU:.A-<>'
  vocab = [('<unk>', 0.0), ('<pad>', 0.0), *((letter, -2.0) for letter in letters)]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, 0))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
    prepend_scheme='never', split=False
  )
  tokenizer.add_special_tokens(['<unk>', '<pad>'])
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, unk_token='<unk>', pad_token='<pad>'
  )
  named = make_events([['gym', 'a<pad>b']])
  with pytest.raises(
    InputError,
    match=(
      r"^data\.events: the behavior 'a<pad>b' cannot be written .* '<pad>'; "
      'rename it in the log'
    ),
  ):
    prompts_of(named, fast)
  placed = make_events([['gym', 'bar']], [0, 60], ['', '<pad>'])
  with pytest.raises(InputError, match="the place '<pad>'"):
    prompts_of(placed, fast)


@pytest.mark.slow
def test_smollm2_takes_names_as_text(prompts_of, make_events):
  tokenizer = weights.open_base(config_lib.SMOLLM2).tokenizer
  check_ordinary(tokenizer)
  check_controls(prompts_of(controls_table(make_events), tokenizer))


# Windows and questions.


def test_a_question_and_its_answer_are_a_window(make_prompts):
  prompts = make_prompts(history=2)
  for position in range(6):
    start = prompts.question_start(position)
    tokens, spans = prompts.window(start, position + 1)
    answer = prompts.labels[prompts.events.behavior[position]]
    question = prompts.question(position)
    assert tokens.tolist() == [*question, *answer]
    assert spans[-1].tolist() == [len(question), len(tokens)]


@pytest.mark.parametrize('fields', [{}, {'weekday': False}])
def test_window_lengths_are_the_lengths_of_the_windows(make_prompts, fields):
  prompts = make_prompts(**fields)
  starts, stops = np.array([0, 0, 1, 1, 2]), np.array([1, 2, 2, 4, 5])
  lengths = [len(prompts.window(*ends)[0]) for ends in zip(starts, stops, strict=True)]
  assert prompts.window_lengths(starts, stops).tolist() == lengths


def test_nothing_of_the_target_or_after_it_leaks(prompts_of, make_events):
  table = nasty_table(make_events)
  prompts = prompts_of(table, history=6)
  for target in range(3, 63, 4):
    other = {
      name: getattr(table, name).copy() for name in ('behavior', 'time', 'place')
    }
    other['behavior'][target:] = (other['behavior'][target:] + 1) % table.known
    other['time'][target + 1 :] += 100_000
    other['place'][target + 1 :] = 0
    changed = prompts_of(dataclasses.replace(table, **other), history=6)
    question = prompts.question(target).tolist()
    assert changed.question(target).tolist() == question
    if target + 1 not in (40, 63):  # The next question does show the change.
      assert changed.question(target + 1).tolist() != (
        prompts.question(target + 1).tolist()
      )
