"""The page of many runs: tables.md and its figures, from nothing but rows."""

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from pathlib import Path

import numpy as np

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.evaluate import adjust
from behaviorlm_jax.io import files
from behaviorlm_jax.report import blocks, plots
from behaviorlm_jax.sweep import drawing, few_shot
from behaviorlm_jax.sweep import rows as rows_lib
from behaviorlm_jax.sweep.rows import Row

Column = tuple[str, str]  # (group, metric)
# Columns of each table, and what is said above it.
_SCORES = (
  (
    ('all', 'accuracy@1'),
    ('all', 'precision_weighted'),
    ('anchor', 'f1_macro'),
    ('tail', 'f1_macro'),
    ('all', 'nll'),
  ),
  'mean and, of several seeds, standard deviation; other seeds have other test '
  'events. Tail macro-F1 grows with n: compare it only where n is the same. nll: mean '
  '-log p of what happened, in nats; lower is better.',
)
_FEW = (
  (rows_lib.FEW_SHOT, rows_lib.FEW_TARGETS),
  f'tail behaviors with {few_shot.FROM} training events or more: mean F1, and '
  'targets of each that were taught, on average, again and again or not. markov '
  'counts all training events; what is mixed with it, those that its run could read.',
)
_KNOWN = (rows_lib.RETENTION, 'what each model still knows, on held-out conversations.')
_TRAINING = (
  rows_lib.COST,
  'what training took, both stages: seconds of its steps, and targets.',
)
_CHANGES = (
  'Paired differences on the same test events, the mean over the seeds and then '
  'each by itself. Intervals are of 1,000 redraws of the users, and know nothing of '
  'the chance in training, nor of the machine. What is called matched is adjusted by '
  'the largest tau at which its anchor macro-F1 is that of what it stands against, or '
  'better, or else by that of its best anchors; these very events choose it, once for '
  'all redraws.'
)
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
# What may follow the name of a method: a predictor that is fitted on its own.
_KIND = re.compile(f'_({"|".join(adjust.NAMES)})$')


def write_page(folder: Path, methods: Sequence[str], drawn: Sequence[str]) -> None:
  """Writes tables.md and its figures of the rows in a folder.

  Args:
    methods: names in the order of the tables; others follow.
    drawn: names of those that have a curve in the figure.
  """
  rows, other = rows_lib.without_other_n(rows_lib.read_folder(folder))
  by_log = _grouped(rows.of('results.csv'), 'data')
  if not by_log:
    raise InputError(
      f'{folder} has no results.csv with rows; give the folder of a sweep.'
    )
  differences = _grouped(rows.of('differences.csv'), 'data')
  content = [blocks.Heading(1, 'Results of the runs so far')]
  for log, scores in by_log.items():
    content += [
      blocks.Heading(2, log),
      *_refused(other, log),
      *_tables(scores, methods, *_SCORES),
      *(_tables(scores, methods, *_FEW) if _shots(scores) else ()),
      _differences(differences.get(log, [])),
      *_tables(scores, methods, *_KNOWN),
      *_tables(scores, methods, *_TRAINING),
    ]
  content += _figures(folder, rows, methods, drawn)
  files.write_text(folder / 'tables.md', blocks.markdown(content))


def _refused(other: Mapping[tuple[str, int, str], int], log: str) -> list[blocks.Text]:
  """A sentence on what has another n than the rest of a log."""
  named = [
    f'{method} of seed {seed} (n = {n:,})'
    for (data, seed, method), n in sorted(other.items())
    if data == log
  ]
  text = 'Not compared with the rest, which has another n: '
  return [blocks.Text(f'{text}{", ".join(named)}.')] * bool(named)


def _grouped(rows: Iterable[Row], *columns: str) -> dict[object, list[Row]]:
  """Rows by the value of a column, or the values of several, ascending."""
  key, found = operator.itemgetter(*columns), {}
  for row in rows:
    found.setdefault(key(row), []).append(row)
  return dict(sorted(found.items()))


def _figures(
  folder: Path, rows: rows_lib.Rows, methods: Sequence[str], drawn: Sequence[str]
) -> list[blocks.Block]:
  """Draws what the rows allow."""
  scores = _grouped(rows.of('results.csv'), 'data')
  curves = _grouped(rows.of('trade_off.csv'), 'data')
  marks = partial(_marks, methods=methods)
  # What is drawn, of which rows, and how.
  drawings = (
    (
      _TRADE_OFF,
      curves,
      partial(_curves, drawn=drawn),
      partial(plots.trade_off_curves, taus=adjust.TAUS),
    ),
    (_FEW_SHOT, scores, _shots, drawing.few_shot),
    (_DECILES, scores, partial(_deciles, drawn=drawn), drawing.deciles),
    (
      _RETENTION,
      scores,
      partial(marks, column=rows_lib.RETENTION[0]),
      partial(drawing.marks, x='perplexity, over that of the untuned model', line=1),
    ),
    (
      _COST,  # Seconds of steps; targets are in the table alone.
      scores,
      partial(marks, column=rows_lib.COST[0], unit=60),
      partial(drawing.marks, x='minutes'),
    ),
  )
  content = []
  for figure, by_log, lines, draw in drawings:
    panels = {log: found for log, part in by_log.items() if (found := lines(part))}
    if panels:
      draw(folder / figure.path, panels)
      content.append(figure)
  return content


def _tables(
  rows: Iterable[Row], methods: Sequence[str], columns: Sequence[Column], caption: str
) -> list[blocks.Table]:
  """Tables with a row per method that has one of these columns, of one log.

  One for each set of seeds that a method has, of all methods that have them:
  other seeds have other test events.
  """
  found = [row for row in rows if (row['group'], row['metric']) in columns]
  by_method = _grouped(found, 'method')
  seeds = {
    name: frozenset(row['seed'] for row in part) for name, part in by_method.items()
  }
  head = [f'{group} {metric.replace("_", " ")}' for group, metric in columns]
  # Most seeds first. A method with more seeds than a table shows stands in it with
  # those alone: so all of its rows are of the same test events.
  return [
    blocks.Table(
      ('method', 'n', *head),
      [
        _line(name, by_method[name], columns, shown)
        for name in _ordered(by_method, methods)
        if seeds[name] >= shown
      ],
      f'{_named(shown)}: {caption}',
    )
    for shown in sorted(set(seeds.values()), key=len, reverse=True)
  ]


def _line(
  name: str, rows: Sequence[Row], columns: Sequence[Column], seeds: Set[int]
) -> tuple[object, ...]:
  """A method's row of a table, of these seeds."""
  shown = [row for row in rows if row['seed'] in seeds]
  by_column = _grouped(shown, 'group', 'metric')
  parts = [by_column.get(column, []) for column in columns]
  first = next(filter(None, parts))  # A method here has one column at least.
  count = sum(row['n'] for row in first)
  return name, count, *(_cell(part, seeds) for part in parts)


def _cell(rows: Sequence[Row], seeds: Set[int]) -> str | None:
  """Mean and spread, a row for each seed; says so if some have none."""
  if not rows:
    return None
  values = [row['value'] for row in rows]
  text = f'{np.mean(values):.3f}'
  if len(rows) > 1:
    # Of a sample: the seeds stand for all that might have been taken.
    text += f' ± {np.std(values, ddof=1):.3f}'
  if len(rows) == len(seeds):
    return text
  return f'{text} ({_named({row["seed"] for row in rows}).lower()})'


def _named(seeds: Set[int]) -> str:
  return ('Seed ' if len(seeds) == 1 else 'Seeds ') + ', '.join(map(str, sorted(seeds)))


def _ordered(names: Iterable[str], methods: Sequence[str]) -> list[str]:
  """In the order of the methods, what is fitted on one behind it, others last."""
  places = {method: i for i, method in enumerate(methods)}
  place = lambda name: places.get(_KIND.sub('', name), len(places))
  return sorted(names, key=lambda name: (place(name), name))


def _differences(rows: Iterable[Row]) -> blocks.Table:
  """Of one log, a row per pair and score."""
  return blocks.Table(
    ('method', 'against', 'score', 'its score', 'change', 'by seeds (95 % interval)'),
    [
      (
        *names,
        _over_seeds(parts, 'before'),
        _over_seeds(parts, 'change'),
        '; '.join(map(_one_difference, parts)),
      )
      for names, parts in _grouped(rows, 'method', 'control', 'metric').items()
    ],
    _CHANGES,
  )


def _over_seeds(rows: Sequence[Row], column: str) -> float:
  """The mean over seeds; a row may be that of several."""
  # As if each of its seeds had a row of its own.
  weights = [len(row['seeds'].split()) for row in rows]
  return float(np.average([row[column] for row in rows], weights=weights))


def _one_difference(row: Row) -> str:
  text = f'{row["seeds"].replace(" ", ", ")}: {row["change"]:+.3f}'
  if row['low'] is None:  # A single user.
    return text
  return f'{text} ({row["low"]:+.3f} to {row["high"]:+.3f})'


def _curves(rows: Iterable[Row], drawn: Sequence[str]) -> dict[str, np.ndarray]:
  """{method: anchor and tail float [T, 2]}, means over the seeds."""
  both = lambda row: (row['anchor'], row['tail'])
  lines = _lines(rows, drawn, lambda row: row['tau'], both)
  return {name: np.array(list(points.values())) for name, points in lines.items()}


def _deciles(
  rows: Iterable[Row], drawn: Sequence[str]
) -> dict[str, dict[int, np.ndarray]]:
  """{method: {decile: mean F1}}."""
  found = [row for row in rows if row['group'] in rows_lib.DECILES]
  tenth = lambda row: rows_lib.DECILES[row['group']]
  return _lines(found, drawn, tenth, lambda row: row['value'])


def _lines(
  rows: Iterable[Row],
  drawn: Sequence[str],
  x: Callable[[Row], float],
  y: Callable[[Row], object],
) -> dict[str, dict[float, np.ndarray]]:
  """{method: {x: mean y}}, over the seeds that all lines have."""
  by_method = _grouped([row for row in rows if row['method'] in drawn], 'method')
  # Other seeds have other test events, and lines are to be compared.
  seeds = [{row['seed'] for row in found} for found in by_method.values()]
  common = set.intersection(*seeds) if seeds else set()
  return {
    name: _means((x(row), y(row)) for row in by_method[name] if row['seed'] in common)
    for name in drawn
    if common and name in by_method
  }


def _means(points: Iterable[tuple[float, object]]) -> dict[float, np.ndarray]:
  """{x: mean of its ys}, x ascending."""
  found = {}
  for x, y in points:
    found.setdefault(x, []).append(y)
  return {x: np.mean(found[x], axis=0) for x in sorted(found)}


def _marks(
  rows: Iterable[Row], methods: Sequence[str], column: Column, unit: float = 1
) -> dict[str, list[float]]:
  """{method: values of a column in `unit`s, a seed each}.

  Without the untuned model, whose ratio of perplexities is 1.
  """
  by_column = _grouped(rows, 'group', 'metric')
  by_method = _grouped(by_column.get(column, []), 'method')
  return {
    name: [row['value'] / unit for row in by_method[name]]
    for name in _ordered(by_method, methods)
    if name != 'untuned'
  }


def _shots(rows: Iterable[Row]) -> dict[str, dict[int, np.ndarray]]:
  """{line: {shots: mean F1}} of methods called NAME_N_shots.

  What is adjusted is a line of its own; what is mixed is not drawn.
  """
  lines = {}
  for row in rows:
    match = re.fullmatch(r'(.+)_(\d+)_shots(_adjusted)?', row['method'])
    if match and (row['group'], row['metric']) == rows_lib.FEW_SHOT:
      line = match[1] + (match[3] or '')
      lines.setdefault(line, []).append((int(match[2]), row['value']))
  return {name: _means(points) for name, points in lines.items()}
