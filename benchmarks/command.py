"""The flags of all benchmarks, and what runs them."""

import sys
import tempfile
from pathlib import Path

import common
from absl import app, flags, logging
from ml_collections import config_flags

from behaviorlm_jax.errors import InputError

CONFIG = config_flags.DEFINE_config_file(
  'config',
  str(Path(__file__).with_name('default_config.py')),
  'Config file; any field can be changed: --config.train.batch=4.',
)
QUICK = flags.DEFINE_bool('quick', False, 'Fewer repeats, smaller tables.')
REPEATS = flags.DEFINE_integer('repeats', 0, 'Timed calls of a side; 0: auto.')
ADAPTER = flags.DEFINE_string(
  'adapter',
  '',
  'Of train_step and score_labels: folder of an adapter that '
  'a run left, like runs/nyc/a_tuning/adapter; without it, a random one.',
)
GROW = flags.DEFINE_bool('grow', False, 'Only the tables of growing work.')


def run(benchmark):
  """The command: `benchmark(inputs, folder)` with the flags' config."""

  def main(argv):
    del argv
    logging.set_verbosity(logging.INFO)
    common.show_machine()
    try:
      with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        inputs = common.open_inputs(CONFIG.value, folder / 'log', ADAPTER.value)
        benchmark(inputs, folder)
    except InputError as error:
      print(f'error: {error}', file=sys.stderr)
      sys.exit(2)

  app.run(main)
