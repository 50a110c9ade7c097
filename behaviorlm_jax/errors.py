"""What the commands turn into a sentence instead of a traceback.

InputError is for what a user can mend: a log, a config field, an address, a
work directory. The message is one sentence that says what is wrong, where, both
numbers where there are two, and what to change. What a disk refuses comes as
many exceptions; `of_disk` knows them.
"""

import difflib
from collections.abc import Iterable

# By Python and Arrow, TensorStore (Orbax), DuckDB and safetensors, all with the
# words of the C library: what a disk, or one that is shared, refuses for now.
# Not 'Connection timed out', which is how a lost process may end, too.
_DISK = (
  'No space left on device',
  'Disk quota exceeded',
  'Input/output error',
  'Stale file handle',
  'Permission denied',
  'Read-only file system',
  'Too many open files',
  'Cannot allocate memory',
)


class InputError(ValueError):
  """Wrong input from outside the program; its sentence ends with a full stop."""

  def __init__(self, sentence: str):
    super().__init__(sentence if sentence.endswith('.') else f'{sentence}.')


def of_disk(error: BaseException) -> bool:
  """Whether an exception is that of a disk, and no file is to blame."""
  return any(words in str(error) for words in _DISK)


def nearest(name: str, choices: Iterable[str]) -> str:
  """' (did you mean X?)', or '' where nothing is alike."""
  close = difflib.get_close_matches(name, list(choices), 1)
  return f' (did you mean {close[0]}?)' if close else ''
