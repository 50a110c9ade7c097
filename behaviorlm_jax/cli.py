"""What the commands share: logs, one sentence for what is wrong, exit codes.

Imported before anything that imports transformers, which asks for its setting.
"""

import logging as std_logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import flags, logging

from behaviorlm_jax import errors
from behaviorlm_jax.cluster import preemption, processes
from behaviorlm_jax.config import FIELDS, RENAMED
from behaviorlm_jax.errors import InputError, nearest
from behaviorlm_jax.io import addresses, bucket

# No torch is needed, so transformers need not say at its import what it lacks.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

# Fields of earlier versions, and what took their place.
_LOSSES = 'a.softmax and a.prior, b.softmax and b.prior say it now'
_GONE = {
  'train.loss': _LOSSES,
  'train.balanced_loss': _LOSSES,
  'eval.fit': 'eval.validation_samples=0 says it now',
}
# These report every file they touch; their warnings are wanted.
_readable_log = lambda r: (
  r.levelno > 20 or not any(name in r.pathname for name in ('orbax', 'gcsfs', 'fsspec'))
)


def fail(sentence: str) -> NoReturn:
  sys.exit(_say(2, f'error: {sentence}'))


# Flags.


def parser(config: flags.FlagHolder) -> Callable[[list[str]], list[str]]:
  """flags_parser of app.run; `config`: the flag of a config file.

  Turns usage texts and tracebacks for wrong flags into one sentence, and knows
  what fields were called before.
  """

  def parse(argv: list[str]) -> list[str]:
    if {'--help', '-help'} & set(argv):
      print(sys.modules['__main__'].__doc__, flags.FLAGS.main_module_help(), _fields())
      sys.exit(0)
    argv = [renamed(argument) for argument in argv]
    sys.argv[1:] = argv[1:]  # Where a config's flags are looked for.
    try:
      rest = flags.FLAGS(argv)
      config.value.keys()  # A missing file fails only here.
      return rest
    except Exception as error:  # A config file is a program, and may raise any.
      fail(explain(argv, error))

  return parse


def _fields() -> str:
  """All fields of a config, as flags."""
  return 'Any field of the config is a flag:\n' + '\n'.join(
    f'  --config.{name}={"(unset)" if field.default is None else repr(field.default)}'
    f'\n      {field.doc}'
    for name, field in FIELDS.items()
  )


def renamed(argument: str) -> str:
  """An argument with today's name of its field."""
  match = re.match(r'(--?config\.(?:base\.)?)([^=]*)(=.*)?$', argument, re.DOTALL)
  new = match and RENAMED.get(match[2])
  if not new:
    return argument
  logging.warning('config.%s is config.%s now.', match[2], new)
  return f'{match[1]}{new}{match[3] or ""}'


def explain(argv: list[str], error: Exception) -> str:
  """One sentence for flags, or a config file, that could not be used.

  ml_collections names only the last part of an unknown field, and passes on
  whatever a config file raises; the full names stand in `argv`.
  """
  for argument in argv[1:]:  # The first that is wrong, in the order of the line.
    match = re.match(r'--?(?:no)?config\.([^=]*)', argument)
    if match and match[1] not in FIELDS:
      return _explain_unknown(match[1])
  text = str(error)
  if match := re.match(r'flag --config\.([\w.]+)=(.*?): ', text, re.DOTALL):
    return _explain_type(match[1], match[2])
  if match := re.match(r'flag --(\w+)=None: ', text):
    both = ' and --workdir=DIR' if 'workdir' in flags.FLAGS else ''
    return f'--{match[1]} is missing; give --config=FILE{both}.'
  lines = [line.strip() for line in text.split('\n') if line.strip()]
  if isinstance(error, flags.Error) and len(lines) == 1:
    return f'{text}.'
  files = [a for a in argv[1:] if re.match(r'--?config=|[^-].*\.py$', a)]
  # The last line of a list of attempts or of a traceback.
  reason = lines[-1] if lines else repr(error)
  if match := re.search(r'Key "(\w+)" does not exist', text):
    reason = f'config has no field {match[1]}{_moved(match[1])}'
  return f'{(files or ["--config"])[0]}: {reason}.'


def _moved(last: str) -> str:
  """What a config file, that names the last part alone, may have meant."""
  now = [
    f'{old} is {new} now' for old, new in RENAMED.items() if old.endswith(f'.{last}')
  ]
  now += [new for old, new in _GONE.items() if old.endswith(f'.{last}')]
  if now:
    return f' here ({"; ".join(now)})'
  return nearest(last, [name.split('.')[-1] for name in FIELDS])


def _explain_unknown(name):
  inside = [field for field in FIELDS if field.startswith(f'{name}.')]
  if inside:
    return f'config.{name} is a section; set one of its fields, such as {inside[0]}.'
  why = f': {_GONE[name]}' if name in _GONE else nearest(name, FIELDS)
  return f'config has no field {name}{why}.'


def _explain_type(name, value):
  field = FIELDS[name]
  kind = (field.kind or type(field.default)).__name__
  example = '' if field.default is None else f', like {field.default!r}'
  return f'{name} is {value!r}; it must be of type {kind}{example}.'


# Exit codes.


def run_command(argv: list[str], work: Callable[[], None]) -> None:
  """Calls `work()`; wrong input and SIGTERM end the process with its codes."""
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_readable_log)
  # Of every kind of device that is not there; its warnings are of one that is.
  std_logging.getLogger('jax._src.xla_bridge').setLevel(std_logging.WARNING)
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
  except Exception as error:  # Disks and lost processes come as many; texts tell.
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
      f'error: what all processes do together failed in process {jax.process_index()} '
      f'of {jax.process_count()} ({str(error).splitlines()[0]}); if another one was '
      'lost, run the same command again.',
    )


def _say(code, sentence):
  print(sentence, file=sys.stderr)
  return code


def _last_line(error):
  name = getattr(error, 'filename', None)
  text = str(error).strip().splitlines()[-1]
  return f'{name}: {text}' if name and str(name) not in text else text


def _keep_compilations():
  """The next run starts sooner; JAX_COMPILATION_CACHE_DIR goes first."""
  if not jax.config.jax_compilation_cache_dir:
    folder = addresses.cache_dir() / 'compiled'
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_compilation_cache_max_size', 2 << 30)  # Bytes.
