"""One day of each person in India's Time Use Survey 2024, split by household.

  python -m behaviorlm_jax.main --config=configs/india_time_use.py \
    --workdir=runs/india --config.data.events=india_time_use.csv.gz

The log: columns user, household, time and behavior, 145 activities of 4,384
persons. The clock is real, the date is not, so lines name no weekday; persons
of one household stay in one split. As configs/foursquare_nyc.py otherwise:
stage 1 is one pass over 62,768 targets.
"""

from behaviorlm_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.data.columns.group = 'household'
  config.data.weekday = False
  config.a.conversation_share = 0.1
  config.plan.per_behavior = 2
  config.difficulty.score = 'nll'  # As what the README shows was trained.
  config.difficulty.candidates = 4
  config.train.batch = 4
  config.train.length = 640
  config.train.accumulate = 2  # Faster on CPU: half the memory to move.
  config.a.steps = 505
  config.b.steps = 48
  config.checkpoint.every = 100
  return config
