"""Processes find each other; each says who is missing or does not belong."""

import concurrent.futures
import socket
import time

import pytest

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.cluster import processes, rendezvous
from behaviorlm_jax.errors import InputError


@pytest.fixture
def port():
  with socket.create_server(('', 0)) as server:
    return server.getsockname()[1]


@pytest.fixture
def meet(port):
  """Process `process` comes, in a thread; a Future of what it says."""
  pool = concurrent.futures.ThreadPoolExecutor()

  def come(process, processes=3, timeout=20):
    config = config_lib.default().distributed
    config.update(
      {
        'coordinator': f'localhost:{port}',
        'processes': processes,
        'process': process,
        'timeout': timeout,
      }
    )
    return pool.submit(rendezvous.wait_for_all, config)

  yield come
  pool.shutdown()


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 1, 0)])
def test_all_go_on_when_all_are_there(meet, port, order):
  found = [meet(process) for process in order]
  assert [one.result(10) for one in found] == [None] * 3
  with socket.create_server(('', port)):  # It is free for JAX.
    pass


def test_nobody_goes_on_before(meet):
  found = [meet(0), meet(1)]
  time.sleep(0.5)
  assert not any(one.done() for one in found)
  assert meet(2).result(10) is None
  assert [one.result(10) for one in found] == [None] * 2


def test_all_say_who_is_missing(meet):
  found = [meet(0, timeout=1), meet(2, timeout=1)]
  for one in found:
    with pytest.raises(InputError, match=r'process 1 of 3 is missing'):
      one.result(10)


def test_without_process_0_the_others_say_so(meet, port):
  with pytest.raises(
    InputError, match=f'process 1 waited 1 s .* process 0 at localhost:{port}'
  ):
    meet(1, timeout=1).result(20)


@pytest.mark.parametrize(
  'second, sentence',
  [
    ((1, 3), 'process 1 of 3 came to .*, which waits for 2 of 3'),
    ((3, 4), 'process 3 of 4 came to .*, which waits for 2 of 3'),
  ],
)
def test_a_number_that_does_not_fit_ends_all(meet, second, sentence):
  first = [meet(0), meet(1)]
  time.sleep(2)  # Process 1 comes before the other.
  for one in (*first, meet(*second)):
    with pytest.raises(InputError, match=sentence):
      one.result(10)


def connect(port):
  """A connection, as soon as process 0 listens."""
  while True:
    try:
      return socket.create_connection(('localhost', port))
    except ConnectionRefusedError:
      time.sleep(0.05)


@pytest.mark.parametrize(
  'said',
  [b'GET / HTTP/1.1\n', b'\x16\x03\x01\xff\n', b'behaviorlm_jax a b\n', b'', None],
)
def test_a_stranger_is_no_process(meet, port, caplog, said):
  """It says something else, or leaves (None: it stays and says nothing)."""
  found = [meet(0), meet(1)]
  with connect(port) as stranger:
    if said == b'':
      stranger.close()
    elif said:
      stranger.sendall(said)
    found.append(meet(2))
    assert [one.result(10) for one in found] == [None] * 3
  assert 'someone who is no process of this run' in caplog.text


def test_a_port_that_is_taken_is_named(meet, port):
  with (
    socket.create_server(('', port)),
    pytest.raises(InputError, match=f'cannot listen on port {port}'),
  ):
    meet(0).result(10)


@pytest.mark.parametrize(
  'fields, sentence',
  [
    ({'coordinator': 'here'}, "coordinator is 'here'; give host:port"),
    (
      {'coordinator': 'a:1', 'processes': 2, 'process': 2},
      'process is 2 and distributed.processes is 2; .* from 0 to 1',
    ),
  ],
)
def test_settings_that_cannot_be_are_refused(fields, sentence):
  config = config_lib.default().distributed
  config.update(fields)
  with pytest.raises(InputError, match=sentence):
    processes.meet(config)
