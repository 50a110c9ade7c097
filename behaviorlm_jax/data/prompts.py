"""Events as text: a prompt is a log, and asking is the same log cut short.

    <chat header with an instruction>
    Tue 14:14 Coffee Shop
    Tue 18:02 (Home) Gym / Fitness Center
    Wed 08:55                                <- the question ends here

An answer is a blank, the name and the line's end; training, scoring and
prediction use the same tokens for it. The place of an event belongs to the
question like its time: both are known when the question is asked.

Names and places are text of the log and never become control tokens
(`plain_text`); the header is the chat template's and has them.

Lines are concatenations of pieces that are tokenized once and cached. The cuts
lie where byte-level BPE cannot merge across (before a blank that starts a word
and after a line's end), so the pieces are exactly the tokens of the whole text;
a test holds them to that.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from behaviorlm_jax.data import chat, plain_text
from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.errors import InputError

if TYPE_CHECKING:  # It takes seconds to import, and a dry run needs none of it.
  from transformers import PreTrainedTokenizerFast

WEEKDAYS = ('Mon', 'Tue', 'Wed', 'Thu', 'Fri', 'Sat', 'Sun')
DAY = 86_400
# Stands for the instruction while a template renders: no template writes a bell.
_MARK = '\x07content\x07'


def time_text(seconds: int, weekday: bool, clock: bool = True) -> str:
  """'Tue 14:14' of local seconds since 1970-01-01.

  `weekday`, `clock`: whether either part is shown; without both it is ''.
  """
  minute = int(seconds) % DAY // 60
  # 1970-01-01 was a Thursday, WEEKDAYS[3].
  parts = [WEEKDAYS[(int(seconds) // DAY + 3) % 7]] if weekday else []
  if clock:
    parts.append(f'{minute // 60:02d}:{minute % 60:02d}')
  return ' '.join(parts)


def answer_text(name: str) -> str:
  """What stands after the time (and place): ' Coffee Shop\\n'."""
  return f' {name}\n'


class Prompts:
  """Token ids of questions and windows over one event table."""

  def __init__(
    self,
    events: events_lib.Events,
    tokenizer: 'PreTrainedTokenizerFast',
    data: ConfigDict,
  ):
    """`data`: the config's section; `tokenizer`: a transformers tokenizer."""
    self.events = events
    self.tokenizer = tokenizer
    self.data = data
    if tokenizer.chat_template is None:
      logging.warning(
        'model.address: the tokenizer has no chat template; '
        'using the plain format "User: ... Assistant: ...".'
      )
    self._log_text = plain_text.PlainText(tokenizer)
    self.names = [self.answer(b.name) for b in events.behaviors]
    self._times, self._places = {}, {}
    # In one go: a template may end in a blank that belongs to the next word.
    self.header = self.encode(self._header())

  def encode(self, text: str) -> np.ndarray:
    """Token ids int32 [n] of `text`, with nothing added.

    Not for text of a log: control tokens in it count.
    """
    ids = self.tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(ids, np.int32)

  def answer(self, name: str) -> np.ndarray:
    """Answer tokens int32 [n] of a behavior's name."""
    return self._log_text.encode(answer_text(name), f'behavior {name!r}')

  def _header(self) -> str:
    """Text of what stands before the log."""
    text = chat.render(
      self.tokenizer, [{'role': 'user', 'content': _MARK}], add_generation_prompt=True
    )
    if not text[-1].isspace():
      text += '\n'  # The log starts on a line of its own.
    if text.count(_MARK) != 1:
      raise InputError(
        'model.address: the chat template does not show a '
        'user message exactly once; give it another template.'
      )
    # Now, when no template can trim or rewrite it.
    return text.replace(_MARK, self.data.instruction.strip())

  @functools.cached_property
  def labels(self) -> list[np.ndarray]:
    """Answer tokens of every candidate behavior, by id."""
    return self.names[: self.events.known]

  def _time(self, code: int) -> np.ndarray:
    if code not in self._times:  # At most 10,080: the minutes of a week.
      self._times[code] = self.encode(
        time_text(code * 60, self.data.weekday, self.events.clock)
      )
    return self._times[code]

  def _time_code(self, positions: int | slice | np.ndarray) -> np.ndarray:
    """Minutes since the week's start: what a line shows of the time."""
    # The weeks begin with 1970, so a code is itself a time for `time_text`.
    return self.events.time[positions] // 60 % (7 * DAY // 60)

  def _place(self, place: int) -> np.ndarray:
    if place < 0:
      return np.zeros(0, np.int32)
    if place not in self._places:
      name = self.events.places[place]
      self._places[place] = self._log_text.encode(f' ({name})', f'place {name!r}')
    return self._places[place]

  def cut_line(self, position: int) -> list[np.ndarray]:
    """Pieces of the line of `position` up to where the answer starts."""
    return [
      self._time(int(self._time_code(position))),
      self._place(int(self.events.place[position])),
    ]

  def question_start(self, position: int) -> int:
    """First event that the question about `position` shows."""
    return max(int(self.events.first[position]), int(position) - self.data.history)

  def check_lengths(self, most: int, train_length: int) -> None:
    """Refuses questions, or rows, of more positions than the model knows."""
    if train_length > most:
      raise InputError(
        f'train.length is {train_length}, but the model of '
        f'model.address has {most} positions; lower it.'
      )
    longest = 0
    # Of every event, sample or not. Spans hold whole users, so a question begins
    # in the span of its event.
    for span in samples_lib.spans(self.events):
      ends = self.line_ends(span.start, span.stop)
      positions = np.arange(span.start, span.stop)
      starts = np.maximum(self.events.first[span], positions - self.data.history)
      # To the end of the answer, which scoring appends to the question.
      lines = ends[1:] - ends[starts - span.start]
      longest = max(longest, lines.max())
    longest += len(self.header)
    if longest > most:
      raise InputError(
        f'data.history is {self.data.history}, with which a question has '
        f'{longest} tokens, but the model of model.address has {most} '
        'positions; lower it.'
      )

  def question(self, position: int) -> np.ndarray:
    """Tokens int32 [n] that ask for the behavior of `position`."""
    start = self.question_start(position)
    pieces = [self.header]
    for i in range(start, position):
      pieces += [*self.cut_line(i), self.names[self.events.behavior[i]]]
    return np.concatenate([*pieces, *self.cut_line(position)])

  def window(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of events [start, stop) and where each answer lies in them.

    Returns:
      tokens int32 [n]; spans int64 [stop - start, 2], begin and end of each
      event's answer tokens.
    """
    pieces, spans = [self.header], []
    length = len(pieces[0])
    for i in range(start, stop):
      cut = self.cut_line(i)
      name = self.names[self.events.behavior[i]]
      begin = length + sum(map(len, cut))
      length = begin + len(name)
      spans.append((begin, length))
      pieces += [*cut, name]
    return np.concatenate(pieces), np.asarray(spans)

  def line_ends(self, start: int, stop: int) -> np.ndarray:
    """int64 [stop - start + 1]: tokens from `start` on before each event."""
    # Lengths alone, by id: a plan asks for more windows than it takes, and most
    # lines it never sees as tokens.
    span = slice(start, stop)
    codes, places = self._time_code(span), self.events.place[span]
    lengths = (
      self.answer_lengths[self.events.behavior[span]]
      + _known(self._time_lengths, codes, self._time)
      + _known(self._place_lengths, places, self._place)
    )
    return np.concatenate([[0], np.cumsum(lengths)])

  @functools.cached_property
  def _time_lengths(self) -> np.ndarray:
    """int64 [minutes of a week]; -1: not known yet."""
    return np.full(7 * DAY // 60, -1)

  @functools.cached_property
  def _place_lengths(self) -> np.ndarray:
    """int64 [places + 1]; -1: not known yet."""
    # No place, -1, is the last one.
    return np.append(np.full(len(self.events.places), -1), 0)

  @functools.cached_property
  def answer_lengths(self) -> np.ndarray:
    """int64 [behaviors]: tokens of each behavior's answer."""
    return np.array([len(name) for name in self.names])

  def window_length(self, start: int, stop: int) -> int:
    """Number of tokens of `window(start, stop)`."""
    return int(self.line_ends(start, stop)[-1]) + len(self.header)


def _known(
  lengths: np.ndarray, ids: np.ndarray, tokens: Callable[[int], np.ndarray]
) -> np.ndarray:
  """Lengths of ids; those that are -1 so far are first found by `tokens`."""
  found = lengths[ids]
  if found.min(initial=0) < 0:
    for i in np.unique(ids[found < 0]):
      lengths[i] = len(tokens(int(i)))
    found = lengths[ids]
  return found
