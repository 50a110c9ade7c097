"""Flags only: python -m behaviorlm_jax.main --config=FILE --workdir=DIR."""

import sys

import jax
from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from behaviorlm_jax import addresses
from behaviorlm_jax import config as config_lib
from behaviorlm_jax import stages
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.train import preemption

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where everything is written.')
_ABLATIONS = flags.DEFINE_multi_string(
    'ablation', [], f'Repeatable: {", ".join(config_lib.ABLATIONS)}.')
# What flags and a config file, which is a program of the user's, may raise.
_UNUSABLE = (flags.Error, AttributeError, ImportError, KeyError, NameError,
             OSError, SyntaxError, TypeError, ValueError)
# Orbax reports every file it writes; its warnings are wanted.
_readable_log = lambda r: r.levelno > 20 or 'orbax' not in r.pathname
flags.mark_flags_as_required(['config', 'workdir'])


def _fail(sentence):
  print(f'error: {sentence}', file=sys.stderr)
  sys.exit(2)


def _parse(argv):
  """Turns usage texts and tracebacks for wrong flags into one sentence."""
  try:
    rest = flags.FLAGS(argv)
    config_lib.field_names(_CONFIG.value)  # A missing file fails only here.
    return rest
  except _UNUSABLE as error:
    _fail(config_lib.explain_flag_error(argv, error))


def _keep_compilations():
  """The next run starts sooner; JAX_COMPILATION_CACHE_DIR goes first."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir',
                      str(addresses.cache_dir() / 'compiled'))
    jax.config.update('jax_compilation_cache_max_size', 2 << 30)  # Bytes.


def main(argv):
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_readable_log)
  if len(argv) > 1:
    _fail(f'{argv[1]!r} is not a flag; every option starts with --.')
  preemption.install()
  _keep_compilations()
  try:
    stages.run(config_lib.ablate(_CONFIG.value, _ABLATIONS.value),
               _WORKDIR.value)
  except InputError as error:
    _fail(str(error))
  except preemption.Preempted as stop:
    print(stop, file=sys.stderr)
    sys.exit(preemption.EXIT_CODE)


if __name__ == '__main__':
  app.run(main, flags_parser=_parse)
