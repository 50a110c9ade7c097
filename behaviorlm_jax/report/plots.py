"""The drawing of figures: arrays in, one PNG file out.

Drawn with matplotlib's Agg canvas through the object interface, so no global
state and no display is touched. Colours are Okabe and Ito's, which colour-
blind readers can tell apart; groups differ by marker, line or hatch as well.
Figures are WIDTH inches wide, so that their text can still be read where two
stand side by side on a page, or WIDE where they have the page to themselves.
Behavior names are shown as they are: never read as mathematical text.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from behaviorlm_jax.report.verdict import Interval

DPI = 150
WIDTH = 6.4
WIDE = 10.2
COLOURS = {'anchor': '#0072B2', 'tail': '#D55E00', 'all': '#009E73'}
MARKERS = {'anchor': 'o', 'tail': '^', 'all': 's'}
HATCHES = {'anchor': '', 'tail': '//', 'all': '..'}
GRID = {'color': '#dddddd', 'linewidth': 0.6}
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


def score_intervals(
  path: Path,
  panels: Mapping[str, Mapping[str, tuple[float, Interval | None]]],
  reference: str,
) -> None:
  """Scores with 95 % intervals, two panels in a row, a line per predictor.

  Args:
    panels: {title: {predictor: (score, interval)}}, the same ones in each.
    reference: the predictor at whose scores a line is drawn, if it is there.
  """
  names = list(next(iter(panels.values())))
  height = 0.9 + (0.6 + 0.27 * len(names)) * math.ceil(len(panels) / 2)
  figure, grid = new_figure(panels, ('95 % intervals by users', ''), height, columns=2)
  look = {'color': COLOURS['anchor'], 'markersize': 6}
  for axes, scores in zip(grid, panels.values(), strict=True):
    for row, (value, interval) in enumerate(scores.values()):
      axes.hlines(row, *(interval or (value, value)), color=look['color'], linewidth=2)
      axes.plot(value, row, MARKERS['anchor'], **look)
    if reference in scores:
      axes.axvline(scores[reference][0], **BORDER, label=f'level of {reference}')
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    name_rows(axes, names)
  save_figure(figure, path)


def reliability_marks(path: Path, table: np.ndarray) -> None:
  """Accuracy against confidence, a mark per bin, as large as its share.

  `table`: float[bins, 3] of evaluate.probabilities.reliability.
  """
  labels = ('probability of the likeliest name', 'how often it happened (fraction)')
  figure, (axes,) = new_figure([''], labels, height=4)
  axes.plot([0, 1], [0, 1], **BORDER, label='as often as it says')
  confidence, accuracy, share = table[table[:, 2] > 0].T
  look = {'color': COLOURS['anchor'], 'alpha': 0.75, 'linewidth': 0}
  axes.scatter(confidence, accuracy, 15 + 600 * share, **look, clip_on=False)
  axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))  # Marks are seen whole.
  save_figure(figure, path)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
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
  figure, row = draw_curves(panels, labels)
  large = {'markersize': 12, 'markerfacecolor': 'none', 'markeredgewidth': 2}
  for axes, curves in zip(row, panels.values(), strict=True):
    for line, points in zip(axes.get_lines(), curves.values(), strict=True):
      # Hollow: where predictors coincide all of their marks are seen.
      look = {'color': line.get_color(), 'marker': line.get_marker()}
      axes.plot(*points[taus.index(0.0)], **look, **large)
  save_figure(figure, path)


def draw_curves(
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


def new_figure(
  titles: Iterable[str],
  labels: tuple[str, str],
  height: float,
  width: float = WIDTH,
  columns: int | None = None,
  sharey: bool = True,
) -> tuple[Figure, list[Axes]]:
  """A figure with a panel per title.

  Args:
    labels: of x and y, of all panels at once.
    columns: panels in a row; None: all; 1: stacked, sharing x.
  """
  titles = list(titles)
  figure = Figure(figsize=(width, height), layout='constrained')
  FigureCanvasAgg(figure)
  columns = columns or len(titles)
  share = {'sharex': True} if columns == 1 else {'sharey': sharey}
  shape = math.ceil(len(titles) / columns), columns
  places = list(figure.subplots(*shape, squeeze=False, **share).flat)
  panels = places[: len(titles)]
  for spare in places[len(titles) :]:
    spare.remove()
  # Once for all panels, which share what they show.
  figure.supxlabel(labels[0], fontsize=10)
  figure.supylabel(labels[1], fontsize=10)
  for axes, title in zip(panels, titles, strict=True):
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', **GRID)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=10)
  return figure, panels


def save_figure(figure: Figure, path: Path) -> None:
  """Writes the file, with a legend of all that is labelled in any panel."""
  entries = {}  # What several panels show stands in the legend once.
  for axes in figure.axes:
    handles, texts = axes.get_legend_handles_labels()
    entries |= dict(zip(texts, handles, strict=True))
  if entries:
    figure.legend(
      entries.values(),
      entries.keys(),
      loc='outside upper center',  # Where it cannot cover anything.
      ncols=min(len(entries), 3 if figure.get_figwidth() == WIDTH else 6),
      frameon=False,
      fontsize=9,
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=DPI)
