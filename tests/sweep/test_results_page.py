"""What the page of many runs makes of their rows."""

import pytest

from behaviorlm_jax.sweep import results_page
from behaviorlm_jax.sweep import rows as rows_lib


def test_the_report_has_the_mean_of_differences_over_all_seeds(tmp_path):
  rows = rows_lib.read_folder(tmp_path)
  for seeds, change, low, high in (
    ('0', 0.3, 0.1, 0.5),
    ('1 2', 0.0, -1, 1),
    ('3', -0.1, None, None),
  ):
    rows.add(
      'differences.csv',
      data='log',
      method='a',
      control='b',
      metric='accuracy',
      seeds=seeds,
      n=1,
      before=0.5,
      change=change,
      low=low,
      high=high,
      settings='',
    )
  ((*names, before, change, parts),) = results_page._differences(rows, 'log').rows
  assert names == ['a', 'b', 'accuracy']
  assert (before, change) == pytest.approx((0.5, 0.05))
  assert parts == (
    '0: +0.300 (+0.100 to +0.500); 1, 2: +0.000 (-1.000 to +1.000); 3: -0.100'
  )


def test_a_mean_of_fewer_seeds_than_its_table_has_names_them(tmp_path):
  rows = rows_lib.read_folder(tmp_path)
  for seed, metric, value in (
    (0, 'accuracy@1', 0.2),
    (1, 'accuracy@1', 0.4),
    (2, 'accuracy@1', 0.6),
    (1, 'nll', 2.0),
    (2, 'nll', 3.0),
  ):
    rows.add(
      'results.csv',
      data='log',
      method='a',
      seed=seed,
      group='all',
      metric=metric,
      value=value,
      n=5,
      settings='',
    )
  (table,) = results_page._tables(
    rows,
    'log',
    ('a',),
    (('all', 'accuracy@1'), ('all', 'nll'), ('tail', 'f1_macro')),
    'caption',
  )
  assert table.rows == [('a', 15, '0.400 ± 0.200', '2.500 ± 0.707 (seeds 1, 2)', None)]


def test_lines_of_a_figure_are_means_over_the_seeds_that_all_have(tmp_path):
  rows = rows_lib.read_folder(tmp_path)
  for name, seed, tail in (
    ('a', 0, 0.2),
    ('a', 1, 0.6),
    ('b', 0, 0.3),
    ('c', 0, 0.4),
    ('c', 1, 0.4),
  ):
    rows.add(
      'trade_off.csv',
      data='log',
      method=name,
      seed=seed,
      tau=0.5,
      anchor=0.1,
      tail=tail,
      settings='',
    )
  tails = lambda *drawn: {
    name: line.tolist()
    for name, line in results_page._curves(rows, drawn)['log'].items()
  }
  assert tails('a', 'b') == {'a': [[0.1, 0.2]], 'b': [[0.1, 0.3]]}
  assert tails('a', 'c') == {'a': [[0.1, 0.4]], 'c': [[0.1, 0.4]]}


def test_few_shot_rows_become_a_curve(tmp_path):
  rows = rows_lib.read_folder(tmp_path)
  for name, shots, value in (('b', 5, 0.1), ('b', 50, 0.3), ('one', 5, 0.2)):
    rows.add(
      'results.csv',
      data='log',
      method=f'{name}_{shots}_shots',
      seed=0,
      group='few_shot',
      metric='f1_macro',
      value=value,
      n=9,
      settings='',
    )
  rows.add(
    'trade_off.csv',
    data='log',
    method='b_5_shots',
    seed=0,
    tau=0.0,
    anchor=0.3,
    tail=0.1,
    settings='',
  )
  rows.add(
    'results.csv',
    data='log',
    method='b_5_shots',
    seed=0,
    n=2,
    group='few_shot',
    metric='targets',
    value=7.25,
    settings='',
  )
  rows_lib.write_folder(tmp_path, rows)
  assert results_page._shots(rows_lib.read_folder(tmp_path)) == {
    'log': {'b': {5: 0.1, 50: 0.3}, 'one': {5: 0.2}}
  }
  results_page.write_page(tmp_path, ('b', 'one'), ())
  assert (tmp_path / 'few_shot.png').read_bytes().startswith(b'\x89PNG')
  assert not (tmp_path / 'trade_off.png').exists()  # No curve is asked for.
  assert '| b_5_shots | 9 | 0.100 | 7.250 |' in (tmp_path / 'tables.md').read_text()
