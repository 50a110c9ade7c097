"""Logs whose truth is known: what the stages must and must not find.

The model is a random tiny one whose weights are large enough for an adapter to
steer it. The hotel always follows the airport.
"""

import datetime
import json

import numpy as np
import pytest
from pyarrow import parquet
from safetensors import numpy as safetensors_numpy

from behaviorlm_jax import config as config_lib
from behaviorlm_jax import run as run_lib

pytestmark = pytest.mark.slow

# What always follows what, and what comes how often where nothing does.
PLAIN = (
  {'airport': 'hotel'},
  {'home': 0.4, 'work': 0.3, 'gym': 0.14, 'cafe': 0.11, 'airport': 0.05},
)
FIELDS = {
  'data.anchor_share': 0.07,
  'a.conversation_share': 0.0,
  'retention.conversations': 0.0,
  'lora.rank': 16,
  'lora.targets': (
    'q_proj',
    'k_proj',
    'v_proj',
    'o_proj',
    'gate_proj',
    'up_proj',
    'down_proj',
  ),
  'a.steps': 100,
  'b.steps': 100,
  'train.batch': 8,
  # At 1e-2 rounding decides what is learned.
  'a.learning_rate': 3e-3,
  'b.learning_rate': 3e-3,
  'plan.per_behavior': 40,
  'difficulty.candidates': 80,
  # The rest is what the paper has other than the defaults.
  'difficulty.score': 'nll',
  'a.content': 'anchors',
  'b.interpolation': 1.0,
  'b.prior': 'drawn',
  'plan.neighbours': 0.0,
  'checkpoint.every': 100,
  'eval.max_samples': 0,
  'eval.validation_samples': 0,
  'eval.validation_rows': 8,
}


def write_log(path, follows, shares, users=60, events=60):
  rng, lines = np.random.default_rng(0), ['user,time,behavior']
  names = list(shares)
  for user in range(users):
    time, name = datetime.datetime(2024, 1, 1, 8), ''
    for _ in range(events):
      name = follows.get(name) or str(rng.choice(names, p=list(shares.values())))
      time += datetime.timedelta(minutes=int(rng.integers(10, 400)))
      lines.append(f'u{user},{time:%Y-%m-%d %H:%M},{name}')
  path.write_text('\n'.join(lines) + '\n')
  return str(path)


@pytest.fixture(scope='module')
def tuned(tmp_path_factory, write_model, make_run_config):
  """Runs stage a on a log; what it returns runs stage b after it."""
  folder = tmp_path_factory.mktemp('planted')
  model = write_model(folder / 'model') / 'model.safetensors'
  safetensors_numpy.save_file(
    {
      name: value * 12.5 if value.ndim == 2 else np.ones_like(value)
      for name, value in safetensors_numpy.load_file(model).items()
    },
    model,
  )

  def run(stage, place, fields):
    config = make_run_config(FIELDS | {'model.address': str(model.parent)} | fields)
    config.stages = (stage,)
    config_lib.check(config)
    run_lib.run(config, place)
    return place

  def first(name, truth):
    log = {'data.events': write_log(folder / f'{name}.csv', *truth)}
    start = run('a', folder / name, log)

    def second(other, fields):
      return run(
        'b', folder / f'{name}_{other}', log | fields | {'init_from': str(start)}
      )

    return start, second

  return first


def of(folder):
  """Evaluation, and {behavior: share of its test samples that were found}."""
  rows = parquet.read_table(folder / 'predictions.parquet').to_pylist()
  found = {}
  for row in rows:
    right = row['predicted'] == row['behavior']
    found.setdefault(row['behavior'], []).append(right)
  return (
    json.loads((folder / 'evaluation.json').read_text()),
    {name: np.mean(right) for name, right in found.items()},
  )


def test_b_tuning_finds_what_a_tuning_alone_does_not(tuned):
  first, second = tuned('plain', PLAIN)
  _, before = of(first / 'a_tuning')
  # On 16 rows five draws of the subset had .82 to 1, after a stage a at 1e-2.
  _, after = of(second('balanced', {'train.batch': 16}) / 'b_tuning')
  assert before['hotel'] == 0
  assert after['hotel'] > 0.6
