"""Rows of many runs: which of them may stand side by side."""

from behaviorlm_jax.sweep import results_page
from behaviorlm_jax.sweep import rows as rows_lib

NAMED = {'data': 'log', 'settings': ''}


def rows_of(folder, n):
  """Rows of {(method, seed): n}."""
  rows = rows_lib.read_folder(folder)
  for (method, seed), count in n.items():
    one = NAMED | {'method': method, 'seed': seed}
    for group, part in (('all', count), ('tail', 3)):
      for metric in ('accuracy@1', 'f1_macro'):
        score = {'group': group, 'metric': metric, 'value': 0.5, 'n': part}
        rows.add('results.csv', **one, **score)
    rows.add('trade_off.csv', **one, tau=0.0, anchor=0.3, tail=0.1)
  return rows


def test_a_method_of_another_n_is_refused_in_one_sentence(tmp_path):
  rows = rows_of(tmp_path, {('a', 0): 400, ('b', 0): 400, ('c', 0): 10_000})
  kept, other = rows_lib.without_other_n(rows)
  assert other == {('log', 0, 'c'): 10_000}
  for name in ('results.csv', 'trade_off.csv'):
    assert {row['method'] for row in kept.of(name)} == {'a', 'b'}
  rows_lib.write_folder(tmp_path, rows)
  results_page.write_page(tmp_path, ('a', 'b', 'c'), ())
  text = (tmp_path / 'tables.md').read_text()
  assert 'Not compared with the rest, which has another n: c of seed 0' in text
  assert '(n = 10,000).' in text and '| a | 400 |' in text and '| c |' not in text


def test_each_seed_has_its_own_n(tmp_path):
  n = {('a', 0): 400, ('b', 0): 400, ('a', 1): 10_000, ('b', 1): 10_000}
  assert rows_lib.without_other_n(rows_of(tmp_path, n))[1] == {}


def test_of_two_that_are_equally_common_the_larger_n_stays(tmp_path):
  rows = rows_of(tmp_path, {('a', 0): 400, ('b', 0): 10_000})
  assert rows_lib.without_other_n(rows)[1] == {('log', 0, 'a'): 400}
