"""What the commands share: logs, one sentence for what is wrong, exit codes."""

import sys
import traceback

import duckdb
import jax
import safetensors
from absl import flags
from absl import logging

from behaviorlm_jax import addresses
from behaviorlm_jax import hosts
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.train import preemption

# What flags and a config file, which is a program of the user's, may raise.
UNUSABLE = (flags.Error, AttributeError, ImportError, KeyError, NameError,
            OSError, SyntaxError, TypeError, ValueError)
# What a disk that is full or broken makes of a write or a read: Python and
# Arrow, Orbax, and two more.
_DISK = (OSError, ValueError, duckdb.Error, safetensors.SafetensorError)
_BROKEN = ('No space left on device', 'Disk quota exceeded',
           'Input/output error')
# Orbax reports every file it writes; its warnings are wanted.
_readable_log = lambda r: r.levelno > 20 or 'orbax' not in r.pathname


def fail(sentence):
  print(f'error: {sentence}', file=sys.stderr)
  sys.exit(2)


def run(argv, work):
  """Calls `work()`; wrong input and SIGTERM end the process with its codes."""
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_readable_log)
  if len(argv) > 1:
    fail(f'{argv[1]!r} is not a flag; every option starts with --.')
  preemption.install()
  _keep_compilations()
  try:
    work()
  except InputError as error:
    fail(str(error))
  except preemption.Preempted as stop:
    print(stop, file=sys.stderr)
    sys.exit(preemption.EXIT_CODE)
  except _DISK as error:
    if not any(reason in str(error) for reason in _BROKEN):
      raise
    print(f'error: {_last_line(error)}; mend that and run the same command '
          'again: it goes on from what was finished.', file=sys.stderr)
    hosts.leave(2)  # Threads that still want to write would only complain.
  except (hosts.Elsewhere, jax.errors.JaxRuntimeError) as error:
    if not hosts.several():
      raise
    traceback.print_exc()
    print(f'error: what all processes do together failed in process '
          f'{jax.process_index()} of {jax.process_count()} '
          f'({str(error).splitlines()[0]}); if another one was lost, run the '
          'same command again.', file=sys.stderr)
    hosts.leave(hosts.EXIT_CODE)


def _last_line(error):
  name = getattr(error, 'filename', None)
  text = str(error).strip().splitlines()[-1]
  return f'{name}: {text}' if name and str(name) not in text else text


def _keep_compilations():
  """The next run starts sooner; JAX_COMPILATION_CACHE_DIR goes first."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir',
                      str(addresses.cache_dir() / 'compiled'))
    jax.config.update('jax_compilation_cache_max_size', 2 << 30)  # Bytes.
