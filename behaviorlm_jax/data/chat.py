"""Messages as text by a tokenizer's chat template, and where the answers lie.

Invariants:
  * Everything goes through the tokenizer's template; `PLAIN_TEMPLATE` is that
    of a tokenizer that has none.
  * The same messages give the same text on any day: templates that write
    today's date are shown a fixed one.
  * An answer is what follows the generation prompt up to and including the
    end-of-turn token. Both ends are found by rendering, so any template will
    do: what a template writes after the end of a turn (the newline after
    `<|im_end|>`) is context, like the user's messages.
  * The last answer always counts. An earlier one counts only where the
    template renders it inside the whole as it renders it at the end; templates
    that rewrite history (they drop its reasoning, say) leave it as context.
"""

from typing import TYPE_CHECKING

import jinja2

from behaviorlm_jax.errors import InputError

if TYPE_CHECKING:  # It takes seconds to import, and a dry run needs none of it.
  from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, str]]  # Of role and content.

# No blank after 'Assistant:' in the generation prompt: the blank belongs to the
# first word of the answer, as it does inside byte-pair tokens.
PLAIN_TEMPLATE = (
  '{% if bos_token %}{{ bos_token }}{% endif %}'
  '{% for message in messages %}'
  "{{ message['role'] | capitalize }}: {{ message['content'] }}"
  "{% if message['role'] == 'assistant' and eos_token %}{{ eos_token }}"
  "{% endif %}{{ '\\n' }}"
  '{% endfor %}'
  '{% if add_generation_prompt %}Assistant:{% endif %}'
)

_PROBE = '\ue000'  # a private-use character that no template writes
# Hides the clock of transformers. The day is the one in Llama 3.1's template.
_FIXED_DAY = '{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}'


def render(
  tokenizer: 'PreTrainedTokenizerFast',
  messages: Messages,
  where: str = 'model.address',
  add_generation_prompt: bool = False,
) -> str:
  """The text of messages; `where` they stand is for errors.

  With `add_generation_prompt` it ends where the assistant would begin.
  """
  try:
    return _apply(tokenizer, messages, add_generation_prompt)
  except jinja2.TemplateError as error:
    roles = ', '.join(message['role'] for message in messages)
    raise InputError(
      f'{where}: the {_name(tokenizer)} refuses messages of {roles} ({error}); '
      'change them or give the tokenizer another template'
    ) from error


def _apply(tokenizer, messages, add_generation_prompt=False):
  """Like `render`; raises jinja2.TemplateError where the template refuses."""
  template = (
    tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE
  )
  if 'strftime_now' in template:
    template = _FIXED_DAY + template
  return tokenizer.apply_chat_template(
    messages,
    chat_template=template,
    tokenize=False,
    add_generation_prompt=add_generation_prompt,
  )


def _name(tokenizer):
  return f'chat template of the tokenizer {tokenizer.name_or_path!r}'


class Renderer:
  """Text of conversations by the tokenizer's template, and where they answer.

  `_closing` is what the template writes after an assistant's content at the end
  of a conversation, `_end` how many of its characters belong to the answer.
  """

  def __init__(self, tokenizer: 'PreTrainedTokenizerFast'):
    self._tokenizer = tokenizer
    # What stands behind the probe is what this template closes an answer with.
    probe = [_say('user', 'Hello'), _say('assistant', _PROBE)]
    whole = render(tokenizer, probe, 'a question and an answer')
    _, found, self._closing = whole.rpartition(_PROBE)
    self._end = _end_of_turn(self._closing, tokenizer)
    if not found or not self._end:
      raise InputError(
        f'the {_name(tokenizer)} writes {whole!r} for a question and an answer, '
        f'which has no {"end of turn" if found else "answer"}; give the '
        'tokenizer a template that closes answers with its end token'
      )

  def render(self, messages: Messages, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The text and the [start, stop) of every answer in it, in characters."""
    turns = [i for i, m in enumerate(messages) if m['role'] == 'assistant']
    messages = messages[: turns[-1] + 1]  # nothing to learn after it
    if messages[0]['role'] == 'system' and not self._takes(messages):
      messages = _fold_system(messages)
      turns = [i - 1 for i in turns]  # One message less stands before them.
    text = render(self._tokenizer, messages, where)
    spans = [self._span(text, messages, i, where) for i in turns]
    # Earlier ones may be None: templates rewrite history. The last one may not.
    if spans[-1] is None:
      raise InputError(
        f'{where}: the {_name(self._tokenizer)} does not write the generation '
        'prompt and the last answer where it writes them in the whole '
        'conversation; use a template whose texts are prefixes of each other'
      )
    return text, [span for span in spans if span]

  def _span(self, text, messages, i, where):
    """[start, stop) of the answer of message `i` in `text`, None if moved."""
    opened = render(self._tokenizer, messages[:i], where, add_generation_prompt=True)
    closed = render(self._tokenizer, messages[: i + 1], where)
    # Counted from the end: the content itself may be trimmed or rewritten.
    start, stop = len(opened), len(closed) - len(self._closing) + self._end
    # An answer begins where generation would: else the model learns from another
    # context than it will be asked in.
    kept = text.startswith(opened) and text.startswith(closed[:stop])
    kept = kept and closed.endswith(self._closing) and start < stop
    return (start, stop) if kept else None

  def _takes(self, messages):
    try:
      _apply(self._tokenizer, messages)
    except jinja2.TemplateError:
      return False
    return True


def _end_of_turn(closing, tokenizer):
  """Length of `closing` through its first added token, else its first line."""
  added = map(str, tokenizer.added_tokens_decoder.values())
  found = [
    (closing.index(token), -len(token))  # the longest of those that start there
    for token in added
    if token.strip() and token in closing
  ]
  if found:
    start, length = min(found)
    return start - length
  return closing.find('\n') + 1 or len(closing)  # Not found is -1: all of it.


def _fold_system(messages):
  """Puts the system message before the first user's: Gemma has no such role."""
  system, user, *rest = messages
  return [_say(user['role'], f'{system["content"]}\n\n{user["content"]}'), *rest]


def _say(role, content):
  return {'role': role, 'content': content}
