"""The figures of the report: picks the numbers, has them drawn, says what is
seen. A figure whose files are missing is left out.
"""

import numpy as np

from behaviorlm_jax.evaluate import adjust
from behaviorlm_jax.report import compare, plots
from behaviorlm_jax.report.blocks import Figure
from behaviorlm_jax.report.run_files import plan_targets, RunFiles
from behaviorlm_jax.report.verdict import Outcome


def draw(run: RunFiles, outcome: Outcome | None) -> list[Figure]:
  """Draws what the files allow, into report/ of the work directory."""
  drawn = [
    _stages(run),
    _changes(run, outcome),
    _trade_off(run),
    _f1(run),
    _targets(run),
    _loss(run),
  ]
  return [figure for figure in drawn if figure]


def _stages(run: RunFiles) -> Figure | None:
  if not run.scored:
    return None
  labels, series = [stage.name for stage in run.scored], {}
  for name, (group, key) in compare.SCORES.items():
    series[group, name] = [stage.evaluation[group][key] for stage in run.scored]
    if run.baselines:
      series[group, name].append(run.best_baseline(group, key)[0])
  if run.baselines:
    labels.append('best baseline')
  path = 'report/stages.png'
  plots.stage_bars(run.workdir / path, labels, series)
  last = run.scored[-1].evaluation
  beside = ' beside the best free baseline of each score' * bool(run.baselines)
  bars = [
    f'{name} {", ".join(f"{value:.3f}" for value in values)}'
    for (_, name), values in series.items()
  ]
  return Figure(
    path,
    'Scores per stage',
    f'Accuracy over all and macro-F1 per group{beside}; higher is better. '
    f'n = {last["all"]["n"]:,} test events ({last["anchor"]["n"]:,} anchor, '
    f'{last["tail"]["n"]:,} tail).',
    f'Bars of {", ".join(labels)}: {"; ".join(bars)}.',
  )


def _changes(run: RunFiles, outcome: Outcome | None) -> Figure | None:
  if not outcome or not outcome.contrasts or outcome.users < 2:
    return None
  path = 'report/changes.png'
  plots.change_intervals(run.workdir / path, outcome.contrasts)
  points = [
    f'against {against} {", ".join(f"{c.score} {c.size:+.3f}" for c in changes)}'
    for against, changes in outcome.contrasts.items()
  ]
  return Figure(
    path,
    'Changes and their uncertainty',
    f'What {outcome.final} changed against each other predictor, with 95 % '
    'intervals. Right of zero is better; a hollow mark is within its '
    f'uncertainty. n = {outcome.samples["all"]:,} test events of '
    f'{outcome.users:,} users.',
    f'Points with intervals: {"; ".join(points)}.',
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
