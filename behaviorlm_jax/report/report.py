"""The whole run on one page: report.md, and report.html, which is one file.

What a person wants to know stands first: one sentence, one figure, one example.
All else is folded. Both files are rendered from the same list of blocks. Reads
files only, so a report can be written again at any time and by anyone who has
the directory. Every stage may be missing: a table or figure shows what is
there. Numbers come from evaluation.json where it holds them; splits, intervals
and examples from predictions.parquet and baselines.parquet.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from behaviorlm_jax.io import files
from behaviorlm_jax.report import blocks, compare, examples, figures, page, tables
from behaviorlm_jax.report import predictors as predictors_lib
from behaviorlm_jax.report.blocks import Block, Details, Figure, Heading, Mono, Text
from behaviorlm_jax.report.run_files import of_equal_n, read_run, RunFiles
from behaviorlm_jax.report.verdict import Change, headline, Outcome, verdict


def write_report(
  workdir: str | Path, title: str, decode: examples.Decode | None = None
) -> None:
  """Writes report.md, report.html and the figures of report/ in `workdir`.

  `decode` turns token ids into text; it shows the end of example prompts.
  """
  run, refused = of_equal_n(read_run(Path(workdir)))
  predictors, outcome = predictors_lib.list_predictors(run), compare.outcome(run)
  drawn = figures.draw(run, predictors)
  content = [
    Heading(1, title),
    *_first_screen(run, predictors, drawn.pop('predictors', None)),
    *_left_out(run, predictors, refused),
    *examples.draw_one(run, decode),
  ]
  folds = {
    **_results(run, predictors, outcome, drawn),
    'Worked examples': examples.show(run, decode),
    'Data': [Text(*_data(run)), tables.data(run)],
    'Time': [tables.times(run)],
    'Configuration': [tables.config(run)],
  }
  for summary, body in folds.items():
    # A stage that did not run leaves no block, and an empty section no fold.
    if body := list(filter(None, body)):
      content.append(Details(summary, body))
  files.write_text(run.workdir / 'report.md', blocks.markdown(content))
  files.write_text(run.workdir / 'report.html', page.html(title, content, run.workdir))


def _first_screen(
  run: RunFiles,
  predictors: Sequence[predictors_lib.PredictorFiles],
  figure: Figure | None,
) -> list[Block]:
  """What is read if nothing else is."""
  if not run.scored:
    return [Text('Nothing has been evaluated yet.', lead=True)]
  trained = [one for one in predictors if one.trained and one.arms]
  counting = [
    one for one in predictors if one.name == predictors_lib.COUNTING and one.arms
  ]
  said = []
  if trained and counting:
    best = max(trained, key=predictors_lib.mean_log_p)
    pair = counting[0].arms['accuracy'], best.arms['accuracy']
    before, change, interval = compare.paired([pair], 'log p')
    right = [arm.value('accuracy') for arm in reversed(pair)]
    found = Change('log p', predictors_lib.COUNTING, before, before + change, interval)
    said = [Text(headline(best.words, right, len(pair[0].true), found), lead=True)]
  return said + [figure] * bool(figure)


def _left_out(
  run: RunFiles,
  predictors: Sequence[predictors_lib.PredictorFiles],
  refused: Mapping[str, int],
) -> list[Block]:
  """A sentence each on what cannot be compared, and on what is missing."""
  said = []
  if refused:
    final = run.scored[-1]
    n = f'{final.evaluation["all"]["n"]:,}'
    other = ', '.join(f'{name} (n = {found:,})' for name, found in refused.items())
    text = f'Not compared with {final.name} (n = {n}), for tail macro-F1 grows with n: '
    said.append(Text(f'{text}{other}.'))
  if lacking := '; '.join(one.name for one in predictors if not one.arms):
    text = f'Operating points are missing of {lacking}: the files are older, or '
    said.append(Text(text, Mono('eval.validation_samples'), ' was 0.'))
  return said


def _results(
  run: RunFiles,
  predictors: Sequence[predictors_lib.PredictorFiles],
  outcome: Outcome | None,
  drawn: dict[str, Figure],
) -> dict[str, list[Block]]:
  """Folds in the order of a reader's questions."""
  said = [Text(verdict(outcome), lead=True)] if outcome else []
  said += [Text(' '.join(_headlines(run)))] if run.scored else []
  many = tables.behaviors(run)
  return {
    'The verdict in numbers': [*said, tables.changes(outcome)],
    'Scores of every predictor': [
      tables.results(predictors),
      tables.points(predictors),
      tables.groups(predictors),
    ],
    'How far probabilities can be trusted': [drawn.pop('reliability', None)],
    'Figures': list(drawn.values()),
    'True behavior in the context or not': [tables.context(run)],
    'What the model still knows': [tables.retention(run)],
    f'Scores of all {len(many.rows):,} behaviors': [many],
  }


def _data(run: RunFiles) -> list[str]:
  """Sentences on the log and the model."""
  anchors = int(run.anchor.sum())
  models = {stage.config['model']['address'] for stage in run.stages if stage.config}
  return [
    f'The log holds {run.summary["events"]:,} events of {run.summary["users"]:,} users '
    f'and {len(run.behaviors):,} behaviors that can be predicted, {anchors:,} of '
    f'them anchors and {len(run.behaviors) - anchors:,} tail.',
    *([f' The model is {", ".join(sorted(models))}.'] if models else []),
  ]


def _headlines(run: RunFiles) -> list[str]:
  """The three main scores, stage by stage, beside the best baseline."""
  last = run.scored[-1].evaluation
  text = [
    f'Scored are n = {last["all"]["n"]:,} events of the test split '
    f'({last["anchor"]["n"]:,} anchor, {last["tail"]["n"]:,} tail), in the '
    f'order {" → ".join(stage.name for stage in run.scored)}.'
  ]
  for name, (group, key) in compare.SCORES.items():
    line = ' → '.join(f'{s.evaluation[group][key]:.3f}' for s in run.scored)
    best = run.best_baseline(group, key)
    beside = f' (best free baseline {best[0]:.3f}, {best[1]})' if best else ''
    text.append(f'{name[0].upper()}{name[1:]}: {line}{beside}.')
  return text
