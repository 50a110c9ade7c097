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
Decode = Callable[[list[int]], str]  # Token ids as text.


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


def draw_one(run: RunFiles, decode: Decode | None = None) -> list[Block]:
  """Blocks of one prediction of the last stage, an event drawn at random."""
  if not run.predicting or not len(run.predicting[-1].right):
    return []
  final = run.predicting[-1]
  drawn = np.random.default_rng(0).integers(len(final.right))
  (row,) = final.predictions.slice(drawn, 1).to_pylist()
  outcome = 'right' if row['behavior'] == row['predicted'] else 'wrong'
  said = (
    'A test event drawn at random: the last lines of a log, and how '
    f'{final.name} goes on. Its first choice is {outcome}; what happened was '
  )
  return [Text(said, Strong(row['behavior']), '.'), *_answer(final.name, row, decode)]


def show(run: RunFiles, decode: Decode | None = None) -> list[Block]:
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
    blocks += _question(number, row, when) + _answer(final.name, row, decode)
    choices = [(name, *_choices(other)[0]) for name, other in rows.items()]
    blocks.append(Table(('stage', 'first choice', 'p', 'right'), choices))
  return blocks


def _question(number: int, row: dict, when: str) -> list[Block]:
  outcome = 'right' if row['predicted'] == row['behavior'] else 'wrong'
  return [
    Heading(2, f'{number}. {row["group"]}, {outcome}: {row["behavior"]}'),
    Text(
      f'User {row["user"]}, {row["time"]:{when}}; the true behavior, ',
      Strong(row['behavior']),
      f', stands {"in" if row["in_context"] else "not in"} the context.',
    ),
  ]


def _answer(name: str, row: dict, decode: Decode | None) -> list[Block]:
  """The end of what the model was shown, and its five likeliest continuations."""
  table = Table((f'likeliest of {name}', 'p', 'right'), _choices(row))
  if not decode:
    return [table]
  # Its end alone: the question, and the last of what the model was shown.
  lines = decode(row['prompt_tokens']).split('\n')[-PROMPT_LINES:]
  return [Listing('\n'.join(lines)), table]


def _rows(stage: StageFiles, samples: np.ndarray) -> dict[int, dict]:
  """{sample: its row}, of those that the stage predicted."""
  chosen = pc.is_in(stage.predictions.column('sample'), pa.array(samples))
  return {row['sample']: row for row in stage.predictions.filter(chosen).to_pylist()}


def _choices(row: dict) -> list[tuple[str, float, bool]]:
  """(name, p, whether it is right) of the five likeliest, best first."""
  top = zip(row['top5'], np.exp(row['top5_log_prob']).tolist(), strict=True)
  return [(name, p, name == row['behavior']) for name, p in top]
