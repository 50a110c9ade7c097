"""The drawing of the report's figures: arrays in, one PNG file out.

Drawn with matplotlib's Agg canvas through the object interface, so no global
state and no display is touched. Colours are Okabe and Ito's, which colour-
blind readers can tell apart; groups differ by marker, line or hatch as well.
Figures are WIDTH inches wide, so that their text can still be read where two
stand side by side on a page, or WIDE where they have the page to themselves.
Behavior names are shown as they are: never read as mathematical text.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from behaviorlm_jax.report.verdict import Change

DPI = 150
WIDTH = 6.4
WIDE = 10.2
COLOURS = {'anchor': '#0072B2', 'tail': '#D55E00', 'all': '#009E73'}
MARKERS = {'anchor': 'o', 'tail': '^', 'all': 's'}
HATCHES = {'anchor': '', 'tail': '//', 'all': '..'}
# Of predictors side by side, told apart by line and mark, too.
PREDICTORS = (
  ('#0072B2', 'o', '-'),
  ('#D55E00', '^', '--'),
  ('#009E73', 's', '-.'),
  ('#CC79A7', 'D', ':'),
  ('#000000', 'v', '-'),
  ('#E69F00', 'P', '--'),
)
DIFFICULTY = {
  'nll': '-log p of the true behavior (nats)',
  'error': '1 - p of the true behavior',
  'margin': 'lead of the best other behavior (nats)',
}
MOST_NAMES = 40  # behaviors whose names still fit below an axis
LONGEST_NAME = 24


def stage_bars(
  path: Path, labels: Sequence[str], series: Mapping[tuple[str, str], Sequence[float]]
) -> None:
  """Bars side by side per stage.

  Args:
    labels: names of the stages, left to right.
    series: {(group, legend text): values, one per stage}.
  """
  figure, (axes,) = _figure(1, height=4)
  width = 0.8 / len(series)
  for index, ((group, text), values) in enumerate(series.items()):
    # Bars of one stage stand side by side around its tick.
    x = np.arange(len(labels)) + (index - (len(series) - 1) / 2) * width
    bars = axes.bar(
      x,
      values,
      width * 0.92,
      label=text,
      color=COLOURS[group],
      hatch=HATCHES[group],
      edgecolor='white',
      linewidth=0,
    )
    axes.bar_label(bars, fmt='%.3f', fontsize=7, padding=1)
  axes.set_xticks(range(len(labels)), labels)
  axes.set_xlabel('stage, in the order of the run')
  axes.set_ylabel('score on the test split (fraction)')
  axes.margins(y=0.12)
  _legend(figure, axes)
  _save(figure, path)


def change_intervals(path: Path, panels: Mapping[str, Sequence[Change]]) -> None:
  """Points with 95 % intervals around zero, one panel per comparison.

  Args:
    panels: {against: [change with score, size, interval and outcome]}.
  """
  rows = max(map(len, panels.values()))
  figure, stack = _figure(
    len(panels), height=1 + (0.55 + 0.27 * rows) * len(panels), stacked=True
  )
  for axes, (against, changes) in zip(stack, panels.items(), strict=True):
    for y, change in enumerate(changes):
      group = next((g for g in MARKERS if g in change.score), 'all')
      axes.plot(change.interval, [y, y], color=COLOURS[group], linewidth=1.8)
      axes.plot(
        change.size,
        y,
        MARKERS[group],
        color=COLOURS[group],
        markersize=7,
        markerfacecolor='white' if change.outcome == 'within' else None,
      )
    axes.axvline(0, color='#444444', linewidth=0.9, linestyle=':')
    axes.set_yticks(range(len(changes)), [c.score for c in changes])
    axes.set_ylim(len(changes) - 0.4, -0.6)  # Turned round: the first on top.
    axes.set_title(f'against {against}', fontsize=10, loc='left')
  stack[-1].set_xlabel('change of the score (fraction), 95 % interval')
  _save(figure, path)


def trade_off_curves(
  path: Path, panels: Mapping[str, Mapping[str, np.ndarray]], taus: Sequence[float]
) -> None:
  """Tail against anchor macro-F1, a curve over tau for each predictor.

  Args:
    panels: {title: {predictor: float[T, 2], anchor and tail}}.
    taus: float[T]; the point of 0 has a large mark.
  """
  start = taus.index(0.0)

  def draw(axes: Axes, points: np.ndarray, look: dict[str, str]) -> Line2D:
    (line,) = axes.plot(*points.T, **look, markersize=3, linewidth=1.4)
    # Hollow: where predictors coincide all of their marks are seen.
    axes.plot(
      *points[start], **look, markersize=12, markerfacecolor='none', markeredgewidth=2
    )
    return line

  _curves(path, panels, draw, 'anchor macro-F1 (fraction)', 'tail macro-F1 (fraction)')


def few_shot(
  path: Path, panels: Mapping[str, Mapping[str, Mapping[int, float]]]
) -> None:
  """F1 against the number of samples learned.

  Args:
    panels: {title: {predictor: {samples: F1}}}.
  """

  shots = sorted(
    {n for lines in panels.values() for values in lines.values() for n in values}
  )
  # Doublings are about equal steps; a logarithm alone has no place for 0.
  place = lambda n: np.log2(1 + np.array(list(n)))

  def draw(axes: Axes, values: Mapping[int, float], look: dict[str, str]) -> Line2D:
    axes.set_xticks(place(shots), list(map(str, shots)))
    axes.axhline(0, linewidth=0)  # The axis begins there.
    (line,) = axes.plot(place(values), list(values.values()), **look, markersize=6)
    return line

  _curves(
    path,
    panels,
    draw,
    'samples of each tail behavior (log scale)',
    'mean F1 (fraction)',
  )


def deciles(
  path: Path, panels: Mapping[str, Mapping[str, Mapping[int, float]]]
) -> None:
  """F1 against how frequent behaviors are.

  Args:
    panels: {title: {predictor: {decile: F1}}}, 1 the most frequent tenth.
  """

  def draw(axes: Axes, values: Mapping[int, float], look: dict[str, str]) -> Line2D:
    axes.set_xticks(range(1, 11))
    (line,) = axes.plot(list(values), list(values.values()), **look, markersize=6)
    return line

  _curves(
    path,
    panels,
    draw,
    'tenth of the behaviors, 1 the most frequent',
    'mean F1 (fraction)',
  )


def marks(
  path: Path,
  panels: Mapping[str, Mapping[str, Sequence[float]]],
  x: str,
  line: float | None = None,
) -> None:
  """A mark per seed of each predictor, one below the other.

  Args:
    panels: {title: {predictor: values over the seeds}}.
    x: what they are.
    line: value at which a line is drawn; None: the axis begins at 0.
  """
  # Turned round: y grows upwards, and the first belongs on top.
  names = list(dict.fromkeys(itertools.chain(*panels.values())))[::-1]
  figure, row = _figure(len(panels), height=1.4 + 0.3 * len(names), width=WIDE)
  for axes, (title, found) in zip(row, panels.items(), strict=True):
    for y, name in enumerate(names):
      values = found.get(name, [])
      axes.plot(
        values,
        [y] * len(values),
        MARKERS['all'],
        color=COLOURS['all'],
        markersize=7,
        alpha=0.75,
      )
    if line is None:
      axes.set_xlim(left=0)
    else:
      axes.axvline(line, color='#444444', linewidth=0.9, linestyle=':')
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.grid(axis='y', color='#dddddd', linewidth=0.6)
  _save(figure, path)


def _curves(
  path: Path,
  panels: Mapping[str, Mapping[str, object]],
  draw: Callable[[Axes, object, dict[str, str]], Line2D],
  x: str,
  y: str,
) -> None:
  """Panels in a row; a predictor looks the same in all of them.

  draw: (axes, values of a predictor, look) -> line.
  """
  figure, row = _figure(
    len(panels), height=4.4, width=WIDTH if len(panels) == 1 else WIDE, sharey=False
  )
  names = list(dict.fromkeys(itertools.chain(*panels.values())))
  # Two of more predictors than there are looks share one; the legend has both.
  looks = dict(zip(names, itertools.cycle(PREDICTORS), strict=False))
  lines = {}
  for axes, (title, curves) in zip(row, panels.items(), strict=True):
    for name, values in curves.items():
      look = zip(('color', 'marker', 'linestyle'), looks[name], strict=True)
      lines[name] = draw(axes, values, dict(look))
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.grid(axis='x', color='#dddddd', linewidth=0.6)
  row[0].set_ylabel(y)
  figure.legend(
    [lines[name] for name in names],
    names,
    loc='outside upper center',
    ncols=min(len(names), 3 * len(panels)),
    frameon=False,
    fontsize=9,
  )
  _save(figure, path)


def f1_against_frequency(
  path: Path,
  panels: Mapping[str, np.ndarray],
  train_count: np.ndarray,
  anchor: np.ndarray,
) -> None:
  """One marker per behavior, one panel per stage.

  Args:
    panels: {stage name: F1 float[Y]}.
    train_count: int[Y], training events; 0 is drawn at 0.5.
    anchor: bool[Y].
  """
  figure, row = _figure(len(panels), height=3.9)
  count = np.maximum(np.asarray(train_count, float), 0.5)  # 0 has no logarithm.
  for axes, (name, f1) in zip(row, panels.items(), strict=True):
    means = []
    for group, members in (('anchor', anchor), ('tail', ~anchor)):
      if not members.any():
        continue
      axes.scatter(
        count[members],
        f1[members],
        s=26,
        alpha=0.75,
        linewidth=0,
        marker=MARKERS[group],
        color=COLOURS[group],
        label=group,
      )
      means.append(f'{group} {f1[members].mean():.3f}')
    _decades(axes, count)
    axes.set_ylim(-0.04, 1.04)  # Marks at 0 and 1 are seen whole.
    axes.set_title(f'{name}\nmean: ' + ', '.join(means), fontsize=10)
    axes.set_xlabel('training events (log scale)')
  row[0].set_ylabel('F1 of the behavior (fraction)')
  _legend(figure, row[0])
  _save(figure, path)


def _decades(axes: Axes, count: np.ndarray) -> None:
  """A logarithmic x axis that shows whole decades, in plain numbers."""
  low, high = np.log10([max(count.min(), 1), max(count.max(), 10)])
  axes.set_xscale('log')
  axes.set_xlim(
    min(0.7 * 10 ** np.floor(low), 0.8 * count.min()), 1.4 * 10 ** np.ceil(high)
  )
  axes.set_xticks(10.0 ** np.arange(np.floor(low), np.ceil(high) + 1))
  axes.xaxis.set_major_formatter(EngFormatter(sep=''))  # 10k: it must fit.
  axes.xaxis.set_minor_formatter(NullFormatter())


def difficulty_histogram(
  path: Path, scores: np.ndarray, groups: np.ndarray, name: str = 'nll'
) -> None:
  """Share of each group's candidates by difficulty.

  Args:
    scores: float[n], difficulty of each scored sample.
    groups: str[n], 'anchor' or 'tail'.
    name: key of DIFFICULTY, which score it is.
  """
  figure, (axes,) = _figure(1, height=3.9)
  finite = np.isfinite(scores)
  scores, groups = np.asarray(scores)[finite], np.asarray(groups)[finite]
  edges = np.histogram_bin_edges(scores, 30)  # The same for both groups.
  for group, style in (('anchor', '-'), ('tail', '--')):
    values = scores[groups == group]
    if not len(values):
      continue
    # Shares and not counts: there may be far fewer of one group.
    share = np.histogram(values, edges)[0] / len(values)
    axes.stairs(
      share,
      edges,
      color=COLOURS[group],
      linewidth=1.8,
      linestyle=style,
      label=f'{group}: {len(values):,} samples, mean {values.mean():.3f}',
    )
  axes.set_xlabel(f'difficulty: {DIFFICULTY[name]}')
  axes.set_ylabel('share of the group (fraction)')
  _legend(figure, axes)
  _save(figure, path)


def drawn_targets(
  path: Path, panels: Mapping[str, np.ndarray], names: Sequence[str], anchor: np.ndarray
) -> None:
  """Targets per behavior in the plan of each stage, most frequent first.

  Args:
    panels: {stage name: int[Y], targets per behavior}.
    names: str[Y], already sorted by training frequency, as all arrays here.
    anchor: bool[Y].
  """
  named = len(names) <= MOST_NAMES
  figure, rows = _figure(
    len(panels), height=1.5 * len(panels) + 1 + 1.1 * named, stacked=True, width=WIDE
  )
  x = np.arange(1, len(names) + 1)
  for axes, (stage, counts) in zip(rows, panels.items(), strict=True):
    for group, members in (('anchor', anchor), ('tail', ~anchor)):
      axes.bar(
        x[members],
        counts[members],
        0.85,
        color=COLOURS[group],
        hatch=HATCHES[group] if named else '',
        edgecolor='white',
        linewidth=0,
        label=group,
      )
    if not named and anchor.any() and not anchor.all():
      # Bars too narrow for a hatch: colour must not be the only sign.
      axes.axvline(
        anchor.sum() + 0.5,
        color='#444444',
        linestyle=':',
        linewidth=1,
        label='anchor left of here, tail right',
      )
    axes.set_title(f'{stage}: {counts.sum():,} targets', fontsize=10)
    axes.set_ylabel('targets (count)')
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.set_xlim(0.2, len(names) + 0.8)
  if named:
    rows[-1].set_xticks(
      x,
      [_short(name) for name in names],
      rotation=55,
      ha='right',
      rotation_mode='anchor',
      fontsize=8,
      parse_math=False,
    )
    rows[-1].set_xlabel('behavior, most frequent in training first')
  else:
    rows[-1].set_xlabel('rank of the behavior by training frequency')
  _legend(figure, rows[0])
  _save(figure, path)


def loss_curves(path: Path, panels: Mapping[str, Sequence[Sequence[float]]]) -> None:
  """Training and validation loss by step, one panel per stage.

  Args:
    panels: {stage name: (steps, loss, validation steps, validation loss)}.
  """
  figure, row = _figure(
    len(panels), height=3.6, width=WIDTH if len(panels) == 1 else WIDE
  )
  for axes, (name, curves) in zip(row, panels.items(), strict=True):
    steps, loss, val_steps, val_loss = (np.asarray(c, float) for c in curves)
    axes.plot(
      steps, loss, color=COLOURS['anchor'], alpha=0.35, linewidth=0.9, label='training'
    )
    axes.plot(
      steps,
      _running_mean(loss),
      color=COLOURS['anchor'],
      linewidth=1.8,
      label='training, mean over 5 % of the steps',
    )
    axes.plot(
      val_steps,
      val_loss,
      color=COLOURS['tail'],
      linestyle='--',
      marker='s',
      markersize=4,
      label='validation',
    )
    axes.set_title(name, fontsize=10)
    axes.set_xlabel('step (count)')
  row[0].set_ylabel('loss per answer token (nats)')
  _legend(figure, row[0])
  _save(figure, path)


def _running_mean(values: np.ndarray) -> np.ndarray:
  """Mean of the last 5 % of all values at each step; fewer at the start."""
  window = max(1, len(values) // 20)
  # A window's sum is the difference of two running sums.
  total = np.concatenate([[0.0], np.cumsum(values)])
  stop = np.arange(1, len(values) + 1)
  start = np.maximum(stop - window, 0)
  return (total[stop] - total[start]) / (stop - start)


def _short(name: str) -> str:
  if len(name) <= LONGEST_NAME:
    return name
  return name[: LONGEST_NAME - 1] + '…'


def _figure(
  panels: int,
  height: float,
  stacked: bool = False,
  width: float = WIDTH,
  sharey: bool = True,
) -> tuple[Figure, list[Axes]]:
  """A figure with `panels` axes in a row or stacked (sharing x)."""
  figure = Figure(figsize=(width, height), layout='constrained')
  FigureCanvasAgg(figure)
  if stacked:
    grid = figure.subplots(panels, 1, sharex=True, squeeze=False)
  else:
    grid = figure.subplots(1, panels, sharey=sharey, squeeze=False)
  for axes in grid.flat:
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', color='#dddddd', linewidth=0.6)
    axes.set_axisbelow(True)
  return figure, list(grid.flat)


def _legend(figure: Figure, axes: Axes) -> None:
  """A legend above the axes, where it cannot cover anything."""
  handles, texts = axes.get_legend_handles_labels()
  figure.legend(
    handles,
    texts,
    loc='outside upper center',
    ncols=max(len(texts), 1),
    frameon=False,
    fontsize=9,
  )


def _save(figure: Figure, path: Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=DPI)
