"""Tables: whatever a name holds, the page keeps its columns and lines."""

from behaviorlm_jax.score import tables


def test_text_becomes_one_line_without_markup():
  assert tables.cell('a\n# b') == 'a # b'
  assert tables.cell('x | <b>*\\') == 'x \\| \\<b>\\*\\\\'


def test_a_table_has_a_line_per_row_and_is_empty_without_rows():
  assert tables.table(('a', 'b'), [(1, 'x|y'), (2, None)]) == (
    '| a | b |\n| --- | --- |\n| 1 | x\\|y |\n| 2 | None |'
  )
  assert tables.table(('a', 'b'), []) == ''
