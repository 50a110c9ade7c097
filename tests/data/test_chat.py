"""Chat templates: their text, where answers lie in it, and odd ones."""

import pytest

from behaviorlm_jax.data import chat
from behaviorlm_jax.errors import InputError

ASKED = [{'role': 'user', 'content': 'a'}]
ANSWERED = [*ASKED, {'role': 'assistant', 'content': 'b'}]
TWICE = [
  *ANSWERED,
  {'role': 'user', 'content': 'c'},
  {'role': 'assistant', 'content': 'd'},
]


def answers(tokenizer, messages):
  text, spans = chat.Renderer(tokenizer).render(messages, 'talks line 1')
  return [text[start:stop] for start, stop in spans]


def test_text_ends_where_the_assistant_begins_only_when_asked(make_tokenizer):
  tokenizer = make_tokenizer()
  turn = '<|im_start|>user\na<|im_end|>\n'
  assert chat.render(tokenizer, ASKED) == turn
  assert chat.render(tokenizer, ASKED, add_generation_prompt=True) == (
    turn + '<|im_start|>assistant\n'
  )


def test_a_tokenizer_without_template_writes_the_plain_format(make_tokenizer):
  tokenizer = make_tokenizer(None, bos_token='<s>', eos_token='<eos>')
  assert chat.render(tokenizer, ANSWERED) == ('<s>User: a\nAssistant: b<eos>\n')
  assert chat.render(tokenizer, ASKED, add_generation_prompt=True) == (
    '<s>User: a\nAssistant:'
  )
  assert tokenizer.chat_template is None


def test_templates_see_the_same_day_every_day(make_tokenizer, chatml):
  dated = make_tokenizer("{{ strftime_now('%d %b %Y') }}" + chatml)
  assert chat.render(dated, ASKED).startswith('26 Jul 2024<|im_start|>user')
  text, _ = chat.Renderer(dated).render(ANSWERED, 'talks line 1')
  assert text == chat.render(dated, ANSWERED)


def test_messages_that_a_template_refuses_are_an_input_error(make_tokenizer):
  strict = make_tokenizer("{{ raise_exception('never') }}")
  with pytest.raises(InputError, match=r'refuses messages of user .never.'):
    chat.render(strict, ASKED)


def test_every_answer_ends_with_its_end_of_turn(make_tokenizer):
  assert answers(make_tokenizer(), TWICE) == ['b<|im_end|>', 'd<|im_end|>']


def test_a_template_that_rewrites_history_teaches_the_last_answer(
  make_tokenizer, chatml
):
  thinking = chatml.replace(
    " + m['content']",
    " + ('<think></think>' if loop.last and m['role'] == 'assistant' else '')"
    " + m['content']",
  )
  assert answers(make_tokenizer(thinking), TWICE) == ['<think></think>d<|im_end|>']


def test_a_final_end_of_text_does_not_hide_earlier_answers(make_tokenizer, chatml):
  phi = chatml + '{% if not add_generation_prompt %}<eos>{% endif %}'
  assert answers(make_tokenizer(phi), TWICE) == ['b<|im_end|>', 'd<|im_end|>']
  assert chat.render(make_tokenizer(phi), TWICE).endswith('<eos>')


def test_a_template_whose_prompt_is_no_prefix_is_refused(make_tokenizer, chatml):
  moved = chatml.replace("'<|im_start|>assistant\\n' }}", "'Say: ' }}")
  assert moved != chatml
  with pytest.raises(InputError, match=r'^talks line 1: the chat template'):
    answers(make_tokenizer(moved), ANSWERED)


def test_a_template_without_an_end_of_turn_is_refused(make_tokenizer):
  tokenizer = make_tokenizer("{{ messages[-1]['content'] }}")
  with pytest.raises(InputError, match=r'template .* no end of turn'):
    chat.Renderer(tokenizer)


def test_a_template_that_hides_the_answer_is_refused(make_tokenizer):
  tokenizer = make_tokenizer("{{ messages[0]['content'] }}")
  with pytest.raises(InputError, match=r'template .* has no answer'):
    chat.Renderer(tokenizer)
