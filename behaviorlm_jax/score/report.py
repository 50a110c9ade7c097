"""report.md: the whole run on one page, written from the work directory.

Reads files only, so a report can be written again at any time and by anyone
who has the directory. Every stage may be missing: a table or plot shows what
is there. Numbers come from evaluation.json where it holds them; splits,
intervals and examples from predictions.parquet.
"""

import collections
import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behaviorlm_jax.data.events import open_events
from behaviorlm_jax.score import metrics, plots

STAGES = {'base': 'untuned', 'a_tuning': 'A-Tuning', 'b_tuning': 'B-Tuning'}
EXAMPLES = 10
PROMPT_LINES = 6
FILES = (  # of the work directory, in the order in which they come to be
    ('events/', 'the sorted log, its behaviors, counts and rejected rows'),
    ('base/', 'evaluation and predictions of the untuned model'),
    ('baselines.json', 'scores of the four free baselines'),
    ('a_tuning/', 'stage 1: config, plan, metrics, checkpoints, adapter, '
     'evaluation, predictions'),
    ('b_tuning/', 'stage 2: the same files and `difficulty.parquet`'),
    ('report/', 'the plots of this page'))


@dataclasses.dataclass(frozen=True)
class Stage:
  """The files of one stage; None or empty where a file is missing."""
  key: str
  folder: Path
  config: dict
  evaluation: dict | None
  predictions: pa.Table | None

  @property
  def name(self):
    if self.key == 'b_tuning' and 'one_stage' in self.ablations:
      return 'one stage'
    return STAGES[self.key]

  @property
  def ablations(self):
    return list(self.config.get('ablations') or [])

  @functools.cached_property
  def right(self):
    """bool[n], whether the first choice is the true behavior."""
    return self.column('behavior') == self.column('predicted')

  def column(self, name):
    return np.array(self.predictions.column(name).to_pylist())

  def find(self, sample) -> dict | None:
    """The prediction row of an event, or None where it was not evaluated."""
    index = pc.index(self.predictions.column('sample'), sample).as_py()
    if index < 0:
      return None
    return self.predictions.slice(index, 1).to_pylist()[0]


@dataclasses.dataclass(frozen=True)
class Run:
  """What the work directory holds, in the form that the sections need."""
  workdir: Path
  summary: dict
  behaviors: list  # the candidate list: dicts name, train_count, group
  unseen: int  # behaviors of the test split only
  baselines: dict
  stages: list

  @functools.cached_property
  def ids(self):
    return {row['name']: i for i, row in enumerate(self.behaviors)}

  @functools.cached_property
  def anchor(self):
    return np.array([b['group'] == 'anchor' for b in self.behaviors], bool)

  @functools.cached_property
  def predicting(self):
    return [s for s in self.stages if s.predictions is not None]

  def encode(self, names):
    return np.array([self.ids[name] for name in names], np.int64)

  def best_baseline(self, group, key):
    """(score, name) of the baseline that is best in this very score."""
    found = [(s[group][key], name) for name, s in self.baselines.items()]
    return max(found, key=lambda pair: pair[0], default=None)


def write(workdir, title, decode=None) -> None:
  """Writes workdir/report.md and its plots in workdir/report/.

  Args:
    decode: callable, token ids to text; shows the end of example prompts.
  """
  run = load(Path(workdir))
  sections = {
      'Data': [data_table(run)],
      'Results': [results_table(run), groups_table(run)],
      'True behavior in the context or not': [context_table(run)],
      'Plots': draw(run),
      'Worked examples': examples(run, decode),
      'Files and configuration': [files_table(run), config_table(run)]}
  parts = [f'# {cell(title)}', summary(run)]
  for heading, body in sections.items():
    if any(body):
      parts += [f'## {heading}', *filter(None, body)]
  text = '\n\n'.join(parts) + '\n'
  (run.workdir / 'report.md').write_text(text, encoding='utf-8')


def load(workdir) -> Run:
  behaviors = _json(workdir / 'events/behaviors.json', [])
  known = [row for row in behaviors if row['group'] != 'unseen']
  stages = [
      Stage(
          key, folder, _json(folder / 'config.json', {}),
          _json(folder / 'evaluation.json', None),
          _parquet(folder / 'predictions.parquet'))
      for key in STAGES if (folder := workdir / key).is_dir()]
  return Run(
      workdir, _json(workdir / 'events/summary.json', {}), known,
      len(behaviors) - len(known), _json(workdir / 'baselines.json', {}),
      stages)


# --- text -----------------------------------------------------------------


def summary(run) -> str:
  anchors = int(run.anchor.sum())
  text = [
      f'The log holds {_number(run.summary.get("events"))} events of '
      f'{_number(run.summary.get("users"))} users and '
      f'{len(run.behaviors)} behaviors that can be predicted, {anchors} of '
      f'them anchors and {len(run.behaviors) - anchors} tail.']
  model = {str(address) for s in run.stages
           if (address := s.config.get('model', {}).get('address'))}
  if model:
    text.append(f'The model is {cell(", ".join(sorted(model)))}.')
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
    line = ' → '.join(_fraction(s.evaluation[group][key]) for s in scored)
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


# --- tables ---------------------------------------------------------------


def data_table(run) -> str:
  anchors = int(run.anchor.sum())
  rows = [(key.replace('_', ' '), _value(value))
          for key, value in run.summary.items()]
  shown = set(run.summary)
  rows += [(name, _number(value)) for name, value in (
      ('behaviors', len(run.behaviors)), ('anchors', anchors),
      ('tails', len(run.behaviors) - anchors),
      ('unseen', run.unseen)) if name not in shown]
  return table(('what', 'value'), rows)


def _scored(run):
  """(name, evaluation) of baselines and stages that have one."""
  return list(run.baselines.items()) + [
      (s.name, s.evaluation) for s in run.stages if s.evaluation]


def results_table(run) -> str:
  keys = ('accuracy@1', 'accuracy@3', 'accuracy@5', 'ndcg@5', 'f1_weighted',
          'f1_macro')
  rows = [(name, *(_fraction(scores['all'][key]) for key in keys))
          for name, scores in _scored(run)]
  head = ('all behaviors', *(key.replace('_', ' ') for key in keys))
  return table(head, rows)


def groups_table(run) -> str:
  keys = ('accuracy@1', 'precision_weighted', 'f1_macro')
  head, rows = ['by group'], []
  for group in ('anchor', 'tail'):
    head += [f'{group} n', *(f'{group} {k.replace("_", " ")}' for k in keys)]
  for name, scores in _scored(run):
    row = [name]
    for group in ('anchor', 'tail'):
      row += [_number(scores[group]['n'])]
      row += [_fraction(scores[group][key]) for key in keys]
    rows.append(row)
  return table(head, rows)


def context_table(run) -> str:
  """How much of each stage's skill is copying from its context."""
  head = ['stage']
  for where in ('in context', 'not in context'):
    head += [f'{where}: n', 'accuracy@1', 'mean log p']
  rows = []
  for stage in run.predicting:
    inside, log_prob = stage.column('in_context'), stage.column('log_prob')
    row = [stage.name]
    for mask in (inside, ~inside):
      row += [_number(int(mask.sum()))]
      row += [f'{values[mask].mean():.3f}' if mask.any() else '-'
              for values in (stage.right, log_prob)]
    rows.append(row)
  return table(head, rows)


def files_table(run) -> str:
  return table(('file', 'content'), [
      (f'`{name}`', what) for name, what in FILES
      if (run.workdir / name).exists()])


def config_table(run) -> str:
  """One row per trained stage; the whole config is in its config.json."""
  keys = ('steps', 'batch', 'length', 'learning_rate')
  rows = []
  for stage in run.stages:
    if stage.config and stage.key != 'base':
      train = stage.config.get('train', {})
      rows.append((
          stage.name, *(_value(train.get(key, '-')) for key in keys),
          _value(stage.config.get('seed', '-')),
          _value(stage.ablations), f'`{stage.key}/config.json`'))
  head = ('stage', 'steps', 'batch (rows)', 'length (tokens)',
          'learning rate', 'seed', 'ablations', 'whole config')
  return table(head, rows)


def table(head, rows) -> str:
  """A Markdown table; empty without rows."""
  if not rows:
    return ''
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(
      '| ' + ' | '.join(cell(value) for value in line) + ' |'
      for line in lines)


def cell(value) -> str:
  """Text from the log made harmless in Markdown: one line, no column break."""
  text = ' '.join(str(value).split())
  for character in '\\|<*':
    text = text.replace(character, '\\' + character)
  return text


def _fraction(value):
  return f'{value:.3f}'


def _number(value):
  return f'{value:,}' if isinstance(value, int) else '-'


def _value(value):
  """Any JSON value as one cell."""
  if isinstance(value, dict):
    return ', '.join(f'{key} {_value(item)}' for key, item in value.items())
  if isinstance(value, list):
    return '; '.join(_value(item) for item in value) or 'none'
  if isinstance(value, bool) or not isinstance(value, int):
    return str(value)
  return _number(value)


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
  rows = _parquet(run.workdir / 'b_tuning/difficulty.parquet')
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
        events.behavior[plan_targets(plan)], minlength=len(names))
    count = dict(zip(names, drawn.tolist(), strict=True))
    panels[stage] = np.array([count[run.behaviors[i]['name']] for i in order])
  plots.drawn_targets(
      path, panels, [run.behaviors[i]['name'] for i in order],
      run.anchor[order])
  return True


def plan_targets(path):
  """Event positions of all targets of a plan, repeats included: int64[n]."""
  rows = pq.read_table(path, columns=['segments'])
  segments = pc.list_flatten(rows.column('segments').combine_chunks())
  windows = segments.filter(pc.equal(segments.field('kind'), 'window'))
  return pc.list_flatten(windows.field('targets')).to_numpy(
      zero_copy_only=False).astype(np.int64)


def _draw_loss(run, path) -> bool:
  panels = {}
  for stage in run.stages:
    rows = _json_lines(stage.folder / 'metrics.jsonl')
    curves = [
        [row[field] for row in rows if row.get(key) is not None]
        for key in ('loss', 'val_loss') for field in ('step', key)]
    if curves[0]:
      panels[stage.name] = curves
  if panels:
    plots.loss_curves(path, panels)
  return bool(panels)


# --- worked examples ------------------------------------------------------


def pick(groups, right, count=EXAMPLES, seed=0):
  """Rows for worked examples: int64[<= count], a mix of group and outcome.

  Each of (group, right or wrong) gets a seeded order; rows are then taken
  from them in turn until enough stand, so no kind crowds out another.
  """
  order = np.random.default_rng(seed).permutation(len(right)).tolist()
  kinds = collections.defaultdict(list)
  for i in order:
    kinds[str(groups[i]), bool(right[i])].append(i)
  turns = sorted(
      (turn, kind, i) for kind, members in kinds.items()
      for turn, i in enumerate(members))
  return np.array([i for _, _, i in turns[:count]], np.int64)


def examples(run, decode=None) -> list[str]:
  """Markdown of ten predictions of the last stage, the other stages beside."""
  if not run.predicting:
    return []
  final = run.predicting[-1]
  chosen = pick(final.column('group'), final.right)
  return [_example(run, final, number, int(i), decode)
          for number, i in enumerate(chosen, 1)]


def _example(run, final, number, index, decode) -> str:
  row = final.predictions.slice(index, 1).to_pylist()[0]
  where = 'in' if row['in_context'] else 'not in'
  parts = [
      f'### {number}. {row["group"]}, '
      f'{"right" if final.right[index] else "wrong"}: {cell(row["behavior"])}',
      f'User {cell(row["user"])}, {row["time"]:%A %Y-%m-%d %H:%M}; the true '
      f'behavior, **{cell(row["behavior"])}**, stands {where} the context.']
  if decode:
    lines = decode(row['prompt_tokens']).split('\n')[-PROMPT_LINES:]
    # Indented code: the only block that no text of the log can close.
    parts.append('\n'.join('    ' + line for line in lines))
  choices = []
  for stage in run.predicting:
    found = stage.find(row['sample'])
    if found:
      hit = found['top5'][0] == found['behavior']
      choices.append((
          stage.name, found['top5'][0],
          _fraction(np.exp(found['top5_log_prob'][0])), '✓' if hit else '✗'))
  parts.append(table(('stage', 'first choice', 'p', 'right'), choices))
  top = ' · '.join(
      f'{cell(name)} {np.exp(log_prob):.3f}' for name, log_prob
      in zip(row['top5'], row['top5_log_prob'], strict=True))
  parts.append(f'Top five of {final.name}: {top}')
  return '\n\n'.join(parts)


# --- files ----------------------------------------------------------------


def _json(path, missing):
  if not path.is_file():
    return missing
  return json.loads(path.read_text(encoding='utf-8'))


def _json_lines(path):
  if not path.is_file():
    return []
  return [json.loads(line)
          for line in path.read_text(encoding='utf-8').splitlines() if line]


def _parquet(path):
  return pq.read_table(path) if path.is_file() else None
