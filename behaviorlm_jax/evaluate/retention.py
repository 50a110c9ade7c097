"""What a tuned model still knows of what its base model knew.

Two sources, either of which may be absent:

  * Conversations held out of training. Perplexity of their answer tokens,
    exp(mean of -log p), and how far the tuned model p moved from the base
    model p0 there, in nats per answer token:

      KL(p0 || p) = mean_t sum_v p0(v | x_t) (log p0(v | x_t) - log p(v | x_t))

  * Multiple-choice questions. The answer is the choice whose text is likeliest
    after the question; letters are near chance for small models. Beside the
    sum of log p over a choice's tokens stands that sum per byte of its text
    (`acc_norm` of EleutherAI's lm-evaluation-harness).

Invariants:
  * A question's choices are conversations of one user turn, so that both
    sources take the same way through template, mask and model.
  * The output head sees answer positions alone, some at a time: logits of the
    shape [batch, length, vocabulary] never exist. An adapter does not touch
    the head, so one program serves the base and every adapter.
  * Intervals hold 95 % of 1,000 seeded redraws of whole conversations or
    questions. A change or ratio compares both models on the same redraw.
"""

import dataclasses
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from behaviorlm_jax.data import chat
from behaviorlm_jax.data import conversations as conversations_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.score import label_tree as labels_lib
from behaviorlm_jax.score import scorer as scorer_lib

_DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Question:
  """One multiple-choice question.

  Attributes:
    choices: a Conversation for each choice: the question, and that answer.
    sizes: length of each choice's text, in bytes of UTF-8.
    answer: index of the right choice.
  """

  choices: list[conversations_lib.Conversation]
  sizes: list[int]
  answer: int


@dataclasses.dataclass(frozen=True)
class _Numbers:
  """What one model says of every item.

  Attributes:
    states: of each conversation, hidden states [n, D] in the compute dtype of
      the positions that predict its n answer tokens.
    talks: float64 [conversations], log p of all answer tokens, in nats.
    choices: float64 [choices of all questions], the same.
  """

  states: list[np.ndarray]
  talks: np.ndarray
  choices: np.ndarray


class Retention:
  """Measures adapters against their base model, on the same items."""

  def __init__(
    self, attach, params, layout, conversations=None, questions=None, batch=8
  ):
    """Compiles nothing yet.

    Args:
      attach: (params, adapter) -> decoder.
      params: base weights.
      layout: train.sharding.Layout.
      conversations: list of data.conversations.Conversation, or None.
      questions: list of Question, or None.
      batch: rows per pass, each a conversation or one choice.
    """
    self.layout, self.params, self._base = layout, params, None
    self.conversations, self.questions = conversations or [], questions or []
    self.choices = [row for one in self.questions for row in one.choices]
    parts = layout.row_parts
    self.batch = -(-batch // parts) * parts
    # Logits that leave a CPU's cache take twice as long.
    rows = 64 if jax.default_backend() == 'cpu' else 512
    self.block = -(-rows // parts) * parts

    def hidden(adapter, params, tokens, lengths):
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
      segments = (positions < lengths[:, None]).astype(jnp.int32)
      return attach(params, adapter).packed_hidden(tokens, positions, segments)[0]

    def log_probs(params, states, tokens):
      return labels_lib.log_probs(attach(params, None), states, tokens)

    def divergence(params, base, ours):
      logits = attach(params, None).logits
      base, ours = (jax.nn.log_softmax(logits(x)) for x in (base, ours))
      return jnp.sum(jnp.exp(base) * (base - ours), axis=-1)

    compiled = lambda f: jax.jit(f, out_shardings=layout.replicated)
    self._hidden, self._log_probs = compiled(hidden), compiled(log_probs)
    self._divergence = compiled(divergence)

  def rows(self, adapter) -> int:
    """How many rows `measure` will run: the base's, too, the first time."""
    passes = (self._base is None) + (adapter is not None)
    return passes * (len(self.conversations) + len(self.choices))

  def measure(self, adapter, progress=lambda n: None) -> dict:
    """Numbers of an adapter (None: the base model), plain int and float.

    Args:
      adapter: LoRA weights or None.
      progress: called with the number of rows of each finished batch.

    Returns:
      {'conversations': {'n', 'answer_tokens', 'perplexity', 'kl_to_base',
      'perplexity_ratio'}, 'questions': {'n', 'chance', 'accuracy',
      'accuracy_change', 'accuracy_per_byte', 'accuracy_per_byte_change'}}
      without what is absent. Ratio and change are to the base. Every name but
      counts and chance has a `<name>_interval` [low, high]; it is None where a
      single item leaves nothing to redraw.
    """
    if self._base is None:  # Kept, the hidden states for every later KL.
      self._base = self._run(None, progress)
    ours = self._base if adapter is None else self._run(adapter, progress)
    result = {}
    if self.conversations:
      result['conversations'] = self._of_conversations(ours)
    if self.questions:
      result['questions'] = self._of_questions(ours)
    return result

  def _run(self, adapter, progress) -> _Numbers:
    states = self._states(adapter, self.conversations, progress)
    choices = self._states(adapter, self.choices, progress)
    return _Numbers(
      states,
      self._totals(states, self.conversations),
      self._totals(choices, self.choices),
    )

  def _states(self, adapter, rows, progress):
    """Hidden states [n, D] that predict the answers of each Conversation."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    states = [None] * len(rows)
    for begin in range(0, len(order), self.batch):
      chosen = order[begin : begin + self.batch]
      padded = self._pad([rows[i].tokens for i in chosen])
      found = np.asarray(self._hidden(adapter, self.params, *padded))
      for i, hidden in zip(chosen, found, strict=False):
        before = np.flatnonzero(rows[i].answers[1:])  # Token t + 1 from t.
        states[i] = hidden[before]
      progress(len(chosen))
    return states

  def _pad(self, prompts):
    """Tokens int32 [B, L] and lengths int32 [B]; the last is the longest."""
    width = -(-len(prompts[-1]) // scorer_lib.WIDTH) * scorer_lib.WIDTH
    tokens = np.zeros((self.batch, width), np.int32)
    lengths = np.ones(self.batch, np.int32)
    for row, prompt in enumerate(prompts):
      tokens[row, : len(prompt)] = prompt
      lengths[row] = len(prompt)
    placed = self.layout.put_same({'t': tokens, 'n': lengths})
    return placed['t'], placed['n']

  def _totals(self, states, rows):
    """float64 [rows], log p of all answer tokens of each Conversation."""
    if not rows:
      return np.zeros(0)
    tokens = np.concatenate([row.tokens[1:][row.answers[1:]] for row in rows])
    found = self._in_blocks(self._log_probs, np.concatenate(states), tokens[:, None])
    return _sums(found[:, 0], states)

  def _in_blocks(self, function, *arrays):
    """function(params, *arrays) of arrays [N, ...], a few rows at a time."""
    count, found = len(arrays[0]), []
    for begin in range(0, count, self.block):
      parts = [x[begin : begin + self.block] for x in arrays]
      more = self.block - len(parts[0])
      parts = [np.pad(x, ((0, more), (0, 0))) for x in parts]
      placed = self.layout.put_same(dict(enumerate(parts)))
      found.append(np.asarray(function(self.params, *placed.values())))
    return np.concatenate(found)[:count]

  def _of_conversations(self, ours):
    base, n = self._base, len(self.conversations)
    tokens = np.array([len(x) for x in ours.states])
    kl = _sums(
      self._in_blocks(
        self._divergence, np.concatenate(base.states), np.concatenate(ours.states)
      ),
      ours.states,
    )
    per_token = lambda sums: lambda times: times @ sums / (times @ tokens)
    loss, change = per_token(-ours.talks), per_token(base.talks - ours.talks)
    return {
      'n': n,
      'answer_tokens': int(tokens.sum()),
      **_estimate('perplexity', n, lambda times: np.exp(loss(times))),
      **_estimate('kl_to_base', n, per_token(kl)),
      **_estimate('perplexity_ratio', n, lambda times: np.exp(change(times))),
    }

  def _of_questions(self, ours):
    n = len(self.questions)
    chances = [1 / len(one.choices) for one in self.questions]
    result = {'n': n, 'chance': float(np.mean(chances))}
    sizes = np.concatenate([one.sizes for one in self.questions])
    for name, unit in (('accuracy', 1), ('accuracy_per_byte', sizes)):
      right, before = (self._right(x.choices / unit) for x in (ours, self._base))
      mean = lambda values: lambda times: times @ values / times.sum()
      result |= _estimate(name, n, mean(right))
      result |= _estimate(f'{name}_change', n, mean(right - before))
    return result

  def _right(self, scores):
    """float64 [questions], 1 where the right choice scores highest."""
    parts = _parts(scores, [len(one.choices) for one in self.questions])
    return np.array(
      [
        float(part.argmax() == one.answer)
        for part, one in zip(parts, self.questions, strict=True)
      ]
    )


def _parts(values, sizes):
  """Values [N] cut into runs of these sizes."""
  return np.split(values, np.cumsum(sizes)[:-1])


def _sums(values, like):
  """float64 sums of values [N], in runs as long as the arrays of `like`."""
  parts = _parts(values.astype(np.float64), [len(x) for x in like])
  return np.array([part.sum() for part in parts])


def _estimate(name, n, statistic) -> dict:
  """A statistic of n items and its interval; the same redraws for each name.

  statistic: of `times` [n], how often each item counts.
  """
  rng, interval = np.random.default_rng(0), None
  if n > 1:
    draws = [
      statistic(np.bincount(rng.integers(n, size=n), minlength=n))
      for _ in range(_DRAWS)
    ]
    interval = np.quantile(draws, [0.025, 0.975]).tolist()
  return {name: float(statistic(np.ones(n))), f'{name}_interval': interval}


def hold_out(conversations, share=0.1):
  """Splits conversations into (training, held out), both in their order.

  The SHA-256 of its tokens decides each: other conversations and their order
  do not matter, and equal ones stay together. `share` is that of a long list.
  """
  parts = [], []
  for conversation in conversations:
    digest = hashlib.sha256(conversation.tokens.astype('<i4').tobytes())
    value = int.from_bytes(digest.digest()[:8], 'big') / 2**64
    parts[value < share].append(conversation)
  return parts


def read_questions(path, tokenizer, max_length) -> list[Question]:
  """Reads a .jsonl or .jsonl.gz of questions, in the order of the file:

    {"question": "...", "choices": ["...", "..."], "answer": 0}

  `answer` counts from 0; other fields are ignored. Left out, and counted in
  one warning: questions with two equal choices (public sets have some), and
  those that are longer than `max_length` tokens with their longest choice.
  """
  renderer, questions, equal, long = chat.Renderer(tokenizer), [], 0, 0
  for where, record in _records(pathlib.Path(path)):
    choices = [choice.strip() for choice in record['choices']]
    rows = [
      _row(renderer, tokenizer, record['question'], choice, where) for choice in choices
    ]
    if len(set(choices)) < len(choices):
      equal += 1
    elif max(len(row.tokens) for row in rows) > max_length:
      long += 1
    else:
      sizes = [len(choice.encode()) for choice in choices]
      questions.append(Question(rows, sizes, record['answer']))
  counts = (
    f'{path}: of {len(questions) + equal + long} questions {equal + long} '
    f'left out ({equal} with equal choices, {long} longer than {max_length} '
    'tokens)'
  )
  if not questions:
    raise InputError(f'{counts}; none is left: give other questions')
  if equal or long:
    logging.warning('%s', counts)
  return questions


def _row(renderer, tokenizer, question, choice, where):
  messages = [
    {'role': 'user', 'content': question.strip()},
    {'role': 'assistant', 'content': choice},
  ]
  return conversations_lib._encode(tokenizer, *renderer.render(messages, where))


def _records(path):
  """Yields ('FILE line N', a checked record)."""
  if not path.is_file():
    raise InputError(f'{path}: no such file; mend the path of the questions')
  n = 0
  for n, line in conversations_lib._lines(path):
    where = f'{path} line {n}'
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise InputError(f'{where}: not JSON ({error}); mend the line') from error
    if wrong := _mistake(record):
      raise InputError(f'{where}: {wrong}')
    yield where, record
  if not n:
    raise InputError(f'{path} is empty; give one question a line')


def _mistake(record) -> str | None:
  """What is wrong with a question and what to change, or None."""
  known = record if isinstance(record, dict) else {}
  question, choices, answer = map(known.get, ('question', 'choices', 'answer'))
  text = lambda x: isinstance(x, str) and x.strip()
  if not text(question):
    return f'`question` is {question!r}; give its text'
  if not isinstance(choices, list) or not all(map(text, choices)):
    return f'`choices` is {choices!r}; give a list of texts'
  if len(choices) < 2:
    return f'there are {len(choices)} choices; give two or more'
  if type(answer) is not int or not 0 <= answer < len(choices):
    return (
      f'`answer` is {answer!r} and there are {len(choices)} choices; '
      f'give the index of the right one, 0 to {len(choices) - 1}'
    )
  return None
