"""What the commands share: logs, one sentence for what is wrong, exit codes."""

import sys
import traceback

import duckdb
import jax
import safetensors
from absl import flags
from absl import logging

from behaviorlm_jax import config as config_lib
from behaviorlm_jax import errors
from behaviorlm_jax.cluster import preemption
from behaviorlm_jax.cluster import processes
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import addresses
from behaviorlm_jax.io import bucket

# What flags and a config file, which is a program of the user's, may raise.
UNUSABLE = (
  flags.Error,
  AttributeError,
  ImportError,
  KeyError,
  NameError,
  OSError,
  SyntaxError,
  TypeError,
  ValueError,
)
# What a disk that is full or fails, or a lost process, comes as; the message
# tells.
_FROM_BELOW = (
  OSError,
  RuntimeError,
  ValueError,
  duckdb.Error,
  safetensors.SafetensorError,
)
# These report every file they touch; their warnings are wanted.
_readable_log = lambda r: (
  r.levelno > 20 or not any(name in r.pathname for name in ('orbax', 'gcsfs', 'fsspec'))
)


def _with_addresses(record):
  """Log lines name a work directory in a bucket as the user does."""
  record.msg, record.args = bucket.named(record.getMessage()), ()
  return True


def fail(sentence):
  print(f'error: {sentence}', file=sys.stderr)
  sys.exit(2)


def parser(config):
  """flags_parser of app.run; `config`: the flag of a config file.

  Turns usage texts and tracebacks for wrong flags into one sentence.
  """

  def parse(argv):
    try:
      rest = flags.FLAGS(argv)
      config_lib.field_names(config.value)  # A missing file fails only here.
      return rest
    except UNUSABLE as error:
      fail(config_lib.explain_flag_error(argv, error))

  return parse


def run(argv, work):
  """Calls `work()`; wrong input and SIGTERM end the process with its codes."""
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_readable_log)
  logging.get_absl_handler().addFilter(_with_addresses)
  if len(argv) > 1:
    fail(f'{argv[1]!r} is not a flag; every option starts with --.')
  preemption.install()
  _keep_compilations()
  code, known = 1, False
  try:
    code, known = _code(work), True
  finally:
    preemption.ignore()  # The outcome is settled.
    # The others may never come to where JAX would wait for them at the end; a
    # stop they have agreed upon.
    if code not in (0, preemption.EXIT_CODE) and processes.several():
      if not known:
        traceback.print_exc()
      processes.leave(code)
  if code:
    sys.exit(code)


def _code(work):
  """The exit code of `work()`, after one sentence for what is wrong."""
  try:
    work()
    return 0
  except InputError as error:
    return _say(2, f'error: {error}')
  except preemption.Preempted as stop:
    return _say(preemption.EXIT_CODE, str(stop))
  except (processes.Elsewhere, bucket.Unreachable) as error:
    return _say(processes.EXIT_CODE, f'error: {error}.')
  except _FROM_BELOW as error:
    if errors.of_disk(error):
      _say(
        2,
        f'error: {_last_line(error)}; mend that and run the same command '
        'again: it goes on from what was finished.',
      )
      processes.leave(2)  # Threads that still write would go on complaining.
    if not processes.several() or not processes.failed_together(error):
      raise
    traceback.print_exc()
    return _say(
      processes.EXIT_CODE,
      f'error: what all processes do together failed in '
      f'process {jax.process_index()} of {jax.process_count()} '
      f'({str(error).splitlines()[0]}); if another one was lost, run the '
      'same command again.',
    )


def _say(code, sentence):
  print(bucket.named(sentence), file=sys.stderr)
  return code


def _last_line(error):
  name = getattr(error, 'filename', None)
  text = str(error).strip().splitlines()[-1]
  return f'{name}: {text}' if name and str(name) not in text else text


def _keep_compilations():
  """The next run starts sooner; JAX_COMPILATION_CACHE_DIR goes first."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update(
      'jax_compilation_cache_dir', str(addresses.cache_dir() / 'compiled')
    )
    jax.config.update('jax_compilation_cache_max_size', 2 << 30)  # Bytes.
