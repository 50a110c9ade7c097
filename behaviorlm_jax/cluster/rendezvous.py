"""Processes find each other, so that who is missing can be named.

JAX's own wait for a process that never comes ends all of them without saying
which it is. So they first meet here, on the port of the first one, which JAX
uses afterwards. One line each way:

    behaviorlm_jax PROCESS PROCESSES
    behaviorlm_jax [what is wrong]
"""

import contextlib
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


def wait_for_all(settings: ConfigDict) -> None:
  """Returns when all processes are there.

  Args:
    settings: config.distributed, with a coordinator host:port.

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
    try:
      server = stack.enter_context(
        socket.create_server(('', port), backlog=settings.processes, **_FAMILY)
      )
    except OSError as error:
      raise InputError(
        f'distributed.coordinator is {settings.coordinator}, and process 0 '
        f'cannot listen on port {port} ({error.strerror}); give a free port '
        'of its machine.'
      ) from error
    while missing and not problem:
      guest = _accept(server, until)
      if guest is None:
        problem = _missing(missing, settings)
        break
      stack.enter_context(guest)
      # Five seconds: who connects and says nothing must not hold up the others.
      said = _line(guest, min(until, time.monotonic() + 5)).split()
      if (
        len(said) != 3
        or said[0] != _HELLO
        or not all(number.isdecimal() for number in said[1:])
      ):
        logging.warning('port %d: someone who is no process of this run.', port)
        continue
      guests.append(guest)
      number, processes = map(int, said[1:])
      if processes != settings.processes or number not in missing:
        problem = (
          f'process {number} of {processes} came to {settings.coordinator}, '
          f'which waits for {_listed(missing)} of {settings.processes}; give '
          'each a distributed.process of its own and all the same '
          'distributed.processes.'
        )
      missing.discard(number)
    # Sockets stay open until all are there, and every guest hears the same.
    for guest in guests:
      with contextlib.suppress(OSError):  # It is gone; JAX will miss it.
        guest.sendall(f'{_HELLO} {problem}\n'.encode())
  if problem:
    raise InputError(problem)


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


def _accept(server: socket.socket, until: float) -> socket.socket | None:
  """The next guest's socket, or None when the time is over."""
  # Not 0, which would mean not to wait at all, and raise something else.
  server.settimeout(max(until - time.monotonic(), 0.01))
  try:
    return server.accept()[0]
  except TimeoutError:
    return None


def _line(guest: socket.socket, until: float) -> str:
  """The line that a guest sends; '' if it sends none in time."""
  guest.settimeout(max(until - time.monotonic(), 0.01))
  try:
    return guest.makefile(encoding='utf-8', errors='replace').readline(_LONGEST)
  except OSError:
    return ''


def _missing(missing: set[int], settings: ConfigDict) -> str:
  one = len(missing) == 1
  return (
    f'after {settings.timeout} s (distributed.timeout) '
    f'{"process" if one else "processes"} {_listed(missing)} of '
    f'{settings.processes} {"is" if one else "are"} missing at '
    f'{settings.coordinator}; see {"its log" if one else "their logs"}, '
    'and start all of them.'
  )


def _listed(numbers: Iterable[int]) -> str:
  return ', '.join(map(str, sorted(numbers)))
