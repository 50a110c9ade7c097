"""B-Tuning after configs/stage1.py in the same work directory.

  python -m behaviorlm_jax.main --config=configs/stage2.py --workdir=runs/mine \
    --config.data.events=events.csv

With --config.init_from=DIR it starts from the stage 1 of another directory.
"""

from behaviorlm_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.stages = ('b',)
  return config
