"""What all figures share: sizes, colours, panels, and one legend.

Drawn with matplotlib's Agg canvas through the object interface, so no global
state and no display is touched. Colours are Okabe and Ito's, which colour-
blind readers can tell apart; groups differ by marker, line or hatch as well.
Figures are WIDTH inches wide, so that their text can still be read where two
stand side by side on a page, or WIDE where they have the page to themselves.
"""

import math
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 150
WIDTH = 6.4
WIDE = 10.2
COLOURS = {'anchor': '#0072B2', 'tail': '#D55E00', 'all': '#009E73'}
MARKERS = {'anchor': 'o', 'tail': '^', 'all': 's'}
HATCHES = {'anchor': '', 'tail': '//', 'all': '..'}
GRID = {'color': '#dddddd', 'linewidth': 0.6}


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
  panels = list(figure.subplots(*shape, squeeze=False, **share).flat)
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
