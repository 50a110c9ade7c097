"""Rows of questions: every event of a window is asked for at once.

A question is a log cut short, so a window of a user's events holds one at each
of its events: what stands before that event. Windows are packed side by side
into rows of one length, and a row is read once for all of its questions.

The context of a question has at least data.history events, where the user has
them, and at most plan.window.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from behaviorlm_jax.data import prompts as prompts_lib


@dataclasses.dataclass(frozen=True)
class Window:
  """Questions about some of a user's events, over one context.

  Attributes:
    start: first event of the context.
    targets: int64 [n], the events that are asked for, sorted.
    length: tokens up to where the last answer would begin.
  """

  start: int
  targets: np.ndarray
  length: int


@dataclasses.dataclass(frozen=True)
class QuestionRow:
  """Windows side by side; L tokens.

  Attributes:
    tokens, positions, segments: int32 [L]; segment 0 is padding.
    roots: int32 [n], where the last token of each question stands.
    targets: int64 [n], the events that are asked for.
    starts: int64 [n], first event of each one's context.
  """

  tokens: np.ndarray
  positions: np.ndarray
  segments: np.ndarray
  roots: np.ndarray
  targets: np.ndarray
  starts: np.ndarray


def windows(
  prompts: prompts_lib.Prompts, targets: np.ndarray, most: int, length: int
) -> Iterator[Window]:
  """Cuts targets, sorted positions, into windows that hold each of them once.

  Args:
    prompts: of the events.
    targets: int64.
    most: events before a target, at most; data.history, if that is more.
    length: tokens of a window, at most; a question by itself may be longer.
  """
  events, header = prompts.events, len(prompts.header)
  most = max(most, prompts.history)
  i = 0
  while i < len(targets):
    start = prompts.question_start(targets[i])
    reach = np.searchsorted(targets, start + most, 'right')
    chosen = targets[i:reach]
    chosen = chosen[events.user[chosen] == events.user[chosen[0]]]
    ends = prompts.line_ends(start, chosen[-1] + 1)
    lines = ends[chosen + 1 - start] - prompts.answer_lengths[events.behavior[chosen]]
    lengths = header + lines
    count = max(1, np.searchsorted(lengths, length, 'right'))
    yield Window(int(start), chosen[:count], int(lengths[count - 1]))
    i += count


def pack(found: Sequence[Window], length: int) -> list[list[Window]]:
  """Rows of windows of at most `length` tokens together, the longest first."""
  # Best fit: of rows with room for it, a window joins the one with the least.
  room = []  # Sorted (tokens left, row).
  rows = []
  for window in sorted(found, key=lambda w: (-w.length, w.start)):
    place = bisect.bisect_left(room, (window.length, 0))
    if place == len(room):
      left, row = length, len(rows)
      rows.append([])
    else:
      left, row = room.pop(place)
    rows[row].append(window)
    bisect.insort(room, (left - window.length, row))
  return rows


def row_of(
  prompts: prompts_lib.Prompts, found: Sequence[Window], length: int
) -> QuestionRow:
  """The arrays of packed windows."""
  tokens, positions, segments = np.zeros((3, length), np.int32)
  roots, begin = [], 0
  for number, window in enumerate(found, start=1):  # 0 is padding.
    text, spans = prompts.window(window.start, window.targets[-1] + 1)
    part = slice(begin, begin + window.length)
    tokens[part] = text[: window.length]
    positions[part] = np.arange(window.length)
    segments[part] = number
    # The token before an answer is the last of its question.
    roots.append(begin + spans[window.targets - window.start, 0] - 1)
    begin += window.length
  starts = [np.full(len(w.targets), w.start) for w in found]
  return QuestionRow(
    tokens,
    positions,
    segments,
    np.concatenate(roots).astype(np.int32),
    np.concatenate([w.targets for w in found]),
    np.concatenate(starts),
  )
