"""What a report says, apart from how it looks; and how it looks in Markdown.

A report is one list of blocks. `markdown` here and `page.html` each turn the
list into a file, so the two files cannot say different things. Blocks hold
plain text: whatever a log or a config brought along is made harmless by the
renderer, and nowhere else.
"""

import dataclasses
import html
import re
from collections.abc import Iterable, Sequence


class Strong(str):
  """Inline text that stands out."""


class Mono(str):
  """A file name or a field, in code type: never text of a log."""


@dataclasses.dataclass(frozen=True)
class Heading:
  level: int  # 1 is the title
  text: str


class Text:
  """A paragraph of inline parts: str, Strong or Mono."""

  def __init__(self, *parts: str, lead: bool = False):
    self.parts = parts
    self.lead = lead  # the paragraph to read if only one is read


@dataclasses.dataclass(frozen=True)
class Listing:
  """Lines shown as they are."""

  text: str


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of str, Mono, bool, int, float (three decimals) or None."""

  head: Sequence[str] = ()
  rows: Sequence[Sequence[object]] = ()
  caption: str = ''

  def __bool__(self) -> bool:
    return bool(self.rows)


@dataclasses.dataclass(frozen=True)
class Figure:
  path: str  # relative to the report
  title: str
  caption: str  # what one sees, of how many
  alt: str  # the same for who cannot see it
  wide: bool = False  # needs the whole width of a page


@dataclasses.dataclass(frozen=True)
class Details:
  """Blocks that a reader opens when they want them."""

  summary: str
  blocks: list['Block']


Block = Heading | Text | Listing | Table | Figure | Details


def shown(value: object) -> str:
  """A table's value as text."""
  if value is None:
    return '-'
  if isinstance(value, bool):
    return '✓' if value else '✗'
  if isinstance(value, int):
    return f'{value:,}'
  return f'{value:.3f}' if isinstance(value, float) else str(value)


def markdown(blocks: Iterable[Block]) -> str:
  """The blocks as one Markdown text."""
  return '\n\n'.join(_markdown(block) for block in blocks) + '\n'


def _markdown(block: Block) -> str:
  match block:
    case Heading(level, text):
      # Signs at the end of a heading would be taken for its end.
      return '#' * level + ' ' + escape(text).replace('#', '\\#')
    case Text():
      return ''.join(map(_inline, block.parts))
    case Listing(text):
      # Indented: the only code block that no text can close.
      return '\n'.join('    ' + line for line in text.splitlines())
    case Table(head, rows, caption):
      lines = [_row(map(_inline, line)) for line in (head, *rows)]
      lines.insert(1, _row(['---'] * len(head)))
      return (escape(caption) + '\n\n' if caption else '') + '\n'.join(lines)
    case Figure(path, title, caption, alt):
      return f'![{escape(alt)}]({path})\n\n**{escape(title)}.** {escape(caption)}'
    case Details(summary, inner):
      summary = f'<summary>{html.escape(summary)}</summary>'
      return f'<details>\n{summary}\n\n{markdown(inner)}\n</details>'
  raise AssertionError(block)


def _row(cells: Iterable[str]) -> str:
  return '| ' + ' | '.join(cells) + ' |'


def _inline(part: object) -> str:
  """A part of a Text, or a cell of a Table."""
  if isinstance(part, Strong):
    return f'**{escape(part)}**'
  return f'`{part}`' if isinstance(part, Mono) else escape(shown(part))


def escape(text: str) -> str:
  """Text made harmless in Markdown: one line, no markup, no column break."""
  text = re.sub(r'\s*[\r\n]\s*', ' ', text)
  for character in '\\`*~&[]<|':
    text = text.replace(character, '\\' + character)
  return re.sub(r'(?<!\w)_|_(?!\w)', r'\\_', text)  # a_b is no markup.
