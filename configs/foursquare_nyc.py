"""Check-ins in New York: every training target once, then balanced.

  python -m behaviorlm_jax.main --config=configs/foursquare_nyc.py \
    --workdir=runs/nyc --config.data.events=foursquare_nyc.csv.gz

The log: columns user, time (local) and behavior (venue category), 192
categories of 984 users (TSMC2014, Yang et al., IEEE TSMC 45(1), 2015). Stage 1
is one pass over 60,063 targets; --config.stages="('a',)" runs it alone.
"""

from behaviorlm_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.a.conversation_share = 0.1
  config.plan.per_behavior = 2
  config.difficulty.score = 'nll'  # As what the README shows was trained.
  config.difficulty.candidates = 4
  config.train.batch = 4
  config.train.length = 640  # Two windows of stage 2 fit a row.
  config.train.accumulate = 2  # Faster on CPU: half the memory to move.
  config.a.steps = 400
  config.b.steps = 48
  config.checkpoint.every = 100
  config.score.batch = 4  # Faster on CPU, as above.
  return config
