"""Conversations whose answers the base model writes itself, once.

The questions are those of the project's own set, up to its first answers. The
untuned model answers them by seeded draws at temperature 1: then p0 itself is
what the answers teach, and in expectation their likelihood has no gradient at
the base. What was drawn is kept in the cache folder, in a folder of its own:

  conversations.jsonl: {"messages": [...], "prompt": [...], "answer": [...]} a
    line. The token ids count; the text is for people, and for other programs
    that read `messages`.
  record.json: what drew them, and when.

Invariants:
  * Tokens are taught as they were drawn: text that is tokenized again may give
    others, and an answer that was cut at its limit has no end of turn to learn.
  * A folder holds both files, complete, or does not exist; its name follows
    from everything that decides the draws.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import tempfile

import numpy as np
from absl import logging

from behaviorlm_jax.cluster import processes
from behaviorlm_jax.data import chat
from behaviorlm_jax.data import conversations
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import addresses
from behaviorlm_jax.io import files

ADDRESS = 'self'  # As data.conversations.
TOKENS = 128  # Of an answer, at most.
TEMPERATURE = 1.0


@dataclasses.dataclass(frozen=True)
class Task:
  """What the model is to answer, and how."""

  openings: list  # Of messages before the first answer.
  prompts: list  # Of int32 arrays, their tokens.
  ends: tuple  # Tokens that end an answer.
  facts: dict  # Everything that decides the draws, as JSON values.


def read(base, dtype, seed, max_length, draw):
  """The conversations of a base model, written by it at the first call.

  Args:
    base: model.weights.Base.
    dtype: name of the dtype that the model runs in.
    seed: of the draws.
    max_length: tokens of a conversation, at most; longer ones are cut.
    draw: Task -> list of int32 arrays, the answers to its prompts.

  Returns:
    List of conversations.Conversation, in the order of the project's set.
  """
  task = _task(base, dtype, seed)
  facts = json.dumps(task.facts, sort_keys=True)
  root = addresses.cache_dir() / 'self_written'
  folder = root / hashlib.sha256(facts.encode()).hexdigest()[:16]
  path = folder / 'conversations.jsonl'
  # Hosts may have caches of their own: what the first one has counts, as other
  # devices may have drawn others.
  text = processes.shared(path.read_text('utf-8') if path.exists() else None)
  if text is None:
    logging.info(
      'The base model answers %d questions once, into %s.', len(task.prompts), folder
    )
    text = _write(folder, task, draw(task), base)
  return _load(text, path, max_length)


def _task(base, dtype, seed):
  tokenizer = base.tokenizer
  renderer = chat.Renderer(tokenizer)
  encode = lambda text: tokenizer(text, add_special_tokens=False)['input_ids']
  openings, prompts = [], []
  for where, messages in conversations.openings(conversations.DEFAULT):
    openings.append(messages)
    text = renderer.opening(messages, where)
    prompts.append(np.array(encode(text), np.int32))
  longest = max(map(len, prompts)) + TOKENS
  if longest > base.config.max_length:
    raise InputError(
      f'data.conversations is {ADDRESS!r}, but questions and answers need '
      f'{longest} tokens and model.address takes {base.config.max_length}; '
      'give a file of conversations.'
    )
  ends = {encode(renderer.end_of_turn)[-1], tokenizer.eos_token_id} - {None}
  digest = hashlib.sha256()
  for prompt in prompts:
    digest.update(len(prompt).to_bytes(4, 'little') + prompt.tobytes())
  facts = {
    'fingerprint': base.fingerprint,
    'dtype': dtype,
    'seed': seed,
    'temperature': TEMPERATURE,
    'tokens': TOKENS,
    'ends': sorted(ends),
    'prompts_sha256': digest.hexdigest(),
  }
  return Task(openings, prompts, tuple(sorted(ends)), facts)


def _write(folder, task, answers, base):
  """Both files, beside their place first; returns the conversations."""
  root = folder.parent
  root.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=root, prefix='.write-') as place:
    half = pathlib.Path(place) / 'whole'
    half.mkdir()
    lines = [
      _line(*parts, base.tokenizer)
      for parts in zip(task.openings, task.prompts, answers, strict=True)
    ]
    text = ''.join(lines)
    files.write_text(half / 'conversations.jsonl', text)
    cut = sum(int(answer[-1]) not in task.ends for answer in answers)
    now = datetime.datetime.now(datetime.UTC)
    files.write_json(
      half / 'record.json',
      {
        'model': base.address,
        **task.facts,
        'conversations': len(lines),
        'answer_tokens': sum(map(len, answers)),
        'cut_at_their_end': cut,
        'written': now.isoformat(timespec='seconds'),
      },
    )
    try:
      os.rename(half, folder)
    except OSError:
      if not folder.is_dir():  # Else another process was faster.
        raise
  return text


def _line(messages, prompt, answer, tokenizer):
  text = tokenizer.decode(answer, skip_special_tokens=True)
  messages = [*messages, {'role': 'assistant', 'content': text}]
  return (
    json.dumps(
      {'messages': messages, 'prompt': prompt.tolist(), 'answer': answer.tolist()},
      ensure_ascii=False,
    )
    + '\n'
  )


def _load(text, path, max_length):
  """Conversations of what stands in `path`, but for those that do not fit."""
  # Not splitlines: it also cuts at characters that JSON leaves as they are.
  lines = text.removesuffix('\n').split('\n')
  found = [
    _conversation(line, f'{path} line {n}', max_length)
    for n, line in enumerate(lines, start=1)
  ]
  kept = [one for one in found if one.answers.any()]
  if not kept:
    raise InputError(
      f'train.length is {max_length} tokens, which holds no answer of {path}; raise it.'
    )
  if len(kept) < len(found):
    logging.warning(
      '%s: %d of %d conversations left out: no answer in their first %d tokens.',
      path,
      len(found) - len(kept),
      len(found),
      max_length,
    )
  return kept


def _conversation(line, where, max_length):
  try:
    record = json.loads(line)
    prompt, answer = record['prompt'], record['answer']
    tokens = np.array([*prompt, *answer], np.int32)
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(
      f'{where} is not what this program wrote ({error!r}); '
      'delete its folder, and it is written again.'
    ) from error
  answers = np.arange(len(tokens)) >= len(prompt)
  return conversations.Conversation(tokens[:max_length], answers[:max_length])
