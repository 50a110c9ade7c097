"""The figures of the report: picks the numbers, has them drawn, says what is
seen. A figure whose files are missing is left out.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from behaviorlm_jax.evaluate import adjust, metrics
from behaviorlm_jax.report import compare, plots
from behaviorlm_jax.report import predictors as predictors_lib
from behaviorlm_jax.report.blocks import Figure
from behaviorlm_jax.report.run_files import plan_targets, RunFiles

# Of the first figure: (title, group that it needs, operating point, score).
_PANELS = (
  ('mean log p (nats)', 'all', 'accuracy', 'log p'),
  ('accuracy', 'all', 'accuracy', 'accuracy'),
  ('anchor macro-F1', 'anchor', 'macro_f1', 'anchor macro-F1'),
  ('tail macro-F1', 'tail', 'macro_f1', 'tail macro-F1'),
)


def draw(
  run: RunFiles, predictors: Sequence[predictors_lib.PredictorFiles]
) -> dict[str, Figure]:
  """Draws what the files allow, into report/ of the work directory.

  Returns:
    {name of the file: Figure}, in the order of the report.
  """
  drawn = [
    _predictors(run, predictors_lib.main_ones(predictors)),
    _reliability(run),
    _trade_off(run),
    _f1(run),
    _targets(run),
    _loss(run),
  ]
  return {Path(figure.path).stem: figure for figure in drawn if figure}


def _predictors(
  run: RunFiles, shown: Sequence[predictors_lib.PredictorFiles]
) -> Figure | None:
  if not shown:
    return None
  n = {group: shown[0].evaluation[group]['n'] for group in metrics.GROUPS}
  users = len(np.unique(shown[0].arms['accuracy'].user))
  panels = {
    title: {one.name: compare.level(one.arms[point], score) for one in shown}
    for title, group, point, score in _PANELS
    if n[group]
  }
  path = 'report/predictors.png'
  plots.score_intervals(run.workdir / path, panels, predictors_lib.COUNTING)
  log_p = [f'{one.name} {predictors_lib.mean_log_p(one):.3f}' for one in shown]
  return Figure(
    path,
    'Every predictor on the same events',
    'Further right is better, right of the dotted line better than counting. '
    'Accuracy is that of the operating point for accuracy, F1 of anchors (frequent) '
    'and tail (rare) that of the point for macro-F1. Lines are 95 % intervals by '
    f'users. n = {n["all"]:,} test events of {users:,} users ({n["anchor"]:,} '
    f'anchor, {n["tail"]:,} tail).',
    f'Marks with intervals; the mean log p is {", ".join(log_p)}.',
  )


def _reliability(run: RunFiles) -> Figure | None:
  evaluation = run.scored[-1].evaluation if run.scored else {}
  if 'reliability' not in evaluation:
    return None
  path, table = 'report/reliability.png', np.array(evaluation['reliability'])
  plots.reliability_marks(run.workdir / path, table)
  bins = [f'{said:.2f} {seen:.2f}' for said, seen, share in table if share]
  name, n = run.scored[-1].name, evaluation['all']['n']
  return Figure(
    path,
    'Are the probabilities right?',
    f'How sure {name} is of its likeliest name, and how often that happens; a mark '
    f'is as large as its share of the n = {n:,} test events. Below the line it is '
    f'too sure. The mean distance from the line (ece) is {evaluation["ece"]:.3f}.',
    f'Marks of probability and how often it happened: {", ".join(bins)}.',
  )


def _trade_off(run: RunFiles) -> Figure | None:
  log_p = {stage.name: stage.log_p('test') for stage in run.scored}
  log_p = {name: values for name, values in log_p.items() if values is not None}
  # Without both groups there is nothing to trade.
  if not log_p or run.anchor.all() or not run.anchor.any():
    return None
  stage = run.predicting[-1]
  # The best that costs nothing, to see what training adds at every balance.
  log_p['markov'] = run.baseline_counts.scores('markov', stage.column('sample'))
  true, curves = run.encode(stage.column('behavior')), {}
  for name, values in log_p.items():
    by_tau = adjust.first_choices(values, run.log_prior)
    curves[name] = adjust.trade_off(by_tau, true, run.anchor)
  path = 'report/trade_off.png'
  plots.trade_off_curves(run.workdir / path, {'': curves}, adjust.TAUS)
  best = [f'{name} {points[:, 1].max():.3f}' for name, points in curves.items()]
  return Figure(
    path,
    'Anchors against tail',
    'What each predictor reaches when rare names are raised (towards the '
    f'upper left) or lowered, tau from {adjust.TAUS[0]} to '
    f'{adjust.TAUS[-1]}; the large mark is the predictor as it is. A curve '
    'further up and right is better at every balance. '
    f'n = {len(true):,} test events.',
    'Curves of tail against anchor macro-F1; the best tail macro-F1 of each is '
    f'{", ".join(best)}.',
  )


def _f1(run: RunFiles) -> Figure | None:
  # The untuned model's alone, if nothing was trained.
  stages = [s for s in run.predicting if s.key != 'base'] or run.predicting
  if not stages:
    return None
  path, counts = 'report/f1.png', run.counts
  panels = {stage.name: run.per_behavior(stage)[2] for stage in stages}
  plots.f1_against_frequency(run.workdir / path, panels, counts, run.anchor)
  untaught = ', those without a training event left of 1' * bool((counts == 0).any())
  means = [f'{name} {f1.mean():.3f}' for name, f1 in panels.items()]
  return Figure(
    path,
    'F1 against training frequency',
    f'One mark per behavior, n = {len(counts):,} behaviors, from '
    f'{len(stages[-1].right):,} test events; behaviors without a test event '
    f'lie at 0{untaught}.',
    f'Scatter of F1 against training events; mean F1 {"; ".join(means)}.',
  )


def _targets(run: RunFiles) -> Figure | None:
  order, panels = run.by_frequency, {}  # Anchors lie left of all tail behaviors.
  for stage in run.stages:
    plan = stage.folder / 'plan.parquet'
    if plan.is_file():
      # Of what was drawn, not of the log: repeats count.
      behavior = run.events.behavior[plan_targets(plan)]
      panels[stage.name] = np.bincount(behavior, minlength=len(order))[order]
  if not panels:
    return None
  path = 'report/targets.png'
  names = [run.behaviors[i]['name'] for i in order]
  plots.drawn_targets(run.workdir / path, panels, names, run.anchor[order])
  drawn = [
    f'{stage} {int(counts.sum()):,} targets over {int((counts > 0).sum()):,} behaviors'
    for stage, counts in panels.items()
  ]
  return Figure(
    path,
    'What each plan drew',
    'How often each behavior was taught, most frequent behavior first; '
    f'n = {len(order):,} behaviors.',
    f'Bars of targets per behavior: {"; ".join(drawn)}.',
    wide=True,
  )


def _loss(run: RunFiles) -> Figure | None:
  panels = {
    stage.name: [
      [row[field] for row in stage.steps if row.get(key) is not None]
      for key in ('loss', 'val_loss')
      for field in ('step', key)
    ]
    for stage in run.stages
    if stage.steps
  }
  if not panels:
    return None
  path = 'report/loss.png'
  plots.loss_curves(run.workdir / path, panels)
  steps = [f'{name} n = {len(curves[0]):,} steps' for name, curves in panels.items()]
  fallen = [
    f'{name} from {loss[0]:.2f} to {loss[-1]:.2f}'
    for name, (_, loss, *_) in panels.items()
  ]
  return Figure(
    path,
    'Loss',
    'Loss per answer token while training, in nats; lower is better: '
    f'{", ".join(steps)}.',
    f'Loss against step: {"; ".join(fallen)}.',
    wide=len(panels) > 1,
  )
