"""What a work directory belongs to: the config, the log and the model.

Every folder of a work directory keeps the config that made it and the
fingerprints of events and base model. A run is refused where they differ,
before anything is read, compiled or written, but for hosts.txt where several
processes run.
"""

import datetime
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.cluster import processes, processor
from behaviorlm_jax.cluster.workspace import Workspace
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import addresses, bucket, files, hub

# What every stage of one work directory must share. model.remat and
# model.attention may differ: they change speed and memory alone.
SHARED = ('data', 'model.address', 'model.dtype', 'lora', 'seed')
# Where a run runs, which may change from call to call.
_WHERE = ('mesh', 'distributed')
# What decides the untuned model's scores; questions show up to plan.window events.
_BASE = (*SHARED, 'eval', 'score', 'retention', 'plan.min_context', 'plan.window')
# What decides each folder that no stage owns.
DECIDES = {
  'events': (
    'data.events',
    'data.columns',
    'data.csv',
    'data.time_format',
    'data.time_zone',
    'data.nulls',
    'data.collapse_repeats',
    'data.max_rejected',
    'data.split',
    'data.anchor_share',
    'seed',
  ),
  'base': _BASE,
  'sasrec': (*_BASE, 'sasrec'),
}
# Fields that take hf://, and where to look for what it was: `events` last, as
# events serve any model.
_ADDRESSES = ('model.address', 'data.events', 'data.conversations')
_PINNED_IN = ('base', 'a_tuning', 'b_tuning', 'events')
_OTHER = {'events': 'other events', 'base': 'another base model'}


# Configs, as folders keep them.


def as_dict(config: ConfigDict) -> dict[str, Any]:
  """The config as plain JSON values, without what a call may vary."""
  values = json.loads(config.to_json_best_effort())
  # Which stages, and which shard, is said anew in every call on one directory.
  del values['stages'], values['data']['shard']
  return values


def flat(values: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """{dotted name: value} of nested dicts."""
  found = {}
  for name, value in values.items():
    if isinstance(value, dict):
      found |= flat(value, f'{prefix}{name}.')
    else:
      found[prefix + name] = value
  return found


def differences(mine: dict, theirs: dict, names: Iterable[str]) -> list[str]:
  """'field (theirs, now mine)' of every field that differs.

  `names`: fields and sections of two nested dicts.
  """
  mine, theirs = flat(mine), flat(theirs)
  found = []
  for name in names:
    for field in sorted(mine | theirs):
      one, other = mine.get(field), theirs.get(field)
      if one != other and f'{field}.'.startswith(f'{name}.'):
        # An older version of this program did not know the field.
        said = 'not there' if other is None else repr(other)
        found.append(f'{field} ({said}, now {one!r})')
  return found


def read_config(folder: Path) -> dict[str, Any] | None:
  """The config.json of a folder, or None."""
  path = folder / 'config.json'
  return json.loads(path.read_text()) if path.exists() else None


def claim(
  folder: Path, config: ConfigDict, prints: dict[str, str], stage: str = ''
) -> None:
  """Writes the config.json of a folder whose work begins; `stage`: that it is of."""
  folder.mkdir(parents=True, exist_ok=True)
  origin = {'fingerprints': prints, 'stage': stage}
  files.write_json(folder / 'config.json', as_dict(config) | origin)


# What a config leaves open.


def pin(config: ConfigDict, workdir: Path) -> ConfigDict:
  """The config with a commit in every hf:// address, and without 'auto' dtypes.

  What an earlier call settled for this work directory goes on.
  """
  earlier = [flat(read_config(workdir / folder) or {}) for folder in _PINNED_IN]
  config = pin_addresses(config, _ADDRESSES, earlier)
  if config.model.dtype == 'auto':
    if config.init_from:  # The stage that this run goes on from.
      origin = stage_a_adapter(config, workdir).parent
      earlier.append(flat(read_config(origin) or {}))
    # What began as float32 goes on so, also on a machine with faster bfloat16.
    found = [past['model.dtype'] for past in earlier if 'model.dtype' in past]
    fastest = processor.fastest_dtype(jax.default_backend())
    config.model.dtype = found[0] if found else fastest
    logging.info('model.dtype: auto is %s.', config.model.dtype)
  if config.score.dtype == 'auto':
    config.score.dtype = config.model.dtype
  return config


def pin_addresses(
  config: ConfigDict, names: Iterable[str], earlier: Iterable[dict] = ()
) -> ConfigDict:
  """A copy of the config with a commit in the hf:// addresses of some fields.

  `earlier`: {dotted name: value} of configs that were pinned before.
  """
  config = config.copy_and_resolve_references()
  for name in names:
    before = ','.join(past.get(name, '') for past in earlier).split(',')
    pinned = [
      hub.pin_commit(part, name, before) if part.startswith(hub.PREFIX) else part
      for part in config_lib.value_of(config, name).split(',')  # A log may be several.
    ]
    config.update_from_flattened_dict({name: ','.join(pinned)})
  return config


# What is refused.


def check_config(config: ConfigDict, workdir: Path) -> None:
  """Refuses a work directory whose folders another config made.

  A stage that is run needs its own config, wherever it runs; other stages need
  to share SHARED.
  """
  mine = as_dict(config)
  ran = {config_lib.FOLDERS[stage] for stage in config.stages}
  for folder in (*DECIDES, 'a_tuning', 'b_tuning'):
    theirs = read_config(workdir / folder)
    if theirs is None:
      continue
    names = DECIDES.get(folder, SHARED)
    if folder in ran:
      # A stage goes on from its checkpoint: nothing may differ but where it runs.
      names = [name for name in mine if name not in _WHERE]
    if found := differences(mine, theirs, names):
      raise InputError(
        f'{workdir / folder} was made with another config: '
        f'{", ".join(found)}; use another --workdir or the old values.'
      )
  if needs_stage_a(config) and 'a' not in config.stages:
    stage_a_adapter(config, workdir)


def check_hosts(config: ConfigDict, workspace: Workspace) -> None:
  """Refuses hosts of one run that differ, or do not see one work directory."""
  if not processes.several():
    return
  processes.assert_same(
    {
      'the program': _program(),
      'jax': jax.__version__,
      'their devices': jax.local_devices()[0].device_kind,
      **facts(config),
    }
  )
  path = workspace.folder / 'hosts.txt'
  # A time, so that a file of an earlier run is not taken for this one's.
  began = datetime.datetime.now(datetime.UTC).isoformat()
  text = f'{jax.process_count()} processes, from {began}\n'
  workspace.keep(files.write_text, path, text)
  found = path.read_text() if path.exists() else 'no such file'
  # Copies of a bucket have a path each, and one address.
  where = f'what they read in {workspace.place(path)}'
  processes.assert_same({f'{where} (--workdir must be one that all see)': found})


def facts(config: ConfigDict) -> dict[str, str]:
  """{field: value} of a config, as texts, without what hosts do not share."""
  values = flat(as_dict(config), 'config.')
  values['config.stages'] = tuple(config.stages)
  return {
    name: str(value)
    for name, value in values.items()
    if not name.startswith('config.distributed.')
  }


def _program() -> str:
  """SHA-256 of the package's own files."""
  digest = hashlib.sha256()
  root = Path(__file__).parents[1]
  for path in sorted([*root.rglob('*.py'), *root.rglob('*.jsonl')]):
    # Names, too: contents that change places are another program.
    digest.update(f'{path.relative_to(root)}\0'.encode() + path.read_bytes())
  return digest.hexdigest()


def check_fingerprints(
  config: ConfigDict, workdir: Path, prints: dict[str, str]
) -> None:
  """Refuses folders that belong to other events or another base model."""
  for folder in ('base', 'a_tuning', 'b_tuning'):
    theirs = read_config(workdir / folder)
    # Of a folder that is not there, or an older version's: nothing to compare.
    found = (theirs or {}).get('fingerprints', prints)
    for name, mine in prints.items():
      if found[name] != mine:
        raise InputError(
          f'{workdir / folder} was made from {_OTHER[name]} (fingerprint '
          f'{found[name][:12]}, now {mine[:12]}); use another --workdir.'
        )
  if config.init_from:
    _check_origin(stage_a_adapter(config, workdir), prints)


def _check_origin(adapter: Path, prints: dict[str, str]) -> None:
  """An adapter from elsewhere must fit the base model; a log may differ."""
  theirs = (read_config(adapter.parent) or {}).get('fingerprints')
  if theirs is None:
    text = 'does not say which base model it was trained on; only shapes are checked'
    logging.warning('init_from: %s %s.', adapter, text)
  elif theirs['base'] != prints['base']:
    raise InputError(
      f'init_from: {adapter} was trained on another base model (fingerprint '
      f'{theirs["base"][:12]}, now {prints["base"][:12]}); set model.address '
      'to that model.'
    )
  elif theirs['events'] != prints['events']:
    text = 'make sure that they hold none of the test split here'
    logging.warning('init_from: %s was trained on other events; %s.', adapter, text)


# Stage a, from which stage b starts.


def needs_stage_a(config: ConfigDict) -> bool:
  """Whether stage b of this config starts from stage a's adapter."""
  return 'b' in config.stages and 'no_anchor_stage' not in config.ablations


def stage_a_adapter(config: ConfigDict, workdir: Path) -> Path:
  """The adapter folder that stage b starts from.

  Of this work directory, or of what init_from names: a work directory (of stage a,
  or of its only stage), a stage or an adapter folder.
  """
  place = config.init_from or workdir
  field = 'init_from' if config.init_from else '--workdir'
  root = Path(place)
  if bucket.is_address(place):
    root = bucket.fetch_copy(place, field, addresses.cache_dir(), _of_adapter)
  for folder in (root / 'a_tuning' / 'adapter', root / 'adapter', root):
    if (folder / 'adapter_config.json').exists():
      return folder
  raise InputError(
    f'stage b starts from stage a, but {place} ({field}) holds no finished '
    'a_tuning/adapter; run stage a there, or give another --config.init_from=DIR.'
  )


def _of_adapter(name: str) -> bool:
  path = PurePosixPath(name)
  return path.name == 'config.json' or path.name.startswith('adapter_')
