"""The two stages as the paper states them, on your own log.

  python -m behaviorlm_jax.main --config=configs/paper.py --workdir=runs/paper \
    --config.data.events=events.csv

Stage 1 learns anchors alone; stage 2 learns its balanced subset, the difficult
samples more often, and nothing beside it, as often as it draws each behavior,
and all the way. What we could not read in the paper is our choice: rates and
budgets, which are as by default, and the measure of difficulty.
"""

from behaviorlm_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.a.content = 'anchors'
  config.plan.neighbours = 0.0
  config.difficulty.score = 'nll'
  config.b.prior = 'drawn'
  config.b.interpolation = 1.0
  config.b.learning_rate = config.a.learning_rate
  return config
