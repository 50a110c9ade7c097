"""Runs the stages of a config on a log, and writes the report.

python -m behaviorlm_jax.main --config=FILE --workdir=DIR [--ablation=NAME ...]
"""

from absl import app, flags
from ml_collections import config_flags

from behaviorlm_jax import ablations, cli
from behaviorlm_jax import run as run_lib

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where everything is written.')
_ABLATIONS = flags.DEFINE_multi_string(
  'ablation', [], f'Repeatable: {", ".join(ablations.ABLATIONS)}.'
)
flags.mark_flags_as_required(['config', 'workdir'])


def main(argv: list[str]) -> None:
  cli.run_command(
    argv,
    lambda: run_lib.run(
      ablations.ablate(_CONFIG.value, _ABLATIONS.value), _WORKDIR.value
    ),
  )


if __name__ == '__main__':
  app.run(main, flags_parser=cli.parser(_CONFIG))
