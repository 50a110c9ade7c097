"""The page of many runs: tables.md and its figures, from nothing but rows."""

import re
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

import numpy as np

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.evaluate import adjust
from behaviorlm_jax.io import files
from behaviorlm_jax.report import blocks, plots
from behaviorlm_jax.sweep import few_shot
from behaviorlm_jax.sweep import rows as rows_lib

SCORES = (
  ('all', 'accuracy@1'),
  ('all', 'precision_weighted'),
  ('anchor', 'f1_macro'),
  ('tail', 'f1_macro'),
  ('all', 'nll'),
)  # Of the main table.
Column = tuple[str, str]  # (group, metric)


def write_page(folder: Path, methods: Sequence[str], drawn: Sequence[str]) -> None:
  """Writes tables.md and its figures of the rows in a folder.

  Args:
    folder: of the rows.
    methods: names in the order of the tables; others follow.
    drawn: names of those that have a curve in the figure.
  """
  rows = rows_lib.read_folder(folder)
  if not rows.of('results.csv'):
    raise InputError(
      f'{folder} has no results.csv with rows; give the folder of a sweep.'
    )
  content = [blocks.Heading(1, 'Results of the runs so far')]
  for log in sorted({row['data'] for row in rows.of('results.csv')}):
    content += [
      blocks.Heading(2, log),
      *_tables(
        rows,
        log,
        methods,
        SCORES,
        'mean and, of several seeds, '
        'standard deviation; other seeds have other test events. nll: '
        'mean -log p of what happened, in nats; lower is better.',
      ),
      *(
        _tables(
          rows,
          log,
          methods,
          (rows_lib.FEW_SHOT, rows_lib.FEW_TARGETS),
          f'tail behaviors with {few_shot.FROM} training events '
          'or more: mean F1, and targets of each that were taught, on '
          'average, again and again or not. markov counts all training '
          'events; what is mixed with it, those that its run could read.',
        )
        if _shots(rows)
        else ()
      ),
      _differences(rows, log),
      *_tables(
        rows,
        log,
        methods,
        rows_lib.RETENTION,
        'what each model still knows, on held-out conversations.',
      ),
      *_tables(
        rows,
        log,
        methods,
        rows_lib.COST,
        'what training took, both stages: seconds of its steps, and targets.',
      ),
    ]
  content += _figures(folder, rows, methods, drawn)
  files.write_text(folder / 'tables.md', blocks.markdown(content))


def _figures(
  folder: Path, rows: rows_lib.Rows, methods: Sequence[str], drawn: Sequence[str]
) -> list[blocks.Block]:
  """Draws what the rows allow."""
  retention = {  # That of the untuned model is 1.
    log: others
    for log, found in _marks(rows, methods, rows_lib.RETENTION[0]).items()
    if (others := {name: found[name] for name in found if name != 'untuned'})
  }
  # Seconds of steps, the first of COST; its targets are in the table alone.
  minutes = {
    log: {name: [seconds / 60 for seconds in found[name]] for name in found}
    for log, found in _marks(rows, methods, rows_lib.COST[0]).items()
  }
  ratio = 'perplexity, over that of the untuned model'
  drawings = (
    (
      _curves(rows, drawn),
      lambda path, panels: plots.trade_off_curves(path, panels, adjust.TAUS),
      _TRADE_OFF,
    ),
    (_shots(rows), plots.few_shot, _FEW_SHOT),
    (_deciles(rows, drawn), plots.deciles, _DECILES),
    (retention, lambda path, panels: plots.marks(path, panels, ratio, 1), _RETENTION),
    (minutes, lambda path, panels: plots.marks(path, panels, 'minutes'), _COST),
  )
  content = []
  for panels, draw, figure in drawings:
    if panels:
      draw(folder / figure.path, panels)
      content.append(figure)
  return content


_TRADE_OFF = blocks.Figure(
  'trade_off.png',
  'Anchors against tail',
  f'Each curve raises or lowers rare names, tau from {adjust.TAUS[0]} to '
  f'{adjust.TAUS[-1]}, on average over the seeds that all have; the large mark is the '
  'predictor as it is. Further up and right is better at every balance.',
  'Curves of tail against anchor macro-F1.',
)
_FEW_SHOT = blocks.Figure(
  'few_shot.png',
  'Learning from few samples',
  f'Mean F1 of the tail behaviors with {few_shot.FROM} training events or more, by how '
  'many samples of each there were to learn from; on average over the seeds.',
  'Lines of F1 against the number of samples.',
)
_DECILES = blocks.Figure(
  'deciles.png',
  'F1 by frequency',
  'Mean F1 of each tenth of the behaviors, ordered by their training events; on '
  'average over the seeds that all have.',
  'Lines of F1 per decile.',
)
_RETENTION = blocks.Figure(
  'retention.png',
  'Conversations held out of training',
  'Perplexity of each model over that of the untuned one, a mark per seed; right of 1 '
  'it has lost something.',
  'Marks of the ratio of perplexities per method.',
)
_COST = blocks.Figure(
  'cost.png',
  'Minutes of training',
  'Of the steps of both stages, a mark per seed: neither compilation nor scoring. '
  'Whatever ran beside them or on another machine shows here, too.',
  'Marks of the minutes of training per method.',
)


def _tables(
  rows: rows_lib.Rows,
  log: str,
  methods: Sequence[str],
  columns: Sequence[Column],
  caption: str,
) -> list[blocks.Table]:
  """Tables with a row per method that has one of these (group, metric) columns.

  One for each set of seeds that a method has, of all methods that have them:
  other seeds have other test events.
  """
  values = {}  # {method: {column: {seed: row}}}
  for row in rows.of('results.csv'):
    column = row['group'], row['metric']
    if row['data'] == log and column in columns:
      values.setdefault(row['method'], {}).setdefault(column, {})[row['seed']] = row
  seeds = {name: frozenset().union(*found.values()) for name, found in values.items()}
  # Most seeds first. A method with more seeds than a table shows stands in it with
  # those alone: so all of its rows are of the same test events.
  return [
    _table(
      {
        name: values[name]
        for name in sorted(values, key=lambda n: _place(n, methods))
        if seeds[name] >= shown
      },
      shown,
      columns,
      caption,
    )
    for shown in sorted(set(seeds.values()), key=len, reverse=True)
  ]


def _table(
  values: Mapping[str, Mapping[Column, Mapping[int, rows_lib.Row]]],
  seeds: Set[int],
  columns: Sequence[Column],
  caption: str,
) -> blocks.Table:
  """`values`: {method: {column: {seed: row}}}, of which `seeds` are shown."""
  shown = []
  for name, found in values.items():
    found = [
      {
        seed: found[column][seed]
        for seed in sorted(seeds)
        if seed in found.get(column, {})
      }
      for column in columns
    ]
    first = next(filter(None, found))  # A method here has one column at least.
    shown.append(
      (
        name,
        sum(row['n'] for row in first.values()),
        *(_cell(part, seeds) for part in found),
      )
    )
  head = [f'{group} {metric.replace("_", " ")}' for group, metric in columns]
  return blocks.Table(('method', 'n', *head), shown, f'{_named(seeds)}: {caption}')


def _cell(part: Mapping[int, rows_lib.Row], seeds: Set[int]) -> str | None:
  """Mean and spread of {seed: row}; says so if it is not of all `seeds`."""
  if not part:
    return None
  text = _spread([row['value'] for row in part.values()])
  return text if len(part) == len(seeds) else f'{text} ({_named(part).lower()})'


def _named(seeds: Set[int] | Mapping[int, object]) -> str:
  return ('Seed ' if len(seeds) == 1 else 'Seeds ') + ', '.join(map(str, sorted(seeds)))


def _spread(values: Sequence[float]) -> str:
  if len(values) == 1:
    return f'{values[0]:.3f}'
  # Of a sample: the seeds stand for all that might have been taken.
  return f'{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}'


def _place(name: str, methods: Sequence[str]) -> tuple[int, str]:
  """Sorts a method's variants behind it."""
  found = [
    i
    for i, method in enumerate(methods)
    if name == method or name.startswith(f'{method}_')
  ]
  # Where one method's name begins with another's, a variant is of the longer one.
  longest = max(found, key=lambda i: len(methods[i]), default=len(methods))
  return longest, name


def _differences(rows: rows_lib.Rows, log: str) -> blocks.Table:
  found = {}
  for row in rows.of('differences.csv'):
    if row['data'] == log:
      found.setdefault((row['method'], row['control'], row['metric']), []).append(row)
  return blocks.Table(
    ('method', 'against', 'score', 'its score', 'change', 'by seeds (95 % interval)'),
    [
      (
        *names,
        _over_seeds(parts, 'before'),
        _over_seeds(parts, 'change'),
        '; '.join(map(_one_difference, parts)),
      )
      for names, parts in found.items()
    ],
    'Paired differences on the same test events, the mean over the seeds and '
    'then each by itself. Intervals are of 1,000 redraws of the users, and '
    'know nothing of the chance in training, nor of the machine. What is '
    'called matched is adjusted by the largest tau at which its anchor '
    'macro-F1 is that of what it stands against, or better, or else by that '
    'of its best anchors; these very events choose it, once for all redraws.',
  )


def _over_seeds(parts: Sequence[rows_lib.Row], column: str) -> float:
  """The mean over seeds; a row may be that of several."""
  return float(
    np.average(
      [row[column] for row in parts],
      # As if each of its seeds had a row of its own.
      weights=[len(row['seeds'].split()) for row in parts],
    )
  )


def _one_difference(row: rows_lib.Row) -> str:
  text = f'{row["seeds"].replace(" ", ", ")}: {row["change"]:+.3f}'
  if row['low'] is None:  # A single user.
    return text
  return f'{text} ({row["low"]:+.3f} to {row["high"]:+.3f})'


def _curves(
  rows: rows_lib.Rows, drawn: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
  """{log: {method: float [T, 2]}}, means over the seeds."""
  return {
    log: {
      name: np.array([np.mean(points[tau], axis=0) for tau in sorted(points)])
      for name, points in lines.items()
    }
    for log, lines in _lines(
      rows.of('trade_off.csv'),
      drawn,
      lambda row: row['tau'],
      lambda row: (row['anchor'], row['tail']),
    ).items()
  }


def _deciles(
  rows: rows_lib.Rows, drawn: Sequence[str]
) -> dict[str, dict[str, dict[int, float]]]:
  """{log: {method: {decile: mean F1}}}."""
  lines = _lines(
    [row for row in rows.of('results.csv') if row['group'] in rows_lib.DECILES],
    drawn,
    lambda row: rows_lib.DECILES[row['group']],
    lambda row: row['value'],
  )
  return {
    log: {
      name: {i: float(np.mean(points[i])) for i in sorted(points)}
      for name, points in lines[log].items()
    }
    for log in lines
  }


def _lines(
  rows: Sequence[rows_lib.Row],
  drawn: Sequence[str],
  x: Callable[[rows_lib.Row], float],
  y: Callable[[rows_lib.Row], object],
) -> dict[str, dict[str, dict[float, list]]]:
  """{log: {method: {x: [y of each seed]}}}, of the seeds that all lines have."""
  found = {}
  for row in rows:
    if row['method'] in drawn:
      found.setdefault(row['data'], {}).setdefault(row['method'], {}).setdefault(
        row['seed'], []
      ).append(row)
  lines = {}
  for log, seeds in sorted(found.items()):
    # Other seeds have other test events, and lines are to be compared.
    common = set.intersection(*map(set, seeds.values()))
    if common:
      lines[log] = {name: {} for name in drawn if name in seeds}
    for name, points in lines.get(log, {}).items():
      for row in (row for seed in common for row in seeds[name][seed]):
        points.setdefault(x(row), []).append(y(row))
  return lines


def _marks(
  rows: rows_lib.Rows, methods: Sequence[str], column: Column
) -> dict[str, dict[str, list[float]]]:
  """{log: {method: values of a (group, metric), a seed each}}."""
  found = {}
  for row in rows.of('results.csv'):
    if (row['group'], row['metric']) == column:
      values = found.setdefault(row['data'], {})
      values.setdefault(row['method'], []).append(row['value'])
  return {
    log: {
      name: values[name] for name in sorted(values, key=lambda n: _place(n, methods))
    }
    for log, values in sorted(found.items())
  }


def _shots(rows: rows_lib.Rows) -> dict[str, dict[str, dict[int, float]]]:
  """{log: {method: {shots: mean F1}}} of methods called NAME_N_shots."""
  found = {}
  for row in rows.of('results.csv'):
    # What follows names a variant, such as _adjusted, with a line of its own.
    match = re.fullmatch(r'(.+)_(\d+)_shots(.*)', row['method'])
    if match and (row['group'], row['metric']) == rows_lib.FEW_SHOT:
      lines = found.setdefault(row['data'], {}).setdefault(match[1] + match[3], {})
      lines.setdefault(int(match[2]), []).append(row['value'])
  return {
    log: {
      name: {shots: float(np.mean(values[shots])) for shots in sorted(values)}
      for name, values in lines.items()
      if 'mixed' not in name
    }
    for log, lines in found.items()
  }
