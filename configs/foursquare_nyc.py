"""Check-ins in New York: every training event taught once, then balanced.

  python -m behaviorlm_jax.main --config=configs/foursquare_nyc.py:stage1 \
    --workdir=runs/nyc --config.data.events=foursquare_nyc.csv.gz
  python -m behaviorlm_jax.main --config=configs/foursquare_nyc.py:stage2 \
    --workdir=runs/nyc --config.data.events=foursquare_nyc.csv.gz

The log: columns user, time (local) and behavior (venue category), 192
categories (TSMC2014, Yang et al., IEEE TSMC 45(1), 2015). Stage 1 learns all
behaviors, not only anchors, from rows of up to 40 targets.
"""

from behaviorlm_jax import config as config_lib


def get_config(stage):
  config = config_lib.default()
  config.plan.window = 48  # Rows of 512 tokens hold about 40 events.
  config.plan.targets_per_row = 40
  config.plan.content = 'all'
  config.plan.conversation_share = 0.1
  config.train.batch = 4
  config.train.accumulate = 2  # Faster on CPU: half the memory to move.
  config.score.dtype = 'bfloat16'
  config.stages = {'stage1': ('a',), 'stage2': ('b',)}[stage]
  if stage == 'stage1':
    config.train.steps = 500  # One epoch of 60,063 targets.
    config.checkpoint.every = 100
  else:
    config.train.steps = 60
    config.train.learning_rate = 2e-4
    config.checkpoint.every = 20
  return config
