"""The figures of the report: picks the numbers, has them drawn, says what is
seen. A figure whose files are missing is left out.
"""

from pathlib import Path

import numpy as np

from behaviorlm_jax.evaluate import adjust
from behaviorlm_jax.report import compare, plots, run_files
from behaviorlm_jax.report.blocks import Figure
from behaviorlm_jax.report.verdict import Outcome

FOLDER = 'report'


def draw(run: run_files.RunFiles, outcome: Outcome | None) -> list[Figure]:
  """Draws what the files allow."""
  drawn = [
    _stages(run),
    _changes(run, outcome),
    _trade_off(run),
    _f1(run),
    _difficulty(run),
    _targets(run),
    _loss(run),
  ]
  return [figure for figure in drawn if figure]


def _path(run: run_files.RunFiles, name: str) -> Path:
  folder = run.workdir / FOLDER
  folder.mkdir(exist_ok=True)  # Only for a figure: an empty one is not left.
  return folder / name


def _stages(run: run_files.RunFiles) -> Figure | None:
  if not run.scored:
    return None
  labels, series = [s.name for s in run.scored], {}
  if run.baselines:
    labels.append('best\nbaseline')
  for name, (group, key) in compare.SCORES.items():
    best = run.best_baseline(group, key)
    series[group, name] = [s.evaluation[group][key] for s in run.scored] + (
      [best[0]] if best else []
    )
  plots.stage_bars(_path(run, 'stages.png'), labels, series)
  last = run.scored[-1].evaluation
  beside = ' beside the best free baseline of each score' * bool(run.baselines)
  return Figure(
    f'{FOLDER}/stages.png',
    'Scores per stage',
    f'Accuracy over all and macro-F1 per group{beside}; higher is better. '
    f'n = {last["all"]["n"]:,} test events ({last["anchor"]["n"]:,} anchor, '
    f'{last["tail"]["n"]:,} tail).',
    'Bars per stage: '
    + '; '.join(
      f'{name} '
      + ', '.join(
        f'{label.replace(chr(10), " ")} {value:.3f}'
        for label, value in zip(labels, values, strict=True)
      )
      for (_, name), values in series.items()
    )
    + '.',
  )


def _changes(run: run_files.RunFiles, outcome: Outcome | None) -> Figure | None:
  panels = {
    against: [c for c in changes if c.interval]
    for against, changes in (outcome.contrasts if outcome else {}).items()
  }
  panels = {against: changes for against, changes in panels.items() if changes}
  if not panels:
    return None
  plots.change_intervals(_path(run, 'changes.png'), panels)
  return Figure(
    f'{FOLDER}/changes.png',
    'Changes and their uncertainty',
    f'What {outcome.final} changed against each other predictor, with 95 % '
    'intervals. Right of zero is better; a hollow mark is within its '
    f'uncertainty. n = {outcome.samples["all"]:,} test events of '
    f'{outcome.users:,} users.',
    'Points with intervals: '
    + '; '.join(
      f'against {against} ' + ', '.join(f'{c.score} {c.size:+.3f}' for c in changes)
      for against, changes in panels.items()
    )
    + '.',
  )


def _trade_off(run: run_files.RunFiles) -> Figure | None:
  curves = {stage.name: stage.log_p('test') for stage in run.scored}
  curves = {name: log_p for name, log_p in curves.items() if log_p is not None}
  # Without both groups there is nothing to trade.
  if not curves or run.anchor.all() or not run.anchor.any():
    return None
  stage = run.predicting[-1]
  samples, true = stage.column('sample'), run.encode(stage.column('behavior'))
  curves['markov'] = run.baseline_counts.scores('markov', samples)
  curves = {
    name: adjust.trade_off(adjust.first_choices(log_p, run.log_prior), true, run.anchor)
    for name, log_p in curves.items()
  }
  plots.trade_off_curves(_path(run, 'trade_off.png'), {'': curves}, adjust.TAUS)
  return Figure(
    f'{FOLDER}/trade_off.png',
    'Anchors against tail',
    'What each predictor reaches when rare names are raised (towards the '
    f'upper left) or lowered, tau from {adjust.TAUS[0]} to '
    f'{adjust.TAUS[-1]}; the large mark is the predictor as it is. A curve '
    'further up and right is better at every balance. '
    f'n = {len(true):,} test events.',
    'Curves of tail against anchor macro-F1; the best tail macro-F1 of each '
    'is '
    + ', '.join(f'{name} {points[:, 1].max():.3f}' for name, points in curves.items())
    + '.',
  )


def _f1(run: run_files.RunFiles) -> Figure | None:
  # The untuned model's alone, if nothing was trained.
  stages = [s for s in run.predicting if s.key != 'base'] or run.predicting
  if not stages:
    return None
  counts = run.counts
  panels = {s.name: run.per_behavior(s)[2] for s in stages}
  plots.f1_against_frequency(_path(run, 'f1.png'), panels, counts, run.anchor)
  return Figure(
    f'{FOLDER}/f1.png',
    'F1 against training frequency',
    f'One mark per behavior, n = {len(counts):,} behaviors, from '
    f'{len(stages[-1].right):,} test events; behaviors without a test event '
    'lie at 0'
    + ', those without a training event left of 1' * bool((counts == 0).any())
    + '.',
    'Scatter of F1 against training events; mean F1 '
    + '; '.join(f'{name} {f1.mean():.3f}' for name, f1 in panels.items())
    + '.',
  )


def _difficulty(run: run_files.RunFiles) -> Figure | None:
  rows = run_files.read_parquet(run.workdir / 'b_tuning/difficulty.parquet')
  if rows is None or not rows.num_rows:
    return None
  plots.difficulty_histogram(
    _path(run, 'difficulty.png'),
    rows.column('score').to_numpy(),
    np.array(rows.column('group').to_pylist()),
    run_files.read_json(run.workdir / 'b_tuning/config.json', {})
    .get('difficulty', {})
    .get('score', 'nll'),
  )
  return Figure(
    f'{FOLDER}/difficulty.png',
    'Difficulty of the candidates',
    'How hard each training event scored for the balanced stage was for '
    f'the model before it; n = {rows.num_rows:,} training events.',
    'Histogram of difficulty for anchor and tail behaviors.',
  )


def _targets(run: run_files.RunFiles) -> Figure | None:
  plans = {s.name: s.folder / 'plan.parquet' for s in run.stages}
  plans = {name: plan for name, plan in plans.items() if plan.is_file()}
  if not plans:
    return None
  order = run.by_frequency  # Anchors then lie left of all tail behaviors.
  panels = {}
  for stage, plan in plans.items():
    drawn = np.bincount(
      run.events.behavior[run_files.plan_targets(plan)],
      minlength=len(run.events.behaviors),
    )
    panels[stage] = drawn[order]
  plots.drawn_targets(
    _path(run, 'targets.png'),
    panels,
    [run.behaviors[i]['name'] for i in order],
    run.anchor[order],
  )
  return Figure(
    f'{FOLDER}/targets.png',
    'What each plan drew',
    'How often each behavior was taught, most frequent behavior first; '
    f'n = {len(order):,} behaviors.',
    'Bars of targets per behavior: '
    + '; '.join(
      f'{stage} {int(drawn.sum()):,} targets over {int((drawn > 0).sum()):,} behaviors'
      for stage, drawn in panels.items()
    )
    + '.',
    wide=True,
  )


def _loss(run: run_files.RunFiles) -> Figure | None:
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
  plots.loss_curves(_path(run, 'loss.png'), panels)
  steps = ', '.join(
    f'{name} n = {len(curves[0]):,} steps' for name, curves in panels.items()
  )
  return Figure(
    f'{FOLDER}/loss.png',
    'Loss',
    f'Loss per answer token while training, in nats; lower is better. '
    f'{steps[0].upper()}{steps[1:]}.',
    'Loss against step: '
    + '; '.join(
      f'{name} from {curves[1][0]:.2f} to {curves[1][-1]:.2f}'
      for name, curves in panels.items()
    )
    + '.',
    wide=len(panels) > 1,
  )
