"""The drawing of the report's figures: arrays in, one PNG file out.

Behavior names are shown as they are: never read as mathematical text.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from behaviorlm_jax.report.canvas import (
  COLOURS,
  GRID,
  HATCHES,
  MARKERS,
  new_figure,
  save_figure,
  WIDE,
  WIDTH,
)
from behaviorlm_jax.report.verdict import Change

# Of predictors side by side, told apart by line and mark, too.
PREDICTORS = (
  {'color': '#0072B2', 'marker': 'o', 'linestyle': '-'},
  {'color': '#D55E00', 'marker': '^', 'linestyle': '--'},
  {'color': '#009E73', 'marker': 's', 'linestyle': '-.'},
  {'color': '#CC79A7', 'marker': 'D', 'linestyle': ':'},
  {'color': '#000000', 'marker': 'v', 'linestyle': '-'},
  {'color': '#E69F00', 'marker': 'P', 'linestyle': '--'},
)
BORDER = {'color': '#444444', 'linewidth': 0.9, 'linestyle': ':'}
MOST_NAMES = 40  # behaviors whose names still fit below an axis
LONGEST_NAME = 24
Lines = Mapping[str, Mapping[str, Mapping[int, float]]]  # {title: {predictor: {x: y}}}


def change_intervals(path: Path, panels: Mapping[str, Sequence[Change]]) -> None:
  """Points with 95 % intervals around zero, a panel per {against: changes}."""
  height = 1 + (0.55 + 0.27 * max(map(len, panels.values()))) * len(panels)
  x = 'change of the score (fraction), 95 % interval'
  titles = [f'against {other}' for other in panels]
  figure, stack = new_figure(titles, (x, ''), height, columns=1)
  for axes, changes in zip(stack, panels.values(), strict=True):
    for row, change in enumerate(changes):
      group = next((g for g in MARKERS if g in change.score), 'all')
      axes.hlines(row, *change.interval, color=COLOURS[group], linewidth=1.8)
      axes.plot(
        change.size,
        row,
        MARKERS[group],
        color=COLOURS[group],
        markersize=7,
        markerfacecolor='white' if change.outcome == 'within' else None,
      )
    axes.axvline(0, **BORDER)
    _name_rows(axes, [change.score for change in changes])
  save_figure(figure, path)


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
  names = list(dict.fromkeys(itertools.chain(*panels.values())))
  figure, row = new_figure(panels, (x, ''), 1.4 + 0.3 * len(names), WIDE)
  look = {'color': COLOURS['all'], 'markersize': 7, 'alpha': 0.75}
  for axes, found in zip(row, panels.values(), strict=True):
    for y, name in enumerate(names):
      values = found.get(name, [])
      axes.plot(values, [y] * len(values), MARKERS['all'], **look)
    if line is None:
      axes.set_xlim(left=0)
    else:
      axes.axvline(line, **BORDER)
    _name_rows(axes, names)
  save_figure(figure, path)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
  axes.set_yticks(range(len(names)), names)
  axes.set_ylim(len(names) - 0.4, -0.6)  # Turned round: the first on top.


def trade_off_curves(
  path: Path, panels: Mapping[str, Mapping[str, np.ndarray]], taus: Sequence[float]
) -> None:
  """Tail against anchor macro-F1, a curve over tau for each predictor.

  Args:
    panels: {title: {predictor: float[T, 2], anchor and tail}}.
    taus: float[T]; the point of 0 has a large mark.
  """
  labels = ('anchor macro-F1 (fraction)', 'tail macro-F1 (fraction)')
  figure, row = _curves(panels, labels)
  large = {'markersize': 12, 'markerfacecolor': 'none', 'markeredgewidth': 2}
  for axes, curves in zip(row, panels.values(), strict=True):
    for line, points in zip(axes.get_lines(), curves.values(), strict=True):
      # Hollow: where predictors coincide all of their marks are seen.
      look = {'color': line.get_color(), 'marker': line.get_marker()}
      axes.plot(*points[taus.index(0.0)], **look, **large)
  save_figure(figure, path)


def few_shot(path: Path, panels: Lines) -> None:
  """F1 against the number of samples learned."""
  lines = itertools.chain(*(lines.values() for lines in panels.values()))
  shots = sorted(set(itertools.chain(*lines)))
  # Doublings are about equal steps; a logarithm alone has no place for 0.
  place = lambda n: math.log2(1 + n)
  labels = ('samples of each tail behavior (log scale)', 'mean F1 (fraction)')
  figure, row = _curves(_points(panels, place), labels)
  for axes in row:
    axes.set_xticks(list(map(place, shots)), list(map(str, shots)))
    axes.axhline(0, linewidth=0)  # The axis begins there.
  save_figure(figure, path)


def deciles(path: Path, panels: Lines) -> None:
  """F1 against how frequent behaviors are: tenth 1 has the most frequent."""
  labels = ('tenth of the behaviors, 1 the most frequent', 'mean F1 (fraction)')
  figure, row = _curves(_points(panels), labels)
  for axes in row:
    axes.set_xticks(range(1, 11))
  save_figure(figure, path)


def _points(
  panels: Lines, place: Callable[[int], float] = float
) -> dict[str, dict[str, np.ndarray]]:
  """{title: {predictor: float[n, 2]}}, x put in its place."""
  return {
    title: {
      name: np.array([(place(x), y) for x, y in values.items()])
      for name, values in lines.items()
    }
    for title, lines in panels.items()
  }


def _curves(
  panels: Mapping[str, Mapping[str, np.ndarray]], labels: tuple[str, str]
) -> tuple[Figure, list[Axes]]:
  """Panels in a row; a predictor looks the same in all of them.

  `panels`: {title: {predictor: points float[n, 2]}}.
  """
  width = WIDTH if len(panels) == 1 else WIDE
  figure, row = new_figure(panels, labels, 4.4, width, sharey=False)
  names = dict.fromkeys(itertools.chain(*panels.values()))
  # Two of more predictors than there are looks share one; the legend has both.
  looks = dict(zip(names, itertools.cycle(PREDICTORS), strict=False))
  for axes, curves in zip(row, panels.values(), strict=True):
    axes.grid(axis='x', **GRID)
    for name, points in curves.items():
      axes.plot(*points.T, **looks[name], markersize=4, label=name)
  return figure, row


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
  labels = ('training events (log scale)', 'F1 of the behavior (fraction)')
  figure, row = new_figure(panels, labels, height=3.9)
  count = np.maximum(train_count, 0.5)  # 0 has no logarithm.
  for axes, (name, f1) in zip(row, panels.items(), strict=True):
    means = []
    for group, members in _groups(anchor):
      look = {'color': COLOURS[group], 'marker': MARKERS[group], 'label': group}
      axes.scatter(count[members], f1[members], s=26, alpha=0.75, linewidth=0, **look)
      means.append(f'{group} {f1[members].mean():.3f}')
    _decades(axes, count)
    axes.set_ylim(-0.04, 1.04)  # Marks at 0 and 1 are seen whole.
    axes.set_title(f'{name}\nmean: ' + ', '.join(means), fontsize=10)
  save_figure(figure, path)


def _groups(anchor: np.ndarray) -> list[tuple[str, np.ndarray]]:
  """(group, members bool[Y]) of those that have any."""
  groups = (('anchor', anchor), ('tail', ~anchor))
  return [(group, members) for group, members in groups if members.any()]


def _decades(axes: Axes, count: np.ndarray) -> None:
  """A logarithmic x axis that shows whole decades, in plain numbers."""
  low = np.floor(np.log10(max(count.min(), 1)))
  high = np.ceil(np.log10(max(count.max(), 10)))
  axes.set_xscale('log')
  axes.set_xlim(min(0.7 * 10**low, 0.8 * count.min()), 1.4 * 10**high)
  axes.set_xticks(10.0 ** np.arange(low, high + 1))
  axes.xaxis.set_major_formatter(EngFormatter(sep=''))  # 10k: it must fit.
  axes.xaxis.set_minor_formatter(NullFormatter())


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
  x = 'behavior, most frequent in training first'
  if not named:
    x = 'rank of the behavior by training frequency'
  titles = [f'{stage}: {counts.sum():,} targets' for stage, counts in panels.items()]
  height = 1.5 * len(panels) + 1 + 1.1 * named
  figure, stack = new_figure(titles, (x, 'targets (count)'), height, WIDE, columns=1)
  place = np.arange(1, len(names) + 1)
  for axes, counts in zip(stack, panels.values(), strict=True):
    for group, members in _groups(anchor):
      hatch = HATCHES[group] if named else ''
      look = {'color': COLOURS[group], 'hatch': hatch, 'label': group}
      axes.bar(
        place[members], counts[members], 0.85, edgecolor='white', linewidth=0, **look
      )
    if not named and len(_groups(anchor)) == 2:
      # Bars too narrow for a hatch: colour must not be the only sign.
      label = 'anchor left of here, tail right'
      axes.axvline(anchor.sum() + 0.5, **BORDER, label=label)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.set_xlim(0.2, len(names) + 0.8)
  if named:
    short = [
      n if len(n) <= LONGEST_NAME else n[: LONGEST_NAME - 1] + '…' for n in names
    ]
    turned = {'rotation': 55, 'ha': 'right', 'rotation_mode': 'anchor'}
    stack[-1].set_xticks(place, short, **turned, fontsize=8, parse_math=False)
  save_figure(figure, path)


def loss_curves(path: Path, panels: Mapping[str, Sequence[Sequence[float]]]) -> None:
  """Training and validation loss by step, one panel per stage.

  Args:
    panels: {stage name: (steps, loss, validation steps, validation loss)}.
  """
  width = WIDTH if len(panels) == 1 else WIDE
  labels = ('step (count)', 'loss per answer token (nats)')
  figure, row = new_figure(panels, labels, 3.6, width)
  blue, orange = COLOURS['anchor'], COLOURS['tail']
  for axes, curves in zip(row, panels.values(), strict=True):
    steps, loss, val_steps, val_loss = (np.asarray(c, float) for c in curves)
    # Faintly: the loss of one batch says little.
    axes.plot(steps, loss, color=blue, alpha=0.35, linewidth=0.9, label='training')
    label = 'training, mean over 5 % of the steps'
    axes.plot(steps, _running_mean(loss), color=blue, linewidth=1.8, label=label)
    look = {'color': orange, 'linestyle': '--', 'marker': 's', 'markersize': 4}
    axes.plot(val_steps, val_loss, **look, label='validation')
  save_figure(figure, path)


def _running_mean(values: np.ndarray) -> np.ndarray:
  """Mean of the last 5 % of all values at each step; fewer at the start."""
  window = max(1, len(values) // 20)
  # A window's sum is the difference of two running sums.
  total = np.concatenate([[0.0], np.cumsum(values)])
  stop = np.arange(1, len(values) + 1)
  start = np.maximum(stop - window, 0)
  return (total[stop] - total[start]) / (stop - start)
