"""Worked examples of the report: single predictions, stage beside stage."""

import collections
from collections.abc import Callable, Sequence

import numpy as np

from behaviorlm_jax.report import run_files
from behaviorlm_jax.report.blocks import Block, Heading, Listing, Strong, Table, Text

EXAMPLES = 10
PROMPT_LINES = 6


def pick(
  groups: Sequence[str] | np.ndarray,
  right: np.ndarray,
  count: int = EXAMPLES,
  seed: int = 0,
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
  run: run_files.RunFiles, decode: Callable[[list[int]], str] | None = None
) -> list[Block]:
  """Blocks of ten predictions of the last stage, the other stages beside."""
  if not run.predicting:
    return []
  final = run.predicting[-1]
  chosen = pick(final.column('group'), final.right)
  return [
    block
    for number, i in enumerate(chosen, 1)
    for block in _example(run, final, number, int(i), decode)
  ]


def _example(
  run: run_files.RunFiles,
  final: run_files.Stage,
  number: int,
  index: int,
  decode: Callable[[list[int]], str] | None,
) -> list[Block]:
  row = final.predictions.slice(index, 1).to_pylist()[0]
  outcome = 'right' if final.right[index] else 'wrong'
  where = 'in' if row['in_context'] else 'not in'
  when = '%A %Y-%m-%d' + ' %H:%M' * run.summary.get('clock', True)
  blocks = [
    Heading(3, f'{number}. {row["group"]}, {outcome}: {row["behavior"]}'),
    Text(
      f'User {row["user"]}, {row["time"]:{when}}; the true behavior, ',
      Strong(row['behavior']),
      f', stands {where} the context.',
    ),
  ]
  if decode:
    lines = decode(row['prompt_tokens']).split('\n')[-PROMPT_LINES:]
    blocks.append(Listing('\n'.join(lines)))
  choices = []
  for stage in run.predicting:
    found = stage.find(row['sample'])
    if found:
      choices.append(
        (
          stage.name,
          found['top5'][0],
          float(np.exp(found['top5_log_prob'][0])),
          found['top5'][0] == found['behavior'],
        )
      )
  blocks.append(Table(('stage', 'first choice', 'p', 'right'), choices))
  top = ' · '.join(
    f'{name} {np.exp(log_prob):.3f}'
    for name, log_prob in zip(row['top5'], row['top5_log_prob'], strict=True)
  )
  return [*blocks, Text(f'Top five of {final.name}: {top}')]
