"""A-Tuning on your own log, with conversations mixed in.

  python -m behaviorlm_jax.main --config=configs/stage1.py --workdir=runs/mine \
    --config.data.events=events.csv

With --ablation=anchors_first it learns anchors alone, as the paper has it.
"""

from behaviorlm_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.stages = ('a',)
  return config
