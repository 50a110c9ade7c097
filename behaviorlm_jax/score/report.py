"""report.md: the whole run on one page, written from the work directory.

Reads files only, so a report can be written again at any time and by anyone
who has the directory. Every stage may be missing: a table or plot shows what
is there. Numbers come from evaluation.json where it holds them; splits,
intervals and examples from predictions.parquet.
"""

from pathlib import Path

import numpy as np

from behaviorlm_jax.data.events import open_events
from behaviorlm_jax.score import examples
from behaviorlm_jax.score import metrics
from behaviorlm_jax.score import plots
from behaviorlm_jax.score import run_files
from behaviorlm_jax.score import tables


def write(workdir, title, decode=None) -> None:
  """Writes workdir/report.md and its plots in workdir/report/.

  Args:
    decode: callable, token ids to text; shows the end of example prompts.
  """
  run = run_files.load(Path(workdir))
  sections = {
      'Data': [tables.data_table(run)],
      'Results': [tables.results_table(run), tables.groups_table(run)],
      'True behavior in the context or not': [tables.context_table(run)],
      'Plots': draw(run),
      'Worked examples': examples.show(run, decode),
      'Files and configuration': [
          tables.files_table(run), tables.config_table(run)]}
  parts = [f'# {tables.cell(title)}', summary(run)]
  for heading, body in sections.items():
    if any(body):
      parts += [f'## {heading}', *filter(None, body)]
  text = '\n\n'.join(parts) + '\n'
  (run.workdir / 'report.md').write_text(text, encoding='utf-8')


# --- text -----------------------------------------------------------------


def summary(run) -> str:
  anchors = int(run.anchor.sum())
  text = [
      f'The log holds {tables.number(run.summary.get("events"))} events of '
      f'{tables.number(run.summary.get("users"))} users and '
      f'{len(run.behaviors)} behaviors that can be predicted, {anchors} of '
      f'them anchors and {len(run.behaviors) - anchors} tail.']
  model = {str(address) for s in run.stages
           if (address := s.config.get('model', {}).get('address'))}
  if model:
    text.append(f'The model is {tables.cell(", ".join(sorted(model)))}.')
  scored = [s for s in run.stages if s.evaluation]
  if scored:
    text += _headlines(run, scored)
  return ' '.join(text + intervals(run))


def _headlines(run, scored) -> list[str]:
  """The three main scores, stage by stage, beside the best baseline."""
  last = scored[-1].evaluation
  text = [
      f'Scored are n = {last["all"]["n"]:,} events of the test split '
      f'({last["anchor"]["n"]:,} anchor, {last["tail"]["n"]:,} tail), in the '
      'order ' + ' → '.join(stage.name for stage in scored) + '.']
  for group, key, name in (
      ('all', 'accuracy@1', 'Accuracy'), ('tail', 'f1_macro', 'Tail macro-F1'),
      ('anchor', 'f1_macro', 'Anchor macro-F1')):
    line = ' → '.join(tables.fraction(s.evaluation[group][key]) for s in scored)
    best = run.best_baseline(group, key)
    beside = f' (best free baseline {best[0]:.3f}, {best[1]})' if best else ''
    text.append(f'{name}: {line}{beside}.')
  return text


def intervals(run) -> list[str]:
  """Bootstrap sentences: final tail macro-F1, and its change from A to B."""
  if not run.predicting or run.anchor.all():
    return []
  final = run.predicting[-1]
  draws = _tail_draws(run, final)
  text = [f'95 % interval of the final tail macro-F1 ({final.name}), from a '
          f'bootstrap over users: {_interval(draws)}.']
  pair = [s for s in run.predicting if s.key != 'base']
  if len(pair) == 2 and np.array_equal(
      pair[0].column('sample'), pair[1].column('sample')):
    before = _tail_draws(run, pair[0])
    change = _tail_f1(run, final) - _tail_f1(run, pair[0])
    text.append(f'Change of tail macro-F1 from {pair[0].name} to '
                f'{final.name}: {change:+.3f}, 95 % interval '
                f'{_interval(draws - before)}.')
  return text


def _tail_draws(run, stage):
  return metrics.bootstrap_macro_f1(
      run.encode(stage.column('behavior')),
      run.encode(stage.column('predicted')), ~run.anchor,
      stage.column('user'))


def _tail_f1(run, stage):
  return _f1(run, stage)[~run.anchor].mean()


def _f1(run, stage):
  """F1 of every behavior: float64[Y]."""
  return metrics.per_behavior(
      run.encode(stage.column('behavior')),
      run.encode(stage.column('predicted')), len(run.behaviors))[2]


def _interval(draws):
  low, high = np.quantile(draws, [0.025, 0.975])
  return f'{low:.3f} to {high:.3f}'


# --- plots ----------------------------------------------------------------


def draw(run) -> list[str]:
  """Draws what the files allow; returns the Markdown of each image."""
  folder = run.workdir / 'report'
  titles = {
      'stages.png': ('Scores per stage', _draw_stages),
      'f1.png': ('F1 against training frequency', _draw_f1),
      'difficulty.png': ('Difficulty of the scored samples',
                         _draw_difficulty),
      'targets.png': ('What each plan drew', _draw_targets),
      'loss.png': ('Loss', _draw_loss)}
  return [
      f'![{title}](report/{name})'
      for name, (title, function) in titles.items()
      if function(run, folder / name)]


def _draw_stages(run, path) -> bool:
  scored = [s for s in run.stages if s.evaluation]
  if not scored:
    return False
  labels, series = [s.name for s in scored], {}
  if run.baselines:
    labels.append('best baseline\nof each score')
  for group, key, text in (
      ('tail', 'f1_macro', 'tail macro-F1'),
      ('anchor', 'f1_macro', 'anchor macro-F1'),
      ('all', 'accuracy@1', 'accuracy, all')):
    best = run.best_baseline(group, key)
    series[group, text] = [s.evaluation[group][key] for s in scored] + (
        [best[0]] if best else [])
  plots.stage_bars(path, labels, series)
  return True


def _draw_f1(run, path) -> bool:
  stages = [s for s in run.predicting if s.key != 'base'] or run.predicting
  if not stages:
    return False
  counts = np.array([row['train_count'] for row in run.behaviors])
  plots.f1_against_frequency(
      path, {s.name: _f1(run, s) for s in stages}, counts, run.anchor)
  return True


def _draw_difficulty(run, path) -> bool:
  rows = run_files.read_table(run.workdir / 'b_tuning/difficulty.parquet')
  if rows is None or not rows.num_rows:
    return False
  plots.difficulty_histogram(
      path, rows.column('score').to_numpy(),
      np.array(rows.column('group').to_pylist()))
  return True


def _draw_targets(run, path) -> bool:
  plans = {s.name: s.folder / 'plan.parquet' for s in run.stages}
  plans = {name: plan for name, plan in plans.items() if plan.is_file()}
  if not plans:
    return False
  events = open_events(run.workdir / 'events')
  names = [behavior.name for behavior in events.behaviors]
  order = sorted(
      range(len(run.behaviors)),
      key=lambda i: (-run.behaviors[i]['train_count'], i))
  panels = {}
  for stage, plan in plans.items():
    drawn = np.bincount(
        events.behavior[run_files.plan_targets(plan)], minlength=len(names))
    count = dict(zip(names, drawn.tolist(), strict=True))
    panels[stage] = np.array([count[run.behaviors[i]['name']] for i in order])
  plots.drawn_targets(
      path, panels, [run.behaviors[i]['name'] for i in order],
      run.anchor[order])
  return True


def _draw_loss(run, path) -> bool:
  panels = {}
  for stage in run.stages:
    rows = run_files.read_json_lines(stage.folder / 'metrics.jsonl')
    curves = [
        [row[field] for row in rows if row.get(key) is not None]
        for key in ('loss', 'val_loss') for field in ('step', key)]
    if curves[0]:
      panels[stage.name] = curves
  if panels:
    plots.loss_curves(path, panels)
  return bool(panels)
