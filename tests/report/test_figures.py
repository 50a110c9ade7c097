"""Figures: every axis is named, and colour is never the only sign."""

import numpy as np
import pytest

from behaviorlm_jax.report import plots
from behaviorlm_jax.sweep import drawing

ANCHOR = np.array([True, True, False, False])
COUNT = np.array([90, 40, 3, 0])


@pytest.fixture
def drawn(monkeypatch, tmp_path):
  """Draws with a function of plots; returns the matplotlib figure."""
  figures = []
  for module in (plots, drawing):
    monkeypatch.setattr(module, 'save_figure', lambda one, path: figures.append(one))

  def draw(function, *args):
    function(tmp_path / 'x.png', *args)
    figures[-1].canvas.draw()
    return figures[-1]

  return draw


STEPS = (range(1, 9), range(8), [4, 8], [3, 2])
LINES = {'x': {'a': {0: 0.1, 5: 0.2}, 'b': {5: 0.3}}, 'y': {'b': {5: 0.1}}}
LEVELS = {'markov': (0.1, (0.05, 0.2)), 'a': (0.3, None)}
BINS = np.array([[0.1, 0.2, 0.75], [0.5, 0.4, 0.25], [0.0, 0.0, 0.0]])
CURVES = {'x': {'a': np.eye(3)[:, :2], 'b': np.eye(3)[:, 1:]}}
FEW = ({'A': COUNT, 'B': COUNT}, list('abcd'), ANCHOR)
MANY = ({'A': COUNT.repeat(30)}, ['x'] * 120, ANCHOR.repeat(30))


@pytest.mark.parametrize(
  ('function', 'args'),
  [
    (plots.score_intervals, (dict.fromkeys('xyz', LEVELS), 'markov')),
    (plots.reliability_marks, (BINS,)),
    (plots.f1_against_frequency, ({'A': COUNT / 90, 'B': COUNT / 100}, COUNT, ANCHOR)),
    (plots.drawn_targets, FEW),
    (plots.drawn_targets, MANY),
    (plots.loss_curves, ({'A': STEPS, 'B': STEPS},)),
    (plots.trade_off_curves, (CURVES, (-1.0, 0.0, 1.0))),
    (drawing.few_shot, (LINES,)),
    (drawing.deciles, (LINES,)),
    (drawing.marks, ({'x': {'a': [1.0, 2.0]}, 'y': {'b': [0.5]}}, 'minutes')),
  ],
)
def test_every_figure_names_its_axes(drawn, function, args):
  figure = drawn(function, *args)
  assert figure.get_supxlabel()
  # Names in place of numbers say enough.
  first = figure.axes[0].get_yticklabels()[0].get_text()
  assert figure.get_supylabel() or first in ('markov', 'a')
  assert figure.get_figwidth() in (plots.WIDTH, plots.WIDE)


def test_groups_differ_by_more_than_colour(drawn):
  few = drawn(plots.drawn_targets, *FEW)
  assert len({bar.get_hatch() for bar in few.axes[0].patches}) == 2
  assert len(set(plots.MARKERS.values())) == 3
  many = drawn(plots.drawn_targets, *MANY)
  assert [line.get_xdata()[0] for line in many.axes[0].lines] == [60.5]


def test_each_score_stands_with_its_interval_beside_that_of_the_reference(drawn):
  figure = drawn(plots.score_intervals, {'x': LEVELS, 'y': LEVELS}, 'markov')
  for axes in figure.axes:
    first, second, line = axes.lines
    assert (first.get_xdata()[0], second.get_xdata()[0]) == (0.1, 0.3)
    assert list(line.get_xdata()) == [0.1, 0.1]
    (whole,), (point,) = (found.get_segments() for found in axes.collections)
    assert whole[:, 0].tolist() == [0.05, 0.2] and point[:, 0].tolist() == [0.3, 0.3]
  assert len(drawn(plots.score_intervals, {'x': LEVELS}, 'none').axes[0].lines) == 2


def test_bins_without_events_have_no_mark_and_others_an_area_by_share(drawn):
  (marks,) = drawn(plots.reliability_marks, BINS).axes[0].collections
  assert marks.get_offsets().tolist() == [[0.1, 0.2], [0.5, 0.4]]
  assert marks.get_sizes()[0] > 2 * marks.get_sizes()[1]


def test_frequencies_are_read_in_whole_decades(drawn):
  axes = drawn(plots.f1_against_frequency, {'A': COUNT / 90}, COUNT, ANCHOR).axes[0]
  assert [t.get_text() for t in axes.get_xticklabels()] == ['1', '10', '100']
  assert not any(t.get_text() for t in axes.get_xticklabels(minor=True))
  low, high = axes.get_xlim()
  assert low < 0.5 and high > 90
