"""gs:// addresses: a work directory in a bucket, and files that lie in one.

A work directory is worked on in a local copy of each host's own, under the
cache folder: events are memory-mapped, files written beside and renamed, which
a bucket can do neither of. `push` brings what process 0 wrote to the bucket,
`pull` from there to the other hosts; hosts.first calls both. Only checkpoints
go straight to the bucket (`place`), as Orbax lets every host write its part.

contents.txt in the bucket lists what the work directory holds and is written
last: what a run was pushing when it was killed is not there yet. An object may
be newer than the list (metrics.jsonl grows), none is older. Tasks that prepare
shards of a log at the same time have a list each. Copies are compared by MD5,
so what a host has already is not fetched again.
"""

import base64
import contextlib
import fnmatch
import hashlib
import logging
import os
import pathlib

from absl import logging as absl_logging
from etils import epath

from behaviorlm_jax.errors import InputError

PREFIX = 'gs://'
_CONTENTS = 'contents{}.txt'
_mirror = None  # The one that this process works in.


def is_address(place):
  return str(place).startswith(PREFIX)


def open_workdir(address, cache, process, part=''):
  """The local folder of a work directory in a bucket, as the bucket has it.

  Args:
    address: gs://BUCKET/NAME.
    cache: folder for local copies.
    process: of this host; several on one machine have a copy each.
    part: a name, of what is done beside others; it has only its own files.

  Raises:
    InputError: the bucket cannot be read, or the package for it is missing.
  """
  global _mirror
  bucket = Bucket(address, '--workdir')
  mirror = Mirror(bucket, _copies(cache, bucket.address, part or process),
                  part and f'-{part}')
  mirror.pull()
  absl_logging.info('%s is worked on in %s.', bucket.address, mirror.folder)
  _mirror = mirror
  return mirror.folder


def push():
  """Brings what this process wrote since the last time to the bucket, if the
  work directory lies in one."""
  if _mirror:
    _mirror.push()


def pull():
  """Brings what others pushed to this process, if the work directory lies in a
  bucket."""
  if _mirror:
    _mirror.pull()


def place(path):
  """Where something that all hosts write belongs: in the bucket, if any; an
  absolute path else."""
  if not _mirror:
    return path.absolute()
  name = path.relative_to(_mirror.folder).as_posix()
  return epath.Path(f'{_mirror.bucket.address}/{name}')


def named(text):
  """A text for the user, who knows the address and not the local copy."""
  if not _mirror:
    return text
  return text.replace(str(_mirror.folder), _mirror.bucket.address)


def fetch(address, field, cache, wanted=lambda name: True):
  """A local copy, in the folder `cache`, of the file or folder at `address`.

  `wanted`: which files of a folder, by their name below it.

  Raises:
    InputError: nothing is there, or it cannot be read.
  """
  bucket = Bucket(address, field)
  objects = bucket.objects()
  if not objects:
    raise InputError(f'{field}: there is nothing at {address}; give a file or '
                     'folder that is in the bucket.')
  target = (_copies(cache, bucket.address, 'read')
            / pathlib.PurePosixPath(address).name)
  bucket.get({target / name: name for name, digest in objects.items()
              if wanted(name) and _differs(target / name, digest)})
  return target


def _copies(cache, address, kind):
  digest = hashlib.sha256(address.encode()).hexdigest()[:16]
  return cache / 'buckets' / f'{digest}-{kind}'


def _differs(path, digest):
  """Whether there is no file of this MD5; None: the bucket does not know it."""
  return digest is None or not path.is_file() or _md5(path) != digest


def _md5(path):
  """As buckets give it."""
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'md5').digest()
  return base64.b64encode(digest).decode()


class Bucket:
  """Objects below one address, by the part of their name after it."""

  def __init__(self, address, field):
    self.address, self._field = address.rstrip('/'), field
    if len(self.address) <= len(PREFIX):
      raise InputError(f'{field}: {address!r} names no bucket; give '
                       'gs://BUCKET/NAME.')
    try:
      import gcsfs  # Not everyone has a bucket.
    except ImportError as error:
      raise InputError(
          f"{field}: {address} needs gcsfs; run pip install -e '.[gcs]', or "
          'give a local folder.') from error
    # What it raises is said here, without its tracebacks.
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
    self._refused = (OSError, gcsfs.retry.HttpError,
                     *gcsfs.retry.RETRIABLE_EXCEPTIONS)
    self._fs = gcsfs.GCSFileSystem(consistency='md5', use_listings_cache=False)

  def _full(self, name):
    return f'{self.address}/{name}' if name else self.address

  @contextlib.contextmanager
  def _explained(self):
    try:
      yield
    except self._refused as error:
      reason = str(error).strip().splitlines()
      raise InputError(
          f'{self._field}: {self.address} refuses ({type(error).__name__}: '
          f'{reason[0] if reason else "no reason given"}); see that the bucket '
          'exists and this machine may read and write it, then run the same '
          'command again.') from error

  def objects(self):
    """{name: MD5 or None}; '' is an object at the address itself."""
    with self._explained():
      try:
        found = self._fs.find(self.address, detail=True)
      except FileNotFoundError:
        self._fs.ls(self.address[len(PREFIX):].split('/')[0])
        return {}
    root = self.address[len(PREFIX):]
    return {name[len(root):].lstrip('/'): facts.get('md5Hash')
            for name, facts in found.items()
            if name == root or name.startswith(root + '/')}

  def read(self, name):
    """The text of an object, or None if there is none."""
    with self._explained():
      try:
        return self._fs.cat_file(self._full(name)).decode()
      except FileNotFoundError:
        return None

  def write(self, name, text):
    with self._explained():
      self._fs.pipe_file(self._full(name), text.encode())

  def get(self, wanted):
    """Fetches {local path: name}; each file appears whole or not at all."""
    if not wanted:
      return
    # Two hosts on one machine may fetch the same.
    beside = {path: path.with_name(f'{path.name}.{os.getpid()}.tmp')
              for path in wanted}
    for path in wanted:
      path.parent.mkdir(parents=True, exist_ok=True)
    with self._explained():
      self._fs.get([self._full(name) for name in wanted.values()],
                   [str(path) for path in beside.values()])
    for path, temporary in beside.items():
      temporary.replace(path)

  def put(self, given):
    """Writes {local path: name}."""
    with self._explained():
      self._fs.put([str(path) for path in given],
                   [self._full(name) for name in given.values()])

  def remove(self, names):
    with self._explained(), contextlib.suppress(FileNotFoundError):
      self._fs.rm([self._full(name) for name in names])


class Mirror:
  """A local folder that is kept as a bucket has it, or the other way round."""

  def __init__(self, bucket, folder, part=''):
    self.bucket, self.folder = bucket, folder
    self._own = _CONTENTS.format(part)
    self._same = {}  # {name: (what the disk says, MD5)} of what both have.

  def _files(self):
    """{name: what tells a change} of the local folder."""
    found = {}
    for path in self.folder.rglob('*'):
      if path.is_file():
        stat = path.stat()
        name = path.relative_to(self.folder).as_posix()
        found[name] = stat.st_size, stat.st_mtime_ns
    return found

  def pull(self):
    """Makes the local folder hold what the bucket does, and nothing else."""
    # Listed after the lists are read, so that it has what they name.
    lists = {self._own}
    if self._own == _CONTENTS.format(''):
      lists |= {name for name in self.bucket.objects()
                if fnmatch.fnmatch(name, _CONTENTS.format('*'))}
    listed = [name for one in lists
              for name in (self.bucket.read(one) or '').splitlines()]
    objects = self.bucket.objects()
    # A user may have deleted some.
    digests = {name: objects[name] for name in listed if name in objects}
    files = self._files()
    for name in files.keys() - digests.keys():
      (self.folder / name).unlink()
    for folder, _, _ in os.walk(self.folder, topdown=False):
      with contextlib.suppress(OSError):  # Of those that hold something.
        os.rmdir(folder)
    self.bucket.get({
        self.folder / name: name for name, digest in digests.items()
        if self._same.get(name) != (files.get(name), digest)
        and _differs(self.folder / name, digest)})
    self.folder.mkdir(parents=True, exist_ok=True)
    files = self._files()
    self._same = {name: (files[name], digests[name]) for name in digests}

  def push(self):
    """Makes the bucket hold what the local folder does."""
    files = self._files()
    changed = {name: _md5(self.folder / name) for name, stat in files.items()
               if self._same.get(name, (None,))[0] != stat}
    gone = self._same.keys() - files.keys()
    if not changed and not gone:
      return
    self.bucket.put({self.folder / name: name for name in changed})
    self.bucket.write(self._own, ''.join(f'{name}\n' for name in sorted(files)))
    if gone:
      self.bucket.remove(gone)
    self._same = {name: (stat, changed.get(name) or self._same[name][1])
                  for name, stat in files.items()}
