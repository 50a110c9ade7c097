"""The figures of the page of many runs, drawn as those of the report."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from behaviorlm_jax.report.plots import (
  BORDER,
  COLOURS,
  draw_curves,
  MARKERS,
  name_rows,
  new_figure,
  save_figure,
  WIDE,
)

Lines = Mapping[str, Mapping[str, Mapping[int, float]]]  # {title: {predictor: {x: y}}}


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
    name_rows(axes, names)
  save_figure(figure, path)


def few_shot(path: Path, panels: Lines) -> None:
  """F1 against the number of samples learned."""
  lines = itertools.chain(*(lines.values() for lines in panels.values()))
  shots = sorted(set(itertools.chain(*lines)))
  # Doublings are about equal steps; a logarithm alone has no place for 0.
  place = lambda n: math.log2(1 + n)
  labels = ('samples of each tail behavior (log scale)', 'mean F1 (fraction)')
  figure, row = draw_curves(_points(panels, place), labels)
  for axes in row:
    axes.set_xticks(list(map(place, shots)), list(map(str, shots)))
    axes.axhline(0, linewidth=0)  # The axis begins there.
  save_figure(figure, path)


def deciles(path: Path, panels: Lines) -> None:
  """F1 against how frequent behaviors are: tenth 1 has the most frequent."""
  labels = ('tenth of the behaviors, 1 the most frequent', 'mean F1 (fraction)')
  figure, row = draw_curves(_points(panels), labels)
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
