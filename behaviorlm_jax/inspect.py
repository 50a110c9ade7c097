"""What a log holds, as a run would read it; no model, nothing is written.

  python -m behaviorlm_jax.inspect --config=FILE [--config.data.events=LOG ...]

Prints rows, times, users and behaviors and whatever is odd about them. Ends
with 2 and one sentence where a run would refuse the log.
"""

from absl import app, flags, logging
from ml_collections import config_flags

from behaviorlm_jax import cli
from behaviorlm_jax.report import overview

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file.')
flags.mark_flags_as_required(['config'])


def main(argv: list[str]) -> None:
  cli.run_command(argv, _look)


def _look():
  logging.set_verbosity(logging.ERROR)  # The page says it all.
  overview.look(_CONFIG.value)


if __name__ == '__main__':
  app.run(main, flags_parser=cli.parser(_CONFIG))
