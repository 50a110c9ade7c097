"""Rows of what many runs say, in three files.

  results.csv      a score of one predictor of one run
  differences.csv  what one predictor changes against another, over some seeds
  trade_off.csv    anchor against tail macro-F1 of one predictor at one tau

A row names its run by log, method and seed, and by `settings`: a hash of all
that its config changes, so that a row of other settings is not taken for it; in
differences those of method/control, none of what any run brings along.
Predictors that are fitted on the validation split are named after what they
stand on: `one_stage_adjusted`. In differences `NAME_matched` is NAME at the
anchor macro-F1 of its control (choices.matched), and `seeds` says which: `0 1`.
"""

import collections
import csv
import dataclasses
import io
from pathlib import Path

from behaviorlm_jax.io import files

# (group, metric) of what evaluate.retention measures.
RETENTION = (('conversations', 'perplexity_ratio'), ('conversations', 'kl_to_base'))
# Training steps alone, of both stages; neither compilation nor scoring.
COST = (('training', 'seconds'), ('training', 'targets'))
# Groups of behaviors by training frequency, the most frequent tenth first.
DECILES = {f'decile_{i}': i for i in range(1, 11)}
# Of tail behaviors that sweep.few_shot would thin, and of runs where it does:
# how many targets of each were taught, on average.
FEW_SHOT = 'few_shot', 'f1_macro'
FEW_TARGETS = 'few_shot', 'targets'
Row = dict[str, str | int | float | None]
# Columns that name a row of each file, and the others.
_FILES = {
  'results.csv': ('data method seed group metric', 'value n settings'),
  'differences.csv': (
    'data method control metric seeds',
    'n before change low high settings',
  ),
  'trade_off.csv': ('data method seed tau', 'anchor tail settings'),
}
_NUMBERS = dict.fromkeys(('seed', 'n'), int) | dict.fromkeys(
  ('value', 'before', 'change', 'low', 'high', 'tau', 'anchor', 'tail'), float
)


@dataclasses.dataclass
class Rows:
  """The rows of the three files, by what names them."""

  tables: dict[str, dict[tuple, Row]]  # {file: {key: row}}

  def add(self, name: str, **row: str | int | float | None) -> None:
    # A row of the same key is replaced: newer results stand for older ones.
    key = tuple(row[column] for column in _FILES[name][0].split())
    self.tables[name][key] = row

  def of(self, name: str) -> list[Row]:
    return list(self.tables[name].values())

  def differences(self, settings: str, **named: str) -> dict[tuple, set[int]]:
    """{key: its seeds, or none where its settings are others} of rows so named."""
    return {
      key: {int(seed) for seed in row['seeds'].split() if row['settings'] == settings}
      for key, row in self.tables['differences.csv'].items()
      if row | named == row
    }


def without_other_n(rows: Rows) -> tuple[Rows, dict[tuple[str, int, str], int]]:
  """Rows of methods with as many test events as most of their log and seed.

  Macro-F1 of the tail grows with n, so the others cannot stand beside them.

  Returns:
    (rows, {(log, seed, method): n} of those that are left out).
  """
  n = {
    (row['data'], row['seed'], row['method']): row['n']
    for row in rows.of('results.csv')
    if (row['group'], row['metric']) == ('all', 'accuracy@1')
  }
  found = collections.defaultdict(collections.Counter)
  for (*place, _), count in n.items():
    found[tuple(place)][count] += 1
  # Of two that are equally common the larger.
  usual = {
    place: max((m, c) for c, m in many.items())[1] for place, many in found.items()
  }
  other = {key: count for key, count in n.items() if count != usual[key[:2]]}
  key_of = lambda row: (row['data'], row.get('seed'), row.get('method'))
  kept = {
    name: {key: row for key, row in table.items() if key_of(row) not in other}
    for name, table in rows.tables.items()
  }
  return Rows(kept), other


def read_folder(folder: Path) -> Rows:
  """The rows that stand in a folder; none where a file is missing."""
  rows = Rows({name: {} for name in _FILES})
  read = lambda column, text: _NUMBERS.get(column, str)(text) if text else None
  for name in _FILES:
    path = folder / name
    if path.is_file():
      with path.open(encoding='utf-8', newline='') as lines:
        for row in csv.DictReader(lines):
          rows.add(name, **{column: read(column, row[column]) for column in row})
  return rows


def write_folder(folder: Path, rows: Rows) -> None:
  """Writes the three files."""
  for name in _FILES:
    text, found = io.StringIO(), rows.tables[name]
    columns = ' '.join(_FILES[name]).split()
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    for key in sorted(found):  # In git, a new run then shows as its own lines.
      writer.writerow({column: _short(found[key][column]) for column in columns})
    files.write_text(folder / name, text.getvalue())


def _short(value: str | int | float | None) -> str | int | None:
  # Further digits differ from machine to machine.
  return f'{value:.6g}' if isinstance(value, float) else value
