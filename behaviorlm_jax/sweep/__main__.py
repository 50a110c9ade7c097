"""Many runs, one table: methods x logs x seeds.

  python -m behaviorlm_jax.sweep --config=configs/ablations.py --workdir=DIR \
    --config.logs.foursquare_nyc=foursquare_nyc.csv.gz

--report writes DIR/tables.md and its figures from the rows in DIR, and runs
nothing.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from behaviorlm_jax import cli
from behaviorlm_jax.sweep import jobs

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where everything is written.')
_REPORT = flags.DEFINE_bool('report', False, 'Write the report, run nothing.')
flags.mark_flags_as_required(['config', 'workdir'])


def _main(argv):
  work = jobs.report if _REPORT.value else jobs.run_all
  cli.run_command(argv, lambda: work(_CONFIG.value, _WORKDIR.value))


def _parse(argv):
  try:
    argv = [cli.renamed(argument) for argument in argv]
    sys.argv[1:] = argv[1:]  # Where a config's flags are looked for.
    rest = flags.FLAGS(argv)
    _CONFIG.value.lock()  # A missing file fails only here.
    return rest
  except Exception as error:
    text = [line.strip() for line in str(error).split('\n') if line.strip()]
    cli.fail(f'{text[-1] if text else error!r}; see configs/ablations.py.')


if __name__ == '__main__':
  app.run(_main, flags_parser=_parse)
