"""Auxiliary conversations: token ids and the mask of what the model must say.

Stage 1 mixes general instructions with answers into the behavior samples, so
that the model keeps what it knew. A file holds one JSON object a line (gzip
too), other fields than `messages` are ignored:

  {"messages": [{"role": "user", "content": "..."},
                {"role": "assistant", "content": "..."}]}

Roles are system, user and assistant. `DEFAULT` is the project's own set.

Invariants:
  * Everything goes through the tokenizer's chat template. `PLAIN_TEMPLATE` is
    the template of a tokenizer that has none.
  * An answer is what follows the generation prompt up to and including the
    end-of-turn token. Both ends are found by rendering, so any template will
    do: what a template writes after the end of a turn (the newline after
    `<|im_end|>`) is context, like the user's messages.
  * The last answer always counts. An earlier one counts only where the
    template renders it inside the whole as it renders it at the end; templates
    that rewrite history (they drop its reasoning, say) leave it as context.
  * The same file gives the same tokens on any day: templates that write
    today's date are shown a fixed one.
"""

import dataclasses
import gzip
import json
import pathlib
import zlib

import jinja2
import numpy as np
import transformers
from absl import logging

from behaviorlm_jax.errors import InputError

DEFAULT = pathlib.Path(__file__).with_name('conversations.jsonl')

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

_ROLES = ('system', 'user', 'assistant')
_TEXT_END = '<|endoftext|>'  # public sets carry it as text
_PROBE = '\ue000'  # a private-use character that no template writes
# Hides the clock of transformers. The day is the one in Llama 3.1's template.
_FIXED_DAY = '{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}'


@dataclasses.dataclass(frozen=True)
class Conversation:
  """One conversation, ready to be packed.

  Attributes:
    tokens: int32[n], at most `max_length` of them.
    answers: bool[n], whether token i is one that the model must produce:
      assistant content and the end-of-turn token that closes it. At least one
      is True.
  """

  tokens: np.ndarray
  answers: np.ndarray


def read(
  path: str | pathlib.Path,
  tokenizer: transformers.PreTrainedTokenizerFast,
  max_length: int,
) -> list[Conversation]:
  """Reads a .jsonl or .jsonl.gz of `messages`, in the order of the file.

  Left out, and counted in one warning: conversations with an assistant message
  that is empty once cleaned, and those whose first `max_length` tokens hold no
  answer token. Longer ones that do are cut at their end.
  """
  renderer = _Renderer(tokenizer)
  encoded, empty = [], 0
  for where, messages in _conversations(pathlib.Path(path)):
    if all(m['content'] for m in messages if m['role'] == 'assistant'):
      encoded.append(_encode(tokenizer, *renderer.render(messages, where)))
    else:
      empty += 1
  cut = [
    Conversation(c.tokens[:max_length], c.answers[:max_length]) for c in encoded
  ]
  kept = [c for c in cut if c.answers.any()]
  late = len(cut) - len(kept)
  shortened = sum(len(c.tokens) > max_length for c in encoded) - late
  counts = (
    f'{path}: of {len(encoded) + empty} conversations {empty + late} left out '
    f'({empty} with an empty answer, {late} with none in the first '
    f'{max_length} tokens) and {shortened} cut at their end'
  )
  if not kept:
    raise InputError(f'{counts}; none is left: give longer rows or other data')
  if empty or late or shortened:
    logging.warning('%s', counts)
  return kept


def _encode(tokenizer, text: str, spans) -> Conversation:
  """Tokens of `text`; `spans` are [start, stop) of its answers in characters.

  The end of a token decides: its start is moved by tokenizers that leave blanks
  out of the offsets.
  """
  encoding = tokenizer(
    text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
  )
  ends = np.array([end for _, end in encoding['offset_mapping']], np.int64)
  answers = np.zeros(len(ends), bool)
  for start, stop in spans:
    answers |= (start < ends) & (ends <= stop)
  return Conversation(np.array(encoding['input_ids'], np.int32), answers)


class _Renderer:
  """Text of conversations by the tokenizer's template, and where they answer.

  `closing` is what the template writes after an assistant's content at the end
  of a conversation, `end` how many of its characters belong to the answer.
  """

  def __init__(self, tokenizer):
    self._tokenizer = tokenizer
    self._template = PLAIN_TEMPLATE
    if tokenizer.chat_template:
      self._template = tokenizer.get_chat_template()
    if 'strftime_now' in self._template:
      self._template = _FIXED_DAY + self._template
    self._name = f'chat template of the tokenizer {tokenizer.name_or_path!r}'
    probe = [_say('user', 'Hello'), _say('assistant', _PROBE)]
    whole = self._render(probe, 'a question and an answer')
    _, found, self._closing = whole.rpartition(_PROBE)
    self._end = _end_of_turn(self._closing, tokenizer)
    if not found or not self._end:
      raise InputError(
        f'the {self._name} writes {whole!r} for a question and an answer, '
        f'which has no {"end of turn" if found else "answer"}; give the '
        'tokenizer a template that closes answers with its end token'
      )

  def render(self, messages, where) -> tuple[str, list[tuple[int, int]]]:
    """The text and the [start, stop) of every answer in it, in characters."""
    turns = [i for i, m in enumerate(messages) if m['role'] == 'assistant']
    messages = messages[: turns[-1] + 1]  # nothing to learn after it
    if messages[0]['role'] == 'system' and not self._takes(messages):
      messages = _fold_system(messages)
      turns = [i - 1 for i in turns]
    text = self._render(messages, where)
    spans = [self._span(text, messages, i, where) for i in turns]
    if spans[-1] is None:
      raise InputError(
        f'{where}: the {self._name} does not write the generation prompt and '
        'the last answer where it writes them in the whole conversation; use '
        'a template whose texts are prefixes of each other'
      )
    return text, [span for span in spans if span]

  def _span(self, text, messages, i: int, where) -> tuple[int, int] | None:
    """[start, stop) of the answer of message `i` in `text`, None if moved."""
    opened = self._render(messages[:i], where, add_generation_prompt=True)
    closed = self._render(messages[: i + 1], where)
    stop = len(closed) - len(self._closing) + self._end
    kept = closed.endswith(self._closing) and text.startswith(closed[:stop])
    kept = kept and text.startswith(opened) and len(opened) < stop
    return (len(opened), stop) if kept else None

  def _takes(self, messages) -> bool:
    try:
      self._apply(messages)
    except jinja2.TemplateError:
      return False
    return True

  def _render(self, messages, where, **options) -> str:
    try:
      return self._apply(messages, **options)
    except jinja2.TemplateError as error:
      raise InputError(
        f'{where}: the {self._name} refuses it ({error}); change the '
        'conversation or the template'
      ) from error

  def _apply(self, messages, **options) -> str:
    return self._tokenizer.apply_chat_template(
      messages, chat_template=self._template, tokenize=False, **options
    )


def _end_of_turn(closing: str, tokenizer) -> int:
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
  return closing.find('\n') + 1 or len(closing)


def _fold_system(messages) -> list[dict[str, str]]:
  """Puts the system message before the first user's: Gemma has no such role."""
  system, user, *rest = messages
  content = f'{system["content"]}\n\n{user["content"]}'
  return [_say(user['role'], content), *rest]


def _say(role: str, content: str) -> dict[str, str]:
  return {'role': role, 'content': content}


def _conversations(path: pathlib.Path):
  """Yields ('FILE line N', checked and cleaned messages)."""
  if not path.is_file():
    raise InputError(f'{path}: no such file; mend data.conversations')
  n = 0
  for n, line in _lines(path):
    where = f'{path} line {n}'
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise InputError(f'{where}: not JSON ({error}); mend the line') from error
    yield where, _messages(record, where)
  if not n:
    raise InputError(f'{path} is empty; give one conversation a line')


def _lines(path: pathlib.Path):
  """Yields (number from 1, text) of the lines that are not blank."""
  n = 0
  opener = gzip.open if path.suffix == '.gz' else open
  try:
    with opener(path, 'rt', encoding='utf-8-sig') as file:
      for n, line in enumerate(file, start=1):
        if line.strip():
          yield n, line
  except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
    raise InputError(
      f'{path} cannot be read after line {n} ({error}); give UTF-8 JSON lines, '
      'with gzip if the name ends in .gz'
    ) from error


def _messages(record, where: str) -> list[dict[str, str]]:
  messages = record.get('messages') if isinstance(record, dict) else None
  if not isinstance(messages, list):
    raise InputError(
      f'{where}: no list `messages`; give {{"messages": [{{"role": ..., '
      '"content": ...}, ...]}'
    )
  roles = [m.get('role') if isinstance(m, dict) else m for m in messages]
  for role in roles:
    if role not in _ROLES:
      raise InputError(f'{where}: unknown role {role!r}; use one of {_ROLES}')
  if 'assistant' not in roles:
    raise InputError(
      f'{where}: a conversation without an assistant turn teaches nothing; add '
      'the answer or drop the line'
    )
  if 'user' not in roles[: roles.index('assistant')]:
    raise InputError(
      f'{where}: the assistant speaks before any user; start with the user'
    )
  return [_say(m['role'], _content(m, where)) for m in messages]


def _content(message: dict, where: str) -> str:
  """The content of a message without the blanks and end text around it."""
  content = message.get('content')
  if not isinstance(content, str):
    raise InputError(
      f'{where}: the content of the {message["role"]} is {content!r}; give a '
      'string'
    )
  content = content.strip()
  while content.endswith(_TEXT_END):
    content = content.removesuffix(_TEXT_END).rstrip()
  return content
