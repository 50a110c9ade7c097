"""Processes find each other, so that who is missing can be named.

JAX's own wait for a process that never comes ends all of them without saying
which it is. So they first meet here, on the port of the first one, which JAX
uses afterwards. One line each way:

    behaviorlm_jax PROCESS PROCESSES
    behaviorlm_jax [what is wrong]
"""

import contextlib
import re
import socket
import time
from collections.abc import Iterable

from absl import logging
from ml_collections import ConfigDict

from behaviorlm_jax.errors import InputError

_HELLO = 'behaviorlm_jax'
# As JAX listens: on all addresses of the machine.
_FAMILY = (
  {'family': socket.AF_INET6, 'dualstack_ipv6': True}
  if socket.has_dualstack_ipv6()
  else {}
)
_LONGEST = 10_000  # Characters of a line.
_SILENT = 5  # Seconds until who connects and says nothing is no process of ours.


def wait_for_all(settings: ConfigDict) -> None:
  """Returns when all processes of config.distributed are at its host:port.

  Raises:
    InputError: who is missing after settings.timeout, or does not belong.
  """
  name, port = settings.coordinator.rsplit(':', 1)
  name = name.strip('[]')  # Of an IPv6 address.
  until = time.monotonic() + settings.timeout
  if settings.process:
    _report((name, int(port)), settings, until)
  else:
    _receive(int(port), settings, until)


def _receive(port: int, settings: ConfigDict, until: float) -> None:
  """Of process 0: waits for all others and tells them what comes of it."""
  missing, guests, problem = set(range(1, settings.processes)), [], ''
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(_listen(port, settings))
    while missing and not problem:
      server.settimeout(_left(until))
      try:
        guest = stack.enter_context(server.accept()[0])
      except TimeoutError:
        problem = _missing(missing, settings)
        break
      said = _line(guest, min(until, time.monotonic() + _SILENT))
      match = re.fullmatch(rf'{_HELLO} (\d+) (\d+)\n', said)
      if not match:
        logging.warning('port %d: someone who is no process of this run.', port)
        continue
      guests.append(guest)
      number, processes = int(match[1]), int(match[2])
      if processes != settings.processes or number not in missing:
        problem = (
          f'process {number} of {processes} came to {settings.coordinator}, which '
          f'waits for {_listed(missing)} of {settings.processes}; give each a '
          'distributed.process of its own and all the same distributed.processes.'
        )
      missing.discard(number)
    # Sockets stay open until all are there, and every guest hears the same.
    for guest in guests:
      with contextlib.suppress(OSError):  # It is gone; JAX will miss it.
        guest.sendall(f'{_HELLO} {problem}\n'.encode())
  if problem:
    raise InputError(problem)


def _listen(port: int, settings: ConfigDict) -> socket.socket:
  try:
    return socket.create_server(('', port), backlog=settings.processes, **_FAMILY)
  except OSError as error:
    raise InputError(
      f'distributed.coordinator is {settings.coordinator}, and process 0 cannot listen '
      f'on port {port} ({error.strerror}); give a free port of its machine.'
    ) from error


def _report(address: tuple[str, int], settings: ConfigDict, until: float) -> None:
  """Of the others: goes to process 0, which says when all are there."""
  hello = f'{_HELLO} {settings.process} {settings.processes}\n'
  awaited = 'process 0'  # Whom to name if the time runs out.
  while True:
    try:
      with socket.create_connection(address, timeout=5) as guest:
        guest.sendall(hello.encode())
        awaited = 'the others'
        reply = _line(guest, until + 5)  # If it gives up, it says why.
    except OSError:  # It does not listen yet, or no longer.
      reply = ''
    if reply.startswith(_HELLO):
      break
    if time.monotonic() > until:
      raise InputError(
        f'process {settings.process} waited {settings.timeout} s '
        f'(distributed.timeout) for {awaited} at {settings.coordinator}; see '
        'the log of process 0, or correct distributed.coordinator.'
      )
    time.sleep(0.2)  # It may start later than this process.
  if problem := reply.removeprefix(_HELLO).strip():
    raise InputError(problem)


def _left(until: float) -> float:
  """Seconds; not 0, which would mean not to wait at all, and raise something else."""
  return max(until - time.monotonic(), 0.01)


def _line(guest: socket.socket, until: float) -> str:
  """The line that a guest sends; '' if it sends none in time."""
  guest.settimeout(_left(until))
  try:
    return guest.makefile(encoding='utf-8', errors='replace').readline(_LONGEST)
  except OSError:
    return ''


def _missing(missing: set[int], settings: ConfigDict) -> str:
  who, are, logs = 'processes', 'are', 'their logs'
  if len(missing) == 1:
    who, are, logs = 'process', 'is', 'its log'
  return (
    f'after {settings.timeout} s (distributed.timeout) {who} {_listed(missing)} of '
    f'{settings.processes} {are} missing at {settings.coordinator}; see {logs}, and '
    'start all of them.'
  )


def _listed(numbers: Iterable[int]) -> str:
  return ', '.join(map(str, sorted(numbers)))
