"""A log and a config of whole runs that take seconds, for tests and faults.py.

The shipped defaults but for what must be small.
"""

import datetime

import numpy as np

from behaviorlm_jax import config as config_lib

STEPS = 6  # Of each stage.
FIELDS = {
  'model.address': 'random://tiny',
  'model.dtype': 'float32',
  'score.dtype': 'float32',
  'lora.rank': 4,
  'lora.targets': ('q_proj', 'v_proj'),
  'data.instruction': 'Log',
  'data.history': 5,
  'plan.window': 6,
  'plan.min_context': 2,
  'plan.targets_per_row': 4,
  'plan.per_behavior': 4,
  'difficulty.candidates': 4,
  'train.length': 192,
  'train.batch': 2,
  'a.steps': STEPS,
  'checkpoint.every': 3,
  'eval.max_samples': 60,
  'eval.validation_rows': 2,
  'eval.validation_samples': 75,
}


def get_config():
  config = config_lib.default()
  config.update_from_flattened_dict(FIELDS)
  return config


def write_log(path, users=40, events=40, seed=0):
  """Anchors home, work, gym and cafe, tails airport and hotel.

  The hotel always comes right after the airport; both stand in every split.
  """
  rng = np.random.default_rng(seed)
  lines = ['user,time,behavior']
  for user in range(users):
    names = list(
      rng.choice(['home', 'work', 'gym', 'cafe'], events, p=[0.5, 0.3, 0.1, 0.1])
    )
    if user % 4 == 0:
      at = (10, events - 7, events - 3)[user // 4 % 3]
      names[at : at + 2] = ['airport', 'hotel']
    time = datetime.datetime(2024, 1, 1, int(rng.integers(24)))
    for name in names:
      time += datetime.timedelta(minutes=int(rng.integers(10, 400)))
      lines.append(f'u{user},{time:%Y-%m-%d %H:%M},{name}')
  path.write_text('\n'.join(lines) + '\n')
  return path
