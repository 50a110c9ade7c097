"""A host that cannot write its part of a checkpoint, or waits for the others;
tests/test_resume.py has whole runs."""

import errno
import os
import threading

import jax.numpy as jnp
import pytest
from orbax.checkpoint._src.futures import synchronization
from orbax.checkpoint._src.metadata import array_metadata_store
from orbax.checkpoint._src.metadata import checkpoint as checkpoint_metadata

from behaviorlm_jax.train import checkpoints as checkpoints_lib

WAIT = 10  # Seconds until the other hosts have written, if not told before.


@pytest.fixture
def checkpoints(tmp_path):
  return checkpoints_lib.Checkpoints(tmp_path / 'checkpoints', 'plan')


def state(step):
  return {'step': jnp.int32(step), 'adapter': {'a': jnp.ones(3)}}


def _full(*arguments, **named):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def _full_later(*arguments, **named):
  _full()


# Every host's part, and what process 0 writes of the whole.
DISKS = {
  'part': (array_metadata_store.Store, 'write', _full_later),
  'whole': (checkpoint_metadata._MetadataStoreImpl, 'write', _full),
}


@pytest.fixture
def others(monkeypatch):
  """An event: the other hosts have written, too. No save ends before."""
  there = threading.Event()
  set_value = synchronization.MultihostSynchronizedValue.set

  def wait_for_all(self, value):
    if not value:
      there.wait(WAIT)
      there.set()
    set_value(self, value)

  monkeypatch.setattr(synchronization.MultihostSynchronizedValue, 'set', wait_for_all)
  yield there
  there.set()


@pytest.mark.parametrize('then', ['wait', 'save'])
@pytest.mark.parametrize('disk', DISKS)
def test_a_host_that_cannot_write_does_not_wait_for_the_others(
  checkpoints, others, monkeypatch, disk, then
):
  with monkeypatch.context() as patch:
    patch.setattr(*DISKS[disk])
    checkpoints.save(state(1))
    with pytest.raises(OSError, match='No space left'):
      checkpoints.save(state(2)) if then == 'save' else checkpoints.wait()
  assert not others.is_set()
  assert checkpoints.latest_step() == 0
  others.set()
  checkpoints.save(state(2))  # There is room again.
  checkpoints.wait()
  assert checkpoints.latest_step() == 2


def test_a_host_that_has_written_waits_for_the_others(checkpoints, others):
  checkpoints.save(state(1))
  threading.Timer(0.3, others.set).start()
  checkpoints.wait()
  assert others.is_set()
  assert checkpoints.latest_step() == 1
