"""The whole run on one page: report.md, and report.html, which is one file.

Both are rendered from the same list of blocks. Reads files only, so a report
can be written again at any time and by anyone who has the directory. Every
stage may be missing: a table or figure shows what is there. Numbers come from
evaluation.json where it holds them; splits, intervals and examples from
predictions.parquet.
"""

from collections.abc import Callable
from pathlib import Path

from behaviorlm_jax.io import files
from behaviorlm_jax.report import blocks, compare, examples, figures, page, tables
from behaviorlm_jax.report.blocks import Block, Details, Heading, Strong, Text
from behaviorlm_jax.report.run_files import read_run, RunFiles
from behaviorlm_jax.report.verdict import Outcome, verdict


def write_report(
  workdir: str | Path, title: str, decode: Callable[[list[int]], str] | None = None
) -> None:
  """Writes report.md, report.html and the figures of report/ in `workdir`.

  `decode` turns token ids into text; it shows the end of example prompts.
  """
  run = read_run(Path(workdir))
  outcome = compare.outcome(run)
  content = [Heading(1, title), *_first_screen(run, outcome)]
  for heading, body in _sections(run, outcome, decode).items():
    # A stage that did not run leaves no block, and an empty section no heading.
    body = list(filter(None, body))
    if body:
      content += [Heading(2, heading), *body]
  files.write_text(run.workdir / 'report.md', blocks.markdown(content))
  files.write_text(run.workdir / 'report.html', page.html(title, content, run.workdir))


def _first_screen(run: RunFiles, outcome: Outcome | None) -> list[Block]:
  """What is read if nothing else is."""
  said = [Text(' '.join([*_data(run), *_headlines(run)]))]
  if outcome:
    said.insert(0, Text(Strong('Verdict.'), ' ' + verdict(outcome), lead=True))
  return said


def _sections(
  run: RunFiles, outcome: Outcome | None, decode: Callable[[list[int]], str] | None
) -> dict[str, list[Block]]:
  """In the order of a reader's questions: what came out, then of what and how.

  Draws the figures on the way.
  """
  many = tables.behaviors(run)
  summary = f'Scores of all {len(many.rows):,} behaviors'
  return {
    'Results': [tables.results(run), tables.groups(run), tables.changes(outcome)],
    'Figures': figures.draw(run, outcome),
    'True behavior in the context or not': [tables.context(run)],
    'What the model still knows': [tables.retention(run)],
    'Every behavior': [many and Details(summary, [many])],
    'Worked examples': examples.show(run, decode),
    'Data': [tables.data(run)],
    'Time': [tables.times(run)],
    'Configuration': [tables.config(run)],
  }


def _data(run: RunFiles) -> list[str]:
  """Sentences on the log and the model."""
  anchors = int(run.anchor.sum())
  models = {stage.config['model']['address'] for stage in run.stages if stage.config}
  return [
    f'The log holds {run.summary["events"]:,} events of {run.summary["users"]:,} users '
    f'and {len(run.behaviors):,} behaviors that can be predicted, {anchors:,} of '
    f'them anchors and {len(run.behaviors) - anchors:,} tail.',
    *([f'The model is {", ".join(sorted(models))}.'] if models else []),
  ]


def _headlines(run: RunFiles) -> list[str]:
  """The three main scores, stage by stage, beside the best baseline."""
  if not run.scored:
    return []
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
