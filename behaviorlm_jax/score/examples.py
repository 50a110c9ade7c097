"""Worked examples of the report: single predictions, stage beside stage."""

import collections

import numpy as np

from behaviorlm_jax.score.tables import cell
from behaviorlm_jax.score.tables import fraction
from behaviorlm_jax.score.tables import table

EXAMPLES = 10
PROMPT_LINES = 6


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


def show(run, decode=None) -> list[str]:
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
          fraction(np.exp(found['top5_log_prob'][0])), '✓' if hit else '✗'))
  parts.append(table(('stage', 'first choice', 'p', 'right'), choices))
  top = ' · '.join(
      f'{cell(name)} {np.exp(log_prob):.3f}' for name, log_prob
      in zip(row['top5'], row['top5_log_prob'], strict=True))
  parts.append(f'Top five of {final.name}: {top}')
  return '\n\n'.join(parts)
