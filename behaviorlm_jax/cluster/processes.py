"""Several processes, one run: they meet, agree, and one of them writes.

All run the same program in the same order, as compiled steps that divide their
work need it. So what one of them might see or do differently goes through here:
what process 0 sees (`shared`) and does while the others wait (`on_primary`), and
what all must have in common (`assert_same`). cluster.workspace does the same for
files, cluster.preemption for a stop.

A process is called a host, as there is one on each; on one machine there may be
several.
"""

import collections
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from behaviorlm_jax.cluster import rendezvous
from behaviorlm_jax.errors import InputError

# Of a process whose run ended because of another, or because the bucket did not
# answer: run the same command again.
EXIT_CODE = 76
AUTO = 'auto'
_LEAVING = 10  # Seconds that a process at its end waits for the others.
_SAYING = 2  # Seconds from process 0's failure to its end.
# How XLA's errors begin, some of which reach Python as a ValueError, if all
# processes computed together. What a device lacks is no other one's fault.
_TOGETHER = re.compile(
  'ABORTED: |CANCELLED: |DEADLINE_EXCEEDED: |INTERNAL: |UNAVAILABLE: |UNKNOWN: '
)
_Value = TypeVar('_Value')


class Elsewhere(Exception):
  """Another host failed; its own log says at what."""


def several() -> bool:
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_primary() -> bool:
  """Whether this is the host that writes."""
  return not several() or jax.process_index() == 0


def meet(settings: ConfigDict) -> None:
  """Waits for the other hosts of a run, where config.distributed says who they are.

  Raises:
    InputError: the settings do not fit, or not all hosts came in time.
  """
  if settings.coordinator in ('', AUTO) or jax.distributed.is_initialized():
    return
  match = re.fullmatch(r'.+:(\d{1,5})', settings.coordinator)
  if not match or not 0 < int(match[1]) < 1 << 16:
    raise InputError(
      f'distributed.coordinator is {settings.coordinator!r}; give host:port '
      'of the first process (a port from 1 to 65535), or auto.'
    )
  if not 0 <= settings.process < settings.processes:
    raise InputError(
      f'distributed.process is {settings.process} and distributed.processes '
      f'is {settings.processes}; processes are numbered from 0 to '
      f'{settings.processes - 1}.'
    )
  rendezvous.wait_for_all(settings)


def start(settings: ConfigDict) -> None:
  """Joins the other hosts that were met; before anything touches a device."""
  if not settings.coordinator or jax.distributed.is_initialized():
    return
  # What CPUs of several processes talk by; other devices ignore it.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # What JAX finds out by itself where it is auto.
  who = (settings.coordinator, settings.processes, settings.process)
  try:
    jax.distributed.initialize(
      *(() if settings.coordinator == AUTO else who),
      initialization_timeout=settings.timeout,
      heartbeat_timeout_seconds=settings.heartbeat,
      shutdown_timeout_seconds=_LEAVING,
    )
  except ValueError as error:
    if settings.coordinator != AUTO:
      raise
    raise InputError(
      'distributed.coordinator is auto, but there is no sign of a TPU pod, '
      f'GKE, Slurm or MPI here ({str(error).rstrip(".")}); give host:port, '
      'distributed.processes and distributed.process.'
    ) from error
  _check_devices()
  logging.info(
    'host %d of %d, with %d of %d devices.',
    jax.process_index(),
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
  )


def _check_devices() -> None:
  """What all do together needs as many devices from each."""
  counts = collections.Counter(d.process_index for d in jax.devices())
  if len(set(counts.values())) > 1:
    listed = ', '.join(f'process {p} has {n}' for p, n in sorted(counts.items()))
    raise InputError(
      f'processes differ in their devices: {listed}; give each the same number.'
    )


def shared(value: _Value) -> _Value:
  """The value of process 0, whatever the others give; it can stand in JSON."""
  return json.loads(_texts(json.dumps(value))[0]) if several() else value


def on_primary(work: Callable[..., _Value], *arguments: object) -> _Value | None:
  """work(*arguments) on process 0, while the others wait; None on those.

  Raises:
    Elsewhere: on the others, if it raised there.
  """
  done, result = False, None
  try:
    if is_primary():
      result = work(*arguments)
    done = True
  finally:
    # The others wait here, also for a host whose work has failed.
    done = every(done)
  if not done:
    raise Elsewhere('process 0 failed; its log says at what')
  return result


def every(flag: bool) -> bool:
  """Whether the flag is set on all hosts."""
  return bool(_gather(np.bool_(flag)).all()) if several() else bool(flag)


def _gather(value: np.generic | np.ndarray) -> np.ndarray:
  return np.atleast_1d(multihost_utils.process_allgather(value))


def assert_same(facts: dict[str, str]) -> None:
  """Refuses a run whose hosts differ in facts {what: text}.

  Raises:
    InputError: on all hosts, with the first fact that differs.
  """
  if not several():
    return
  texts = _texts(json.dumps([socket.gethostname(), facts]))
  # All compare the same texts in the same order: each raises the same, or nothing.
  (name, mine), *others = map(json.loads, texts)
  for number, (other, theirs) in enumerate(others, start=1):
    for what in (*mine, *theirs):
      one, two = mine.get(what), theirs.get(what)
      if one != two:
        raise InputError(
          f'process 0 ({name}) and process {number} ({other}) differ in '
          f'{what}: {one} and {two}; give all processes the same.'
        )


def _texts(text: str) -> list[str]:
  """The text of every host, in their order."""
  encoded = np.frombuffer(text.encode(), np.uint8)
  sizes = _gather(np.int32(len(encoded)))
  # A gather takes arrays of one shape alone, so sizes go ahead.
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(encoded)] = encoded
  rows = multihost_utils.process_allgather(padded)
  return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def failed_together(error: BaseException) -> bool:
  """Whether an exception is that of a computation of all processes."""
  return bool(_TOGETHER.match(str(error)))


def leave(code: int) -> NoReturn:
  """Ends a process that has failed, and does not wait for the others.

  At a normal end JAX waits for all, and aborts if they do not come. Process 0
  takes them along, so it leaves them time to say the same.
  """
  if several() and is_primary():
    time.sleep(_SAYING)
  # os._exit runs no handlers, JAX's least of all, and flushes nothing either.
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
