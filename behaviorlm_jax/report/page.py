"""A report as one HTML file that needs nothing else: no network, no library.

Images are inside as data, the style follows the reader's light or dark
setting, tables sort by a click on a column's head, and without JavaScript all
is there to read. `page.html` is the template, which escapes all text; a content
policy lets no script run but `page.js`.
"""

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path

import jinja2

from behaviorlm_jax.report.blocks import Block, shown, Table

FILES = Path(__file__).parent


def html(title: str, blocks: Iterable[Block], folder: Path) -> str:
  """The blocks as one HTML page; images are read from `folder`."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FILES),
    autoescape=True,  # A log or a config may hold anything.
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
  environment.filters |= {
    'kind': lambda part: type(part).__name__,
    'shown': shown,
    'numeric': _numeric,
    'image': lambda path: _base64((folder / path).read_bytes()),
    # Of exactly what stands between the tags; one blank more and it is not run.
    'sha256': lambda text: _base64(hashlib.sha256(text.encode()).digest()),
  }
  environment.tests['amount'] = _is_amount
  return environment.get_template('page.html').render(
    title=title,
    blocks=blocks,
    style=(FILES / 'page.css').read_text(encoding='utf-8'),
    script=(FILES / 'page.js').read_text(encoding='utf-8'),
  )


def _base64(data: bytes) -> str:
  return base64.b64encode(data).decode()


def _numeric(table: Table) -> list[bool]:
  """Whether a column holds nothing but numbers, each as far as it is known."""
  return [
    all(value is None or _is_amount(value) for value in column)
    for column in zip(*table.rows, strict=True)
  ]


def _is_amount(value: object) -> bool:
  # To Python a bool is an int; here it is a sign.
  return isinstance(value, int | float) and not isinstance(value, bool)
