"""What the benchmarks run by default: the defaults on the quickstart's log.

  python benchmarks/train_step.py
  python benchmarks/train_step.py --config=configs/stage1.py \
    --config.data.events=events.csv
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
  # Fastest on 2 CPU cores: half the memory to move.
  config.train.batch = 4
  config.train.accumulate = 2
  return config
