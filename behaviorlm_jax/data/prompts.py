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

from typing import TYPE_CHECKING

import numpy as np
from absl import logging

from behaviorlm_jax.data import chat, plain_text
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.data.events import Events
from behaviorlm_jax.errors import InputError

if TYPE_CHECKING:  # It takes seconds to import, and a dry run needs none of it.
  from transformers import PreTrainedTokenizerFast

WEEKDAYS = ('Mon', 'Tue', 'Wed', 'Thu', 'Fri', 'Sat', 'Sun')
DAY = 86_400
_WEEK = 7 * DAY // 60  # In minutes.
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
    events: Events,
    tokenizer: 'PreTrainedTokenizerFast',
    instruction: str,
    history: int,
    weekday: bool,
  ):
    """`history`: events before a question's; `weekday`: shown in every line."""
    self.events, self.tokenizer, self.history = events, tokenizer, history
    if tokenizer.chat_template is None:
      logging.warning(
        'model.address: the tokenizer has no chat template; '
        'using the plain format "User: ... Assistant: ...".'
      )
    self._log_text = plain_text.PlainText(tokenizer)
    nothing = np.zeros(0, np.int32)
    self.names = [self.answer(b.name) for b in events.behaviors]
    self._places = [
      self._log_text.encode(f' ({name})', f'place {name!r}') for name in events.places
    ]
    self._places.append(nothing)  # No place, -1, is the last one.
    seen = np.zeros(_WEEK, bool)  # A log need not have all minutes of a week.
    for span in samples_lib.spans(events):
      seen[self._minute(span)] = True
    # The weeks begin with 1970, so a week's minute is itself a time.
    self._times = [
      self.encode(time_text(60 * minute, weekday, events.clock)) if found else nothing
      for minute, found in enumerate(seen)
    ]
    # A plan asks for more windows than it takes: most lines are only measured.
    self.answer_lengths, self._place_lengths, self._time_lengths = (
      np.array([len(piece) for piece in pieces])
      for pieces in (self.names, self._places, self._times)
    )
    # In one go: a template may end in a blank that belongs to the next word.
    self.header = self.encode(self._header(instruction))

  def encode(self, text: str) -> np.ndarray:
    """Token ids int32 [n] of `text`, with nothing added.

    Not for text of a log: control tokens in it count.
    """
    ids = self.tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(ids, np.int32)

  def answer(self, name: str) -> np.ndarray:
    """Answer tokens int32 [n] of a behavior's name."""
    return self._log_text.encode(answer_text(name), f'behavior {name!r}')

  def _header(self, instruction: str) -> str:
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
    return text.replace(_MARK, instruction.strip())

  @property
  def labels(self) -> list[np.ndarray]:
    """Answer tokens of every candidate behavior, by id."""
    return self.names[: self.events.known]

  def _minute(self, positions: int | slice) -> np.ndarray:
    """Minutes since the week's start: what a line shows of the time."""
    return self.events.time[positions] // 60 % _WEEK

  def _cut_line(self, position: int) -> list[np.ndarray]:
    """Pieces of the line of `position` up to where the answer starts."""
    place = self.events.place[position]
    return [self._times[self._minute(position)], self._places[place]]

  def question_start(self, positions: int | np.ndarray) -> np.ndarray:
    """First event that the question about a position shows."""
    return np.maximum(self.events.first[positions], positions - self.history)

  def check_lengths(self, most: int, train_length: int) -> None:
    """Refuses questions, or rows, of more positions than the model knows."""
    if train_length > most:
      raise InputError(
        f'train.length is {train_length}, but the model of '
        f'model.address has {most} positions; lower it.'
      )
    longest = 0
    # Of every event, sample or not, to the end of the answer, which scoring appends
    # to the question.
    for span in samples_lib.spans(self.events):
      positions = np.arange(span.start, span.stop)
      starts = self.question_start(positions)
      longest = max(longest, self.window_lengths(starts, positions + 1).max())
    if longest > most:
      raise InputError(
        f'data.history is {self.history}, with which a question has '
        f'{longest} tokens, but the model of model.address has {most} '
        'positions; lower it.'
      )

  def question(self, position: int, start: int | None = None) -> np.ndarray:
    """Tokens int32 [n] that ask for the behavior of `position`.

    `start`: the first event that is shown; None: data.history events are.
    """
    start = self.question_start(position) if start is None else start
    past, _ = self.window(start, position)
    return np.concatenate([past, *self._cut_line(position)])

  def window(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of events [start, stop) and where each answer lies in them.

    Returns:
      tokens int32 [n]; spans int64 [stop - start, 2], begin and end of each
      event's answer tokens.
    """
    pieces, spans = [self.header], []
    length = len(self.header)
    for i in range(start, stop):
      cut, name = self._cut_line(i), self.names[self.events.behavior[i]]
      begin = length + sum(map(len, cut))
      length = begin + len(name)
      spans.append((begin, length))
      pieces += [*cut, name]
    return np.concatenate(pieces), np.asarray(spans)

  def line_ends(self, start: int, stop: int) -> np.ndarray:
    """int64 [stop - start + 1]: tokens from `start` on before each event."""
    span = slice(start, stop)
    lengths = (
      self.answer_lengths[self.events.behavior[span]]
      + self._time_lengths[self._minute(span)]
      + self._place_lengths[self.events.place[span]]
    )
    return np.concatenate([[0], np.cumsum(lengths)])

  def window_lengths(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """int64 [n], tokens of windows [start, stop), both in ascending order."""
    base = starts[0]
    ends = self.line_ends(base, stops[-1])
    return ends[stops - base] - ends[starts - base] + len(self.header)
