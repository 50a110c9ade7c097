"""The only door to a work directory, which all processes of a run share.

It is a folder that all of them see, or lies in a bucket, of which each works in a
copy: process 0 writes, through `keep`, and then all have what it wrote. Only
checkpoints go straight to their place, as Orbax lets every host write its part.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import logging
from etils import epath

from behaviorlm_jax.cluster import processes
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import addresses, bucket


class Workspace:
  """A work directory as this process has it: `folder`, and a bucket if it is a copy."""

  def __init__(self, folder: Path, mirror: bucket.Mirror | None = None):
    self.folder, self._mirror = folder, mirror

  def exists(self, path: Path) -> bool:
    """Whether process 0 sees the path: all hosts then do the same."""
    # The others do not look: a folder on a network may tell them no for a while yet.
    return processes.shared(processes.is_primary() and path.exists())

  def keep(self, write: Callable[..., object], path: Path, *arguments: object) -> None:
    """write(path, *arguments) on process 0, while the others wait; then all see it.

    Raises:
      Elsewhere: on the others, if it raised there.
    """
    processes.on_primary(self._write, write, path, *arguments)
    if self._mirror and not processes.is_primary():
      self._mirror.pull()

  def _write(self, write, path, *arguments):
    write(path, *arguments)
    self.upload()  # Before the others go on: they pull what was written.

  def upload(self) -> None:
    """Brings what this process wrote since the last time to the bucket, if any."""
    if self._mirror:
      self._mirror.push()

  def place(self, path: Path) -> Path | epath.Path:
    """Where a path of the folder really lies: in the bucket, if any."""
    if not self._mirror:
      return path.absolute()
    name = path.relative_to(self.folder).as_posix()
    return epath.Path(f'{self._mirror.bucket.address}/{name}')


def local(folder: str | Path) -> Workspace:
  """A work directory of this machine; made, before anything is fetched."""
  folder = Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(
      f'--workdir={folder} is no folder that can be made '
      f'({error.strerror}); give another.'
    ) from error
  return Workspace(folder)


@contextlib.contextmanager
def opened(address: str | Path, part: str = '') -> Iterator[Workspace]:
  """The work directory at a path or gs://BUCKET/NAME; made, if it is not there.

  Args:
    address: a folder or gs://BUCKET/NAME.
    part: a name, of what is done beside others; in a bucket it sees its own files
      alone.

  Raises:
    InputError: it cannot be made or read, or holds something else; another process
      works in the same copy.
    bucket.Unreachable: it may be reached later.
  """
  if not bucket.is_address(address):
    yield local(address)
    return
  # Several on one machine have a copy each.
  process = jax.process_index() if processes.several() else 0
  held = bucket.Bucket(str(address), '--workdir')
  copy = bucket.copy_folder(addresses.cache_dir(), held.address, part or str(process))
  mirror = bucket.Mirror(held, copy, writes=bool(part) or process == 0, part=part)
  with mirror.locked():  # Before it is changed: another process may work in it.
    mirror.pull()
    logging.info('%s is worked on in %s.', held.address, copy)
    with _said_as_address(mirror):
      yield Workspace(copy, mirror)


@contextlib.contextmanager
def _said_as_address(mirror):
  """Log and errors name the address, which the user knows, and not the copy."""

  def said(text: str) -> str:
    return text.replace(str(mirror.folder), mirror.bucket.address)

  def rename(record):
    record.msg, record.args = said(record.getMessage()), ()
    return True

  handler = logging.get_absl_handler()
  handler.addFilter(rename)
  try:
    yield
  except InputError as error:
    raise InputError(said(str(error))) from error
  finally:
    handler.removeFilter(rename)
