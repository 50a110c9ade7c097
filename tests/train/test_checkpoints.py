"""Checkpoints that cannot be written; tests/test_resume.py has whole runs."""

import errno
import os
import threading

import jax.numpy as jnp
import pytest
from orbax.checkpoint._src.futures import synchronization
from orbax.checkpoint._src.metadata import array_metadata_store

from behaviorlm_jax.train import checkpoints as checkpoints_lib

WAIT = 10  # Seconds until the other hosts have written, if not told before.


@pytest.fixture
def checkpoints(tmp_path):
  return checkpoints_lib.Checkpoints(tmp_path / 'checkpoints', 2, 'plan')


def state(step):
  return {'step': jnp.int32(step), 'adapter': {'a': jnp.ones(3)}}


@pytest.fixture
def full_disk(monkeypatch):
  async def write(*arguments, **named):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'process_1')
  monkeypatch.setattr(array_metadata_store.Store, 'write', write)


@pytest.fixture
def others(monkeypatch):
  """An event: the other hosts have written, too."""
  there, set_value = threading.Event(), (
      synchronization.MultihostSynchronizedValue.set)

  def wait_for_all(self, value):
    if not value:
      there.wait(WAIT)
      there.set()
    set_value(self, value)
  monkeypatch.setattr(synchronization.MultihostSynchronizedValue, 'set',
                      wait_for_all)
  yield there
  there.set()


@pytest.mark.usefixtures('full_disk')
@pytest.mark.parametrize('then', ['wait', 'save'])
def test_a_host_that_cannot_write_does_not_wait_for_the_others(
    checkpoints, others, then):
  checkpoints.save(state(1))
  with pytest.raises(OSError, match='No space left'):
    checkpoints.save(state(2)) if then == 'save' else checkpoints.wait()
  assert not others.is_set()


def test_a_host_that_can_waits_for_them(checkpoints, others):
  checkpoints.save(state(1))
  threading.Timer(.3, others.set).start()
  checkpoints.wait()
  assert others.is_set()
  assert checkpoints.latest_step() == 1
