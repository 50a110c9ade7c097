"""The numbers of two tiny runs, as they were when somebody last meant them.

What is pinned in golden.json: which samples every step learns, its loss, and
the evaluation of the untuned model and of both stages; of the shipped defaults,
and of stage 2 of configs/paper.py after the same stage 1. Only what must be
small is set here.

  GOLDEN=write python -m pytest -n0 tests/test_golden.py

writes the file anew.
"""

import dataclasses
import importlib.util
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from behaviorlm_jax import config as config_lib
from behaviorlm_jax import run as run_lib
from behaviorlm_jax.data import plan as plan_lib

ROOT = Path(__file__).parents[1]
PATH = ROOT / 'tests/golden.json'
SMALL = {
  'model.address': 'random://tiny',
  'model.dtype': 'float32',
  'score.dtype': 'float32',
  'a.steps': 3,
  'train.batch': 4,
  'checkpoint.every': 3,
  'eval.max_samples': 24,
  'eval.validation_rows': 4,
  'eval.validation_samples': 24,
  'retention.conversations': 0.02,
}
# Rounding differs between processors, by the width of their vectors, and grows
# from step to step: 1e-6 was seen between one of 128 bits and one of 512. A
# change that anybody meant moves a loss by more than 1e-4.
CLOSE = 1e-4


def script(name):
  spec = importlib.util.spec_from_file_location(name, ROOT / f'configs/{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def numbers(workdir, read_rows):
  """What is pinned of a work directory."""
  found = {}
  for name in ('base', 'a_tuning', 'b_tuning'):
    folder, stage = workdir / name, {}
    if not folder.exists():
      continue
    found[name] = stage
    if name != 'base':
      plan = plan_lib.load(folder / 'plan.parquet', made_from(folder))
      # Of its rows alone: what it was made from names every setting.
      stage['plan'] = plan_lib.content_hash(dataclasses.replace(plan, made_from=''))
      rows = read_rows(folder / 'metrics.jsonl')
      stage['losses'] = [row['loss'] for row in rows]
      stage['val_losses'] = [row['val_loss'] for row in rows if 'val_loss' in row]
    table = parquet.read_table(folder / 'predictions.parquet')
    stage['log_p'] = float(np.mean(table['log_prob'].to_numpy()))
    stage['evaluation'] = json.loads((folder / 'evaluation.json').read_text())
    stage['retention'] = json.loads((folder / 'retention.json').read_text())
  return found


def made_from(folder):
  schema = parquet.read_schema(folder / 'plan.parquet')
  return schema.metadata[b'made_from'].decode()


def flat(value, name=''):
  """{dotted name: number or text} of nested dicts and lists."""
  if isinstance(value, dict):
    items = value.items()
  elif isinstance(value, list):
    items = enumerate(value)
  else:
    return {name: value}
  return {
    key: one
    for inside, part in items
    for key, one in flat(part, f'{name}/{inside}').items()
  }


@pytest.mark.usefixtures('compile_once')
def test_the_numbers_are_those_that_were_last_meant(
  make_log, tmp_path, monkeypatch, read_rows
):
  monkeypatch.setattr(run_lib.report, 'write_report', lambda *_: None)
  small = SMALL | {'data.events': str(make_log(tmp_path / 'log.csv'))}
  found = {}
  for name in ('default', 'paper'):
    config, workdir = config_lib.default(), tmp_path / name
    if name == 'paper':
      config = script('paper')
      config.stages, config.init_from = ('b',), str(tmp_path / 'default')
      for shared in ('events', 'base'):
        shutil.copytree(tmp_path / 'default' / shared, workdir / shared)
    config.update_from_flattened_dict(small)
    run_lib.run(config, workdir)
    found[name] = numbers(workdir, read_rows)
  if os.environ.get('GOLDEN') == 'write':
    PATH.write_text(json.dumps(found, indent=1, sort_keys=True) + '\n')
  meant, found = flat(json.loads(PATH.read_text())), flat(found)
  moved = [
    f'{name}: {meant.get(name)} was meant, {found.get(name)} found'
    for name in sorted(meant | found)
    if not _same(meant.get(name), found.get(name))
  ]
  assert not moved, (
    'If you did not intend this change, find its cause; if you did, say so '
    'in the commit and write the file anew: GOLDEN=write python -m pytest '
    '-n0 tests/test_golden.py\n' + '\n'.join(moved)
  )


def _same(one, other):
  if isinstance(one, float) and isinstance(other, float):
    return math.isclose(one, other, rel_tol=CLOSE)
  return one == other
