"""Figures: every axis is named, and colour is never the only sign."""

import numpy as np
import pytest

from behaviorlm_jax.report import plots
from behaviorlm_jax.report.verdict import Change

ANCHOR = np.array([True, True, False, False])
COUNT = np.array([90, 40, 3, 0])


@pytest.fixture
def drawn(monkeypatch, tmp_path):
  """Draws with a function of plots; returns the matplotlib figure."""
  figures = []
  monkeypatch.setattr(plots, 'save_figure', lambda figure, path: figures.append(figure))

  def draw(function, *args):
    function(tmp_path / 'x.png', *args)
    figures[-1].canvas.draw()
    return figures[-1]

  return draw


CHANGE = Change('tail macro-F1', 'untuned', 0.1, 0.2, (0.05, 0.2))
STEPS = (range(1, 9), range(8), [4, 8], [3, 2])
LINES = {'x': {'a': {0: 0.1, 5: 0.2}, 'b': {5: 0.3}}, 'y': {'b': {5: 0.1}}}
BARS = {('all', 'accuracy'): [0.1, 0.2], ('tail', 'tail macro-F1'): [0.3, 0.0]}
CURVES = {'x': {'a': np.eye(3)[:, :2], 'b': np.eye(3)[:, 1:]}}
FEW = ({'A': COUNT, 'B': COUNT}, list('abcd'), ANCHOR)
MANY = ({'A': COUNT.repeat(30)}, ['x'] * 120, ANCHOR.repeat(30))


@pytest.mark.parametrize(
  ('function', 'args'),
  [
    (plots.stage_bars, (['a', 'b'], BARS)),
    (plots.change_intervals, ({'x': [CHANGE], 'y': [CHANGE] * 3},)),
    (plots.f1_against_frequency, ({'A': COUNT / 90, 'B': COUNT / 100}, COUNT, ANCHOR)),
    (plots.drawn_targets, FEW),
    (plots.drawn_targets, MANY),
    (plots.loss_curves, ({'A': STEPS, 'B': STEPS},)),
    (plots.trade_off_curves, (CURVES, (-1.0, 0.0, 1.0))),
    (plots.few_shot, (LINES,)),
    (plots.deciles, (LINES,)),
    (plots.marks, ({'x': {'a': [1.0, 2.0]}, 'y': {'b': [0.5]}}, 'minutes')),
  ],
)
def test_every_figure_names_its_axes(drawn, function, args):
  figure = drawn(function, *args)
  assert figure.get_supxlabel()
  # Names in place of numbers say enough.
  first = figure.axes[0].get_yticklabels()[0].get_text()
  assert figure.get_supylabel() or first in ('tail macro-F1', 'a')
  assert figure.get_figwidth() in (plots.WIDTH, plots.WIDE)


def test_groups_differ_by_more_than_colour(drawn):
  bars = drawn(
    plots.stage_bars, ['a'], {(group, group): [0.5] for group in plots.COLOURS}
  )
  assert len({bar.get_hatch() for bar in bars.axes[0].patches}) == 3
  assert len(set(plots.MARKERS.values())) == 3
  many = drawn(plots.drawn_targets, *MANY)
  assert [line.get_xdata()[0] for line in many.axes[0].lines] == [60.5]


def test_a_change_within_its_uncertainty_is_drawn_hollow(drawn):
  sure = Change('accuracy', 'x', 0.1, 0.2, (0.05, 0.2))
  open_ = Change('accuracy', 'x', 0.1, 0.2, (-0.05, 0.2))
  figure = drawn(plots.change_intervals, {'x': [sure, open_]})
  marks = [line for line in figure.axes[0].lines if line.get_marker() == 's']
  assert [mark.get_markerfacecolor() == 'white' for mark in marks] == [False, True]


def test_frequencies_are_read_in_whole_decades(drawn):
  axes = drawn(plots.f1_against_frequency, {'A': COUNT / 90}, COUNT, ANCHOR).axes[0]
  assert [t.get_text() for t in axes.get_xticklabels()] == ['1', '10', '100']
  assert not any(t.get_text() for t in axes.get_xticklabels(minor=True))
  low, high = axes.get_xlim()
  assert low < 0.5 and high > 90
