"""gs:// addresses: a work directory in a bucket, and files that lie in one.

A work directory is worked on in a local copy of each host's own, under the
cache folder: events are memory-mapped, files written beside and renamed, which
a bucket can do neither of. `Mirror.push` brings what process 0 wrote to the bucket,
`Mirror.pull` from there to the other hosts; cluster.workspace calls both.

contents.txt in the bucket lists what the work directory holds and is written
last: what a run was pushing when it was killed is not there yet. An object may
be newer than the list (metrics.jsonl grows), none is older. Tasks that prepare
shards of a log at the same time have a list each. Copies are compared by MD5,
so what a host has already is not fetched again. Nothing in a bucket is deleted.
"""

import base64
import contextlib
import fcntl
import fnmatch
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from behaviorlm_jax.errors import InputError

PREFIX = 'gs://'
_CONTENTS = 'contents{}.txt'
SHARDS = 'events.shards'  # What process 0 joins; each task lists its own.


class Unreachable(Exception):
  """The bucket does not answer for now."""


def is_address(place: str | Path) -> bool:
  return str(place).startswith(PREFIX)


def copy_folder(cache: Path, what: str, kind: str) -> Path:
  """Where in the cache a copy of `what` belongs."""
  digest = hashlib.sha256(what.encode()).hexdigest()[:16]
  return cache / 'buckets' / f'{digest}-{kind}'


def fetch_copy(
  address: str,
  field: str,
  cache: Path,
  wanted: Callable[[str], bool] = lambda name: True,
) -> Path:
  """A local copy, in the folder `cache`, of the file or folder at `address`.

  `wanted`: which files of a folder, by their name below it.

  Raises:
    InputError: nothing is there, or it cannot be read.
    Unreachable: it may be reached later.
  """
  bucket = Bucket(address, field)
  objects = bucket.objects()
  if not objects:
    raise InputError(
      f'{field}: there is nothing at {address}; give a file or '
      'folder that is in the bucket.'
    )
  objects = {name: digest for name, digest in objects.items() if wanted(name)}
  # Another content has another folder: no file of an older one is left in it.
  version = json.dumps([bucket.address, sorted(objects.items())])
  target = copy_folder(cache, version, 'read') / PurePosixPath(address).name
  bucket.get(target, objects)
  return target


def _md5(path: Path) -> str:
  """As buckets give it."""
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'md5').digest()
  return base64.b64encode(digest).decode()


class Bucket:
  """Objects below one address, by the part of their name after it."""

  def __init__(self, address: str, field: str):
    self.address, self._field = address.rstrip('/'), field
    if len(self.address) <= len(PREFIX):
      raise InputError(f'{field}: {address!r} names no bucket; give gs://BUCKET/NAME.')
    try:
      import gcsfs  # Not everyone has a bucket.
      from google.auth import exceptions
    except ImportError as error:
      raise InputError(
        f"{field}: {address} needs gcsfs; run pip install -e '.[gcs]', or "
        'give a local folder.'
      ) from error
    # What it raises is said here, without its tracebacks.
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
    self._refused = (
      OSError,
      gcsfs.retry.HttpError,
      exceptions.GoogleAuthError,
      *gcsfs.retry.RETRIABLE_EXCEPTIONS,
    )
    self._passing = lambda error: (
      gcsfs.retry.is_retriable(error) or isinstance(error, exceptions.TransportError)
    )
    # What other hosts have written since must be seen.
    self._fs = gcsfs.GCSFileSystem(use_listings_cache=False)

  def _full(self, name: str) -> str:
    return f'{self.address}/{name}' if name else self.address

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    try:
      yield
    except self._refused as error:
      lines = str(error).strip().splitlines() or ['no reason given']
      reason = f'{type(error).__name__}: {lines[0]}'
      if self._passing(error):
        raise Unreachable(
          f'{self._field}: {self.address} does not answer ({reason}); run '
          'the same command again'
        ) from error
      if isinstance(error, OSError) and error.errno is not None:
        raise  # The local disk.
      raise InputError(
        f'{self._field}: {self.address} refuses ({reason}); see that the bucket exists '
        'and this machine may read and write it, then run the same command again.'
      ) from error

  def objects(self) -> dict[str, str | None]:
    """{name: MD5 or None}; '' is an object at the address itself.

    Objects that were put together in the bucket have no MD5.
    """
    root = self.address[len(PREFIX) :]
    with self._explained():
      try:
        found = self._fs.find(self.address, detail=True)
      except FileNotFoundError:
        # Nothing there, or no such bucket? This raises of the second.
        self._fs.ls(root.split('/')[0])
        return {}
    # Names that end with / stand for folders.
    return {
      name[len(root) :].lstrip('/'): facts.get('md5Hash')
      for name, facts in found.items()
      if (name == root and facts['type'] == 'file')
      or (name.startswith(root + '/') and not name.endswith('/'))
    }

  def read(self, name: str) -> str:
    """The text of an object."""
    with self._explained():
      return self._fs.cat_file(self._full(name)).decode()

  def write(self, name: str, text: str) -> None:
    with self._explained():
      self._fs.pipe_file(self._full(name), text.encode())

  def get(self, folder: Path, wanted: Mapping[str, str | None]) -> None:
    """Fetches objects {name: MD5} that the folder does not have; each appears whole.

    None: the bucket does not know the MD5, so it is fetched.
    """
    missing = {
      name: folder / name
      for name, digest in wanted.items()
      if digest is None
      or not (folder / name).is_file()
      or _md5(folder / name) != digest
    }
    if not missing:
      return
    # Two hosts on one machine may fetch the same.
    suffix = f'.{os.getpid()}.tmp'
    beside = {
      name: path.with_name(path.name + suffix) for name, path in missing.items()
    }
    for path in missing.values():
      path.parent.mkdir(parents=True, exist_ok=True)
    with self._explained():
      self._fs.get(
        [self._full(name) for name in missing], [str(path) for path in beside.values()]
      )
    for name, path in missing.items():
      digest = wanted[name]
      if digest is not None and _md5(beside[name]) != digest:
        # Cut off on the way, or written anew since it was listed.
        raise Unreachable(
          f'{self._field}: {self._full(name)} arrived with another MD5 than '
          f'{digest}; run the same command again'
        )
      beside[name].replace(path)

  def put(self, folder: Path, names: Iterable[str]) -> None:
    """Writes files of a folder, each under its name."""
    with self._explained():
      self._fs.put(
        [str(folder / name) for name in names],
        [self._full(name) for name in names],
        consistency='md5',  # What arrives there is compared, too.
      )


class Mirror:
  """A local folder that is kept as a bucket has it, or the other way round.

  `writes`: whether this is the process that pushes; `part`: a name, of what is done
  beside others and has only its own files.
  """

  def __init__(self, bucket: Bucket, folder: Path, writes: bool, part: str = ''):
    self.bucket, self.folder = bucket, folder
    self._writes, self._whole = writes, not part
    self._list = _CONTENTS.format(part and f'-{part}')
    self._same = {}  # {name: (what the disk says, MD5)} of what both have.

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Refuses a copy in which another process works."""
    self.folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder: inside of it `pull` would delete the file.
    with open(self.folder.with_name(self.folder.name + '.lock'), 'w') as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise InputError(
          f'--workdir: another process on this machine works in {self.folder}, '
          f'its copy of {self.bucket.address}; wait for it, or end it.'
        ) from error
      yield

  def _files(self) -> dict[str, tuple[int, int]]:
    """{name: what tells a change} of the local folder."""
    found = {}
    for path in self.folder.rglob('*'):
      if path.is_file():
        stat = path.stat()
        name = path.relative_to(self.folder).as_posix()
        # Digests of all at every push would read gigabytes.
        found[name] = stat.st_size, stat.st_mtime_ns
    return found

  def _listed(self, found: Iterable[str]) -> set[str]:
    """Names that the lists hold; the writer's own is made, or mended.

    `found`: the objects that are there.
    """
    lists = fnmatch.filter(found, _CONTENTS.format('*'))
    if found and not lists:
      raise InputError(
        f'--workdir: {self.bucket.address} holds {len(found)} objects, such '
        f'as {min(found)}, but no {self._list}: it is no work directory that '
        'this program began; give another name.'
      )
    names = {
      name: self.bucket.read(name).splitlines()
      for name in lists
      if self._whole or name == self._list
    }
    own = names.get(self._list)
    # Without names that a user deleted: what is pushed to their place counts
    # when all of it is there.
    mended = [name for name in own or () if name in found]
    if self._writes and own != mended:
      self._write_list(mended)
      names[self._list] = mended
    return {name for listed in names.values() for name in listed}

  def _write_list(self, names: Iterable[str]) -> None:
    self.bucket.write(self._list, ''.join(f'{name}\n' for name in sorted(names)))

  def pull(self) -> None:
    """Makes the local folder hold what the bucket does, and nothing else."""
    listed = self._listed(self.bucket.objects())
    # Shards are for process 0 to join, and for nobody once they are joined.
    if self._whole and (not self._writes or 'events/config.json' in listed):
      listed = {name for name in listed if not name.startswith(f'{SHARDS}/')}
    # Of after the lists, so that it has what they name.
    objects = self.bucket.objects()
    digests = {name: objects[name] for name in listed if name in objects}
    files = self._files()
    for name in files.keys() - digests.keys():
      (self.folder / name).unlink()
    # From the inside out, so that a folder of empty ones goes, too.
    for folder, _, _ in os.walk(self.folder, topdown=False):
      with contextlib.suppress(OSError):  # Of those that hold something.
        os.rmdir(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    self.bucket.get(
      self.folder,
      {
        name: digest
        for name, digest in digests.items()
        if self._same.get(name) != (files.get(name), digest)
      },
    )
    files = self._files()
    self._same = {name: (files[name], digests[name]) for name in digests}

  def push(self) -> None:
    """Makes the bucket hold what the local folder does.

    Raises:
      InputError: files that both had are gone here, which is no work of ours.
    """
    files = self._files()
    if lost := self._same.keys() - files.keys():
      raise InputError(
        f'--workdir: {len(lost)} files, such as {min(lost)}, are gone from '
        f'the local copy of {self.bucket.address}; the bucket still has them:'
        ' run the same command again.'
      )
    changed = {
      name: (stat, _md5(self.folder / name))
      for name, stat in files.items()
      if name not in self._same or self._same[name][0] != stat
    }
    if not changed:
      return
    # Objects first, then the list that names them: see the module.
    self.bucket.put(self.folder, changed)
    self._write_list(
      name for name in files if not (self._whole and name.startswith(f'{SHARDS}/'))
    )
    self._same |= changed
