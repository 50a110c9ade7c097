"""What the page of many runs makes of their rows."""

import pytest

from behaviorlm_jax.sweep import results_page
from behaviorlm_jax.sweep import rows as rows_lib

ROW = {'data': 'log', 'method': 'a', 'seed': 0, 'n': 5, 'settings': ''}


def test_the_report_has_the_mean_of_differences_over_all_seeds():
  named = ROW | {'control': 'b', 'metric': 'accuracy', 'before': 0.5}
  rows = [
    named | {'seeds': seeds, 'change': change, 'low': low, 'high': high}
    for seeds, change, low, high in (
      ('0', 0.3, 0.1, 0.5),
      ('1 2', 0.0, -1, 1),
      ('3', -0.1, None, None),
    )
  ]
  ((*names, before, change, parts),) = results_page._differences(rows).rows
  assert names == ['a', 'b', 'accuracy']
  assert (before, change) == pytest.approx((0.5, 0.05))
  assert parts == (
    '0: +0.300 (+0.100 to +0.500); 1, 2: +0.000 (-1.000 to +1.000); 3: -0.100'
  )


def test_a_mean_of_fewer_seeds_than_its_table_has_names_them():
  rows = [
    ROW | {'seed': seed, 'group': 'all', 'metric': metric, 'value': value}
    for metric, values in (
      ('accuracy@1', {0: 0.2, 1: 0.4, 2: 0.6}),
      ('nll', {1: 2.0, 2: 3.0}),
    )
    for seed, value in values.items()
  ]
  columns = ('all', 'accuracy@1'), ('all', 'nll'), ('tail', 'f1_macro')
  (table,) = results_page._tables(rows, ('a',), columns, 'caption')
  assert table.rows == [('a', 15, '0.400 ± 0.200', '2.500 ± 0.707 (seeds 1, 2)', None)]


def test_what_is_fitted_on_a_method_stands_behind_it():
  names = ['markov', 'a_mixed_adjusted', 'b', 'a_b', 'a', 'a_b_mixed', 'b_adjusted']
  assert results_page._ordered(names, ('b', 'a', 'a_b')) == (
    ['b', 'b_adjusted', 'a', 'a_mixed_adjusted', 'a_b', 'a_b_mixed', 'markov']
  )


def test_lines_of_a_figure_are_means_over_the_seeds_that_all_have():
  rows = [
    ROW | {'method': name, 'seed': seed, 'tau': 0.5, 'anchor': 0.1, 'tail': tail}
    for name, tails in (('a', (0.2, 0.6)), ('b', (0.3,)), ('c', (0.4, 0.4)))
    for seed, tail in enumerate(tails)
  ]
  tails = lambda *drawn: {
    name: line.tolist() for name, line in results_page._curves(rows, drawn).items()
  }
  assert tails('a', 'b') == {'a': [[0.1, 0.2]], 'b': [[0.1, 0.3]]}
  assert tails('a', 'c') == {'a': [[0.1, 0.4]], 'c': [[0.1, 0.4]]}


def test_few_shot_rows_become_a_curve(tmp_path):
  rows = rows_lib.read_folder(tmp_path)
  for name, metric, value in (
    ('b_5_shots', 'f1_macro', 0.1),
    ('b_50_shots', 'f1_macro', 0.3),
    ('b_50_shots_mixed', 'f1_macro', 0.4),
    ('one_5_shots_adjusted', 'f1_macro', 0.2),
    ('b_5_shots', 'targets', 7.25),
  ):
    row = ROW | {'method': name, 'group': 'few_shot', 'metric': metric, 'value': value}
    rows.add('results.csv', **row)
  point = {'data': 'log', 'method': 'b_5_shots', 'seed': 0, 'settings': ''}
  rows.add('trade_off.csv', **point, tau=0.0, anchor=0.3, tail=0.1)
  rows_lib.write_folder(tmp_path, rows)
  found = rows_lib.read_folder(tmp_path).of('results.csv')
  assert results_page._shots(found) == {
    'b': {5: 0.1, 50: 0.3},
    'one_adjusted': {5: 0.2},
  }
  results_page.write_page(tmp_path, ('b', 'one'), ())
  assert (tmp_path / 'few_shot.png').read_bytes().startswith(b'\x89PNG')
  assert not (tmp_path / 'trade_off.png').exists()  # No curve is asked for.
  assert '| b_5_shots | 5 | 0.100 | 7.250 |' in (tmp_path / 'tables.md').read_text()
