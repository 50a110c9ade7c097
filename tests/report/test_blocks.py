"""Blocks in Markdown: whatever a name holds, the page keeps its shape."""

from behaviorlm_jax.report import blocks
from behaviorlm_jax.report.blocks import Mono, Strong, Table, Text


def test_text_becomes_one_line_without_markup():
  assert blocks.escape('a\n# b') == 'a # b'
  assert blocks.escape('x | <b>*\\') == 'x \\| \\<b>\\*\\\\'
  assert blocks.escape('a_b _c_ _') == 'a_b \\_c\\_ \\_'
  assert blocks.escape('[a](b) `c`') == '\\[a\\](b) \\`c\\`'


def test_values_of_a_table_are_written_by_type():
  table = Table(('a', 'b'), [(1234, 'x|y'), (None, 0.5), (True, Mono('f/'))])
  assert blocks.markdown([table]) == (
    '| a | b |\n| --- | --- |\n| 1,234 | x\\|y |\n| - | 0.500 |\n| ✓ | `f/` |\n'
  )


def test_a_table_without_rows_is_nothing_to_show():
  assert not Table(('a',), [])


def test_inline_parts_keep_their_spaces_and_their_kind():
  text = Text('the ', Strong('a*b'), ' in ', Mono('a/b.json'), '\nand on')
  assert blocks.markdown([text]) == 'the **a\\*b** in `a/b.json` and on\n'


def test_no_line_of_a_listing_leaves_it():
  text = blocks.markdown([blocks.Listing('a\r# b\n```\n\u2028c')])
  assert all(line.startswith('    ') for line in text.splitlines())
