"""A report as one HTML file that needs nothing else: no network, no library.

Images are inside as data, the style follows the reader's light or dark
setting, tables sort by a click on a column's head, and without JavaScript all
is there to read. Text is escaped here, and a content policy lets no script run
but the one below.
"""

import base64
import hashlib
import itertools
from collections.abc import Iterable
from html import escape
from pathlib import Path

from behaviorlm_jax.report.blocks import (
  Block,
  Details,
  Figure,
  Heading,
  Listing,
  Mono,
  shown,
  Strong,
  Table,
  Text,
)

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5a5a5a;
  --line: #d5d5d5; --paper: #ffffff; --tint: #f3f6f9; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a8a8a8;
  --line: #444444; --paper: #161616; --tint: #22262b; --mark: #56b4e9; } }
body { margin: 0 auto; padding: 1rem 1.25rem 4rem; max-width: 68rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { line-height: 1.2; } h2 { margin-top: 2.6rem; }
h2 { border-bottom: 1px solid var(--line); }
p, figcaption, caption { max-width: min(75ch, calc(100vw - 3rem)); }
.lead { border-left: .3rem solid var(--mark); background: var(--tint);
  padding: .8rem 1.1rem; font-size: 1.06rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: .9rem; overflow-wrap: normal; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--soft); vertical-align: bottom; }
tbody th { font-weight: normal; min-width: 6rem; }
tbody tr:hover { background: var(--tint); }
.number { text-align: right; } td.number { white-space: nowrap; }
thead .number { max-width: 7.5rem; }
th button { all: unset; cursor: pointer; font: inherit; font-weight: bold; }
th button:focus-visible { outline: 2px solid var(--mark); }
th button::after { content: ' \\2195'; color: var(--soft); }
[aria-sort=ascending] button::after { content: ' \\25b2'; }
[aria-sort=descending] button::after { content: ' \\25bc'; }
.figures { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; } figure.wide { grid-column: 1 / -1; }
img { max-width: 100%; height: auto; background: #ffffff; }
figcaption { font-size: .9rem; color: var(--soft); }
figcaption strong { color: var(--ink); }
pre { background: var(--tint); padding: .6rem .9rem; overflow-x: auto; }
summary { cursor: pointer; color: var(--mark); }
"""

# A column of numbers starts with the largest, one of text with A; a second
# click turns it round. Rows without a value stay last. Buttons are made here,
# so that without JavaScript no head pretends to do something.
SCRIPT = """
'use strict';
const value = (row, column) => {
  const cell = row.cells[column];
  const text = cell.dataset.value ?? cell.textContent;
  return text === '' || Number.isNaN(Number(text)) ? text : Number(text);
};
const compare = (a, b) => typeof a === 'number' && typeof b === 'number'
  ? a - b : String(a).localeCompare(String(b), 'en', {numeric: true});
const sort = (body, column, sign) => {
  const rows = [...body.rows];
  const missing = row => value(row, column) === '';
  rows.sort((a, b) => missing(a) - missing(b)
    || sign * compare(value(a, column), value(b, column)));
  body.append(...rows);
};
for (const table of document.querySelectorAll('table.sorts')) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    head.append(button);
    const number = head.classList.contains('number');
    const orders = ['ascending', 'descending'];
    const first = orders[Number(number)], second = orders[Number(!number)];
    button.addEventListener('click', () => {
      const now = head.getAttribute('aria-sort');
      const order = now === first ? second : first;
      for (const other of heads) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', order);
      sort(body, column, order === 'ascending' ? 1 : -1);
    });
  });
}
"""


def html(title: str, blocks: Iterable[Block], folder: Path) -> str:
  """The blocks as one HTML page; images are read from `folder`."""
  return '\n'.join(
    [
      '<!DOCTYPE html>',
      '<html lang="en">',
      '<head>',
      '<meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      '<meta http-equiv="Content-Security-Policy" content="default-src '
      f"'none'; img-src data:; style-src {_hash(STYLE)}; "
      f'script-src {_hash(SCRIPT)}">',
      f'<title>{escape(title)}</title>',
      f'<style>{STYLE}</style>',
      '</head>',
      '<body>',
      _body(blocks, folder),
      f'<script>{SCRIPT}</script>',
      '</body>',
      '</html>',
      '',
    ]
  )


def _hash(text: str) -> str:
  """Source expression of a content policy for an inline script or style."""
  # Of exactly what stands between the tags; one blank more and it is not run.
  digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
  return f"'sha256-{digest}'"


def _body(blocks: Iterable[Block], folder: Path) -> str:
  parts = []
  # Figures that follow each other share a grid, side by side.
  for figures, group in itertools.groupby(
    blocks, lambda block: isinstance(block, Figure)
  ):
    text = '\n'.join(_html(block, folder) for block in group)
    parts.append(f'<div class="figures">\n{text}\n</div>' if figures else text)
  return '\n'.join(parts)


def _html(block: Block, folder: Path) -> str:
  match block:
    case Heading(level, text):
      return f'<h{level}>{escape(text)}</h{level}>'
    case Text():
      lead = ' class="lead"' if block.lead else ''
      return f'<p{lead}>' + ''.join(map(_inline, block.parts)) + '</p>'
    case Listing(text):
      return f'<pre>\n{escape(text)}</pre>'  # HTML drops one line end.
    case Table():
      return _table(block)
    case Figure():
      return _figure(block, folder)
    case Details(summary, inner):
      return (
        f'<details>\n<summary>{escape(summary)}</summary>\n'
        + _body(inner, folder)
        + '\n</details>'
      )
  raise AssertionError(block)


def _figure(block: Figure, folder: Path) -> str:
  data = base64.b64encode((folder / block.path).read_bytes()).decode()
  wide = ' class="wide"' if block.wide else ''
  return (
    f'<figure{wide}>\n<img alt="{escape(block.alt)}" '
    f'src="data:image/png;base64,{data}">\n<figcaption>'
    f'<strong>{escape(block.title)}.</strong> {escape(block.caption)}'
    '</figcaption>\n</figure>'
  )


def _table(block: Table) -> str:
  numbers = [
    all(_is_number(row[i]) or row[i] is None for row in block.rows)
    for i in range(len(block.head))
  ]
  head = ''.join(
    f'<th scope="col"{_class(number)}>{escape(text)}</th>'
    for text, number in zip(block.head, numbers, strict=True)
  )
  body = '\n'.join(
    '<tr>'
    + ''.join(
      _cell(value, number, first=i == 0)
      for i, (value, number) in enumerate(zip(row, numbers, strict=True))
    )
    + '</tr>'
    for row in block.rows
  )
  caption = block.caption and f'<caption>{escape(block.caption)}</caption>\n'
  sorts = ' class="sorts"' if len(block.rows) > 1 else ''
  # A region that scrolls has to be within reach of the keyboard.
  return (
    f'<div class="scroll" tabindex="0">\n<table{sorts}>\n{caption}'
    f'<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n{body}\n</tbody>\n'
    '</table>\n</div>'
  )


def _cell(value: object, number: bool, first: bool) -> str:
  data = ''
  if value is None or _is_number(value):
    # The script sorts by these: what is shown is rounded, or has commas.
    data = f' data-value="{"" if value is None else value}"'
  tag = 'th scope="row"' if first else 'td'
  text = _inline(value) if isinstance(value, Mono) else escape(shown(value))
  return f'<{tag}{_class(number)}{data}>{text}</{tag[:2]}>'


def _class(number: bool) -> str:
  return ' class="number"' if number else ''


def _is_number(value: object) -> bool:
  # To Python a bool is an int; here it is a sign.
  return isinstance(value, int | float) and not isinstance(value, bool)


def _inline(part: str) -> str:
  if isinstance(part, Strong):
    return f'<strong>{escape(part)}</strong>'
  if isinstance(part, Mono):
    return f'<code>{escape(part)}</code>'
  return escape(part)
