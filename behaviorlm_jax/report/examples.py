"""Worked examples of the report: single predictions, stage beside stage."""

import collections
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behaviorlm_jax.report.blocks import Block, Heading, Listing, Strong, Table, Text
from behaviorlm_jax.report.run_files import RunFiles, StageFiles

EXAMPLES = 10
PROMPT_LINES = 6


def pick(
  groups: np.ndarray, right: np.ndarray, count: int = EXAMPLES, seed: int = 0
) -> np.ndarray:
  """Rows for worked examples: int64[<= count], a mix of group and outcome.

  Each of (group, right or wrong) gets a seeded order; rows are then taken
  from them in turn until enough stand, so no kind crowds out another.
  """
  order = np.random.default_rng(seed).permutation(len(right)).tolist()
  kinds = collections.defaultdict(list)
  for i in order:
    kinds[str(groups[i]), bool(right[i])].append(i)
  # All first ones, then all second ones: the turn is what is sorted by first.
  turns = sorted(
    (turn, kind, i) for kind, members in kinds.items() for turn, i in enumerate(members)
  )
  return np.array([i for _, _, i in turns[:count]], np.int64)


def show(
  run: RunFiles, decode: Callable[[list[int]], str] | None = None
) -> list[Block]:
  """Blocks of ten predictions of the last stage, the other stages beside."""
  if not run.predicting:
    return []
  final = run.predicting[-1]
  samples = final.column('sample')[pick(final.column('group'), final.right)]
  found = {stage.name: _rows(stage, samples) for stage in run.predicting}
  when = '%A %Y-%m-%d' + ' %H:%M' * run.summary['clock']
  blocks = []
  for number, sample in enumerate(samples.tolist(), 1):
    # A stage of another draw of test events may not have this one.
    rows = {name: rows[sample] for name, rows in found.items() if sample in rows}
    row = rows[final.name]
    blocks += _question(number, row, when)
    if decode:
      # Its end alone: the question, and the last of what the model was shown.
      lines = decode(row['prompt_tokens']).split('\n')[-PROMPT_LINES:]
      blocks.append(Listing('\n'.join(lines)))
    choices = [(name, *_first_choice(other)) for name, other in rows.items()]
    blocks.append(Table(('stage', 'first choice', 'p', 'right'), choices))
    top = zip(row['top5'], np.exp(row['top5_log_prob']), strict=True)
    listed = ' · '.join(f'{name} {p:.3f}' for name, p in top)
    blocks.append(Text(f'Top five of {final.name}: {listed}'))
  return blocks


def _question(number: int, row: dict, when: str) -> list[Block]:
  outcome = 'right' if row['predicted'] == row['behavior'] else 'wrong'
  return [
    Heading(3, f'{number}. {row["group"]}, {outcome}: {row["behavior"]}'),
    Text(
      f'User {row["user"]}, {row["time"]:{when}}; the true behavior, ',
      Strong(row['behavior']),
      f', stands {"in" if row["in_context"] else "not in"} the context.',
    ),
  ]


def _rows(stage: StageFiles, samples: np.ndarray) -> dict[int, dict]:
  """{sample: its row}, of those that the stage predicted."""
  chosen = pc.is_in(stage.predictions.column('sample'), pa.array(samples))
  return {row['sample']: row for row in stage.predictions.filter(chosen).to_pylist()}


def _first_choice(row: dict) -> tuple[str, float, bool]:
  first = row['top5'][0]
  return first, float(np.exp(row['top5_log_prob'][0])), first == row['behavior']
