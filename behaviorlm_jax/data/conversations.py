"""Auxiliary conversations: token ids and the mask of what the model must say.

Stage 1 mixes general instructions with answers into the behavior samples, so
that the model keeps what it knew. A file holds one JSON object a line (gzip
too), other fields than `messages` are ignored:

  {"messages": [{"role": "user", "content": "..."},
                {"role": "assistant", "content": "..."}]}

Roles are system, user and assistant. `DEFAULT` is the project's own set. What is
an answer is decided by the tokenizer's chat template (`chat`); the same file
gives the same tokens on any day.
"""

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import logging

from behaviorlm_jax.data import chat
from behaviorlm_jax.errors import InputError

if TYPE_CHECKING:  # It takes seconds to import, and a dry run needs none of it.
  from transformers import PreTrainedTokenizerFast

DEFAULT = Path(__file__).with_name('conversations.jsonl')

_ROLES = ('system', 'user', 'assistant')
_TEXT_END = '<|endoftext|>'  # Public sets carry it as text.


@dataclasses.dataclass(frozen=True)
class Conversation:
  """One conversation, ready to be packed."""

  tokens: np.ndarray  # int32 [n]
  # bool [n], whether the model must produce a token: assistant content and the
  # end-of-turn token that closes it. At least one is True.
  answers: np.ndarray


def tokens_digest(found: Iterable[Conversation]) -> str:
  """SHA-256 of conversations in their order, tokens and answers."""
  total = hashlib.sha256()
  for conversation in found:
    # Its length first, so that no two lists give the same bytes.
    total.update(len(conversation.tokens).to_bytes(4, 'little'))
    total.update(conversation.tokens.tobytes() + conversation.answers.tobytes())
  return total.hexdigest()


def read_conversations(
  path: str | Path, tokenizer: 'PreTrainedTokenizerFast', max_length: int
) -> list[Conversation]:
  """Reads a .jsonl or .jsonl.gz of `messages`, in the order of the file.

  Left out, and counted in one warning: conversations with an assistant message
  that is empty once cleaned, and those whose first `max_length` tokens hold no
  answer token. Longer ones that do are cut at their end.
  """
  renderer = chat.Renderer(tokenizer)
  encoded, empty = [], 0
  for where, messages in _conversations(Path(path)):
    if all(m['content'] for m in messages if m['role'] == 'assistant'):
      encoded.append(_encode(tokenizer, *renderer.render(messages, where)))
    else:
      empty += 1
  cut = [Conversation(c.tokens[:max_length], c.answers[:max_length]) for c in encoded]
  kept = [c for c in cut if c.answers.any()]
  late = len(cut) - len(kept)
  # Of those that are kept: one without an answer left is counted as late.
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


def _encode(tokenizer, text, spans):
  """Tokens of `text`; `spans` are [start, stop) of its answers in characters."""
  # Not verbose: it would warn of texts that are longer than the model's context,
  # which are cut later.
  encoding = tokenizer(
    text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
  )
  # The end of a token decides: its start is moved by tokenizers that leave blanks
  # out of the offsets.
  ends = np.array([end for _, end in encoding['offset_mapping']], np.int64)
  answers = np.zeros(len(ends), bool)
  for start, stop in spans:
    answers |= (start < ends) & (ends <= stop)
  return Conversation(np.array(encoding['input_ids'], np.int32), answers)


def _conversations(path: Path) -> Iterator[tuple[str, chat.Messages]]:
  """Yields ('FILE line N', checked and cleaned messages)."""
  if not path.is_file():
    raise InputError(f'{path}: no such file; mend data.conversations')
  n, where = 0, None
  opener = gzip.open if path.suffix == '.gz' else open
  try:
    with opener(path, 'rt', encoding='utf-8-sig') as file:  # With a mark or not.
      for n, line in enumerate(file, start=1):
        if line.strip():
          where = f'{path} line {n}'
          yield where, _messages(line, where)
  except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
    raise InputError(
      f'{path} cannot be read after line {n} ({error}); give UTF-8 JSON lines, '
      'with gzip if the name ends in .gz'
    ) from error
  if where is None:
    raise InputError(f'{path} is empty; give one conversation a line')


def _messages(line: str, where: str) -> chat.Messages:
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise InputError(f'{where}: not JSON ({error}); mend the line') from error
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
  return [{'role': m['role'], 'content': _content(m, where)} for m in messages]


def _content(message: dict, where: str) -> str:
  """The content of a message without the blanks and end text around it."""
  content = message.get('content')
  if not isinstance(content, str):
    raise InputError(
      f'{where}: the content of the {message["role"]} is {content!r}; give a string'
    )
  content = content.strip()
  while content.endswith(_TEXT_END):
    content = content.removesuffix(_TEXT_END).rstrip()
  return content
