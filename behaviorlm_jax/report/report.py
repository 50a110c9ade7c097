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
from behaviorlm_jax.report import (
  blocks,
  compare,
  examples,
  figures,
  page,
  run_files,
  tables,
)
from behaviorlm_jax.report.blocks import Block, Details, Heading, Strong, Text
from behaviorlm_jax.report.verdict import verdict


def write_report(
  workdir: str | Path, title: str, decode: Callable[[list[int]], str] | None = None
) -> None:
  """Writes report.md, report.html and the figures of report/ in `workdir`.

  Args:
    decode: callable, token ids to text; shows the end of example prompts.
  """
  run = run_files.read_run(Path(workdir))
  content = contents(run, title, decode)
  files.write_text(run.workdir / 'report.md', blocks.markdown(content))
  files.write_text(run.workdir / 'report.html', page.html(title, content, run.workdir))


def contents(
  run: run_files.RunFiles, title: str, decode: Callable[[list[int]], str] | None = None
) -> list[Block]:
  """All that the report says, as blocks; draws the figures on the way."""
  outcome = compare.outcome(run)
  many = tables.behaviors(run)
  # In the order of a reader's questions: what came out, then of what and how.
  sections = {
    'Results': [tables.results(run), tables.groups(run), tables.changes(outcome)],
    'Figures': figures.draw(run, outcome),
    'True behavior in the context or not': [tables.context(run)],
    'What the model still knows': [tables.retention(run)],
    'Every behavior': many
    and [Details(f'Scores of all {len(many.rows):,} behaviors', [many])],
    'Worked examples': examples.show(run, decode),
    'Data': [tables.data(run)],
    'Time': [tables.times(run)],
    'Files and configuration': [tables.files(run), tables.config(run)],
  }
  content = [Heading(1, title)]
  if outcome:
    content.append(Text(Strong('Verdict.'), ' ' + verdict(outcome), lead=True))
  content.append(Text(summary_text(run)))
  for heading, body in sections.items():
    body = [block for block in body or [] if block]
    if body:
      content += [Heading(2, heading), *body]
  return content


def summary_text(run: run_files.RunFiles) -> str:
  anchors = int(run.anchor.sum())
  events, users = (run.summary.get(key, 0) for key in ('events', 'users'))
  text = [
    f'The log holds {events:,} events of {users:,} users and '
    f'{len(run.behaviors):,} behaviors that can be predicted, {anchors:,} of '
    f'them anchors and {len(run.behaviors) - anchors:,} tail.'
  ]
  model = {
    str(address)
    for s in run.stages
    if (address := s.config.get('model', {}).get('address'))
  }
  if model:
    text.append(f'The model is {", ".join(sorted(model))}.')
  return ' '.join(text + _headlines(run))


def _headlines(run: run_files.RunFiles) -> list[str]:
  """The three main scores, stage by stage, beside the best baseline."""
  if not run.scored:
    return []
  last = run.scored[-1].evaluation
  text = [
    f'Scored are n = {last["all"]["n"]:,} events of the test split '
    f'({last["anchor"]["n"]:,} anchor, {last["tail"]["n"]:,} tail), in the '
    'order ' + ' → '.join(stage.name for stage in run.scored) + '.'
  ]
  for name, (group, key) in compare.SCORES.items():
    line = ' → '.join(f'{s.evaluation[group][key]:.3f}' for s in run.scored)
    best = run.best_baseline(group, key)
    beside = f' (best free baseline {best[0]:.3f}, {best[1]})' if best else ''
    text.append(f'{name[0].upper()}{name[1:]}: {line}{beside}.')
  return text
