"""SIGTERM becomes a flag, looked at where stopping is safe.

A machine that is taken away sends SIGTERM some seconds before. The train loop
saves and stops; scoring stops between two batches and goes on behind the last part
that was kept. The process then exits with EXIT_CODE, so that a launcher can tell
"run me again" from an error.

Where several hosts run, JAX takes the signal, of one of them or of all, and
they stop at the same call of `requested`.
"""

import contextlib
import signal
import types
from collections.abc import Iterator
from typing import NoReturn

from jax.experimental import multihost_utils

from behaviorlm_jax.cluster import processes

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again.


class Preempted(Exception):
  """The run was asked to stop and has saved what it had."""


_requested = False
_at_once = False
_calls = 0


def install() -> None:
  """From now on SIGTERM sets the flag instead of ending the process."""

  def note(signum: int, frame: types.FrameType | None) -> None:
    del signum, frame
    # It runs between any two instructions, so it only notes, but where `at_once`
    # says that nothing is at stake.
    global _requested
    again, _requested = _requested, True
    if _at_once and not again:  # A second one must not end what cleans up.
      _stop()

  signal.signal(signal.SIGTERM, note)


def ignore() -> None:
  """From now on SIGTERM does nothing: the exit code is settled.

  Python gives a handler of its own back before it ends, with which a further
  signal would kill the process; what is ignored stays so.
  """
  signal.signal(signal.SIGTERM, signal.SIG_IGN)


def requested() -> bool:
  """Whether to stop; all hosts call this equally often."""
  global _requested, _calls
  if processes.several() and not _requested:
    # The number names the call: hosts agree on one that none has passed yet.
    _calls += 1
    _requested = multihost_utils.reached_preemption_sync_point(_calls)
  return _requested


def check() -> None:
  """Raises Preempted if a stop was asked for."""
  if requested():
    _stop()


def _stop() -> NoReturn:
  raise Preempted('stopped by SIGTERM; run the same command to go on.')


@contextlib.contextmanager
def at_once() -> Iterator[None]:
  """Inside, SIGTERM stops whatever runs: nothing is at stake."""
  global _at_once
  _at_once = True
  try:
    if _requested:  # It came before, when nothing looked for it.
      _stop()
    yield
  finally:
    _at_once = False


def share() -> None:
  """Stops all hosts if one had the signal before JAX took it."""
  if not processes.every(not _requested):
    _stop()
