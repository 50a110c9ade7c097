"""The one exception that `main` turns into a sentence instead of a traceback.

Raise it for what a user can mend: a log, a config field, an address, a work
directory. The message is one sentence that says what is wrong, where, both
numbers where there are two, and what to change.
"""


class InputError(ValueError):
  """Wrong input from outside the program."""
