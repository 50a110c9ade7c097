"""The events/ of a work directory: prepared once, by one process or in shards."""

import re
from pathlib import Path

import duckdb
from absl import logging
from ml_collections import ConfigDict

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.cluster import ownership
from behaviorlm_jax.cluster import workspace as workspace_lib
from behaviorlm_jax.cluster.workspace import Workspace
from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.data.log import join, sources
from behaviorlm_jax.data.log import shards as shards_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import bucket


def load_events(config: ConfigDict, workspace: Workspace) -> events_lib.Events:
  """The event table of this work directory, prepared at the first call."""
  folder = workspace.folder / 'events'
  workspace.keep(_prepare_events, folder, config)
  return events_lib.open_events(folder)


def _prepare_events(folder: Path, config: ConfigDict) -> None:
  log = sources.open_log(config.data.events, config.data)
  origin = ownership.as_dict(config) | {'log_sha256': log.sha256()}
  events_lib.clean(folder)  # Of a run that was killed.
  if not folder.exists():
    shards = folder.with_name(bucket.SHARDS)
    if shards.exists():  # Others have done the heavy part.
      complete = _complete(shards, origin)
      join.join(log, complete, folder, config.seed, origin)
      logging.info(
        '%s: %d shards joined in %s; they are not needed any more.',
        shards,
        len(complete),
        folder,
      )
    else:
      events_lib.prepare(config.data, log, folder, config.seed, origin)
    return
  # That the config fits, ownership.check_config has said; the address may still
  # hold another file than it did.
  theirs = ownership.read_config(folder)
  if theirs is None:
    raise InputError(
      f'{folder} exists but was not made by this program; use another --workdir.'
    )
  if theirs['log_sha256'] != origin['log_sha256']:
    raise InputError(
      f'{folder} was made from another content of {log.name}; use another --workdir.'
    )


def prepare_part(config: ConfigDict, workdir: str | Path) -> None:
  """Prepares data.shard's part of the users, for `load_events` to join."""
  index, count = config_lib.shard(config)
  part = f'{index}-of-{count}'
  with workspace_lib.opened(workdir, part) as workspace:
    events = workspace.folder / 'events'
    # In the bucket itself: this part's copy of it holds its own files alone.
    if workspace.place(events / 'config.json').exists():
      logging.info('%s is prepared; no shard is needed.', events)
      return
    config = ownership.pin_addresses(config, ['data.events'])
    folder = workspace.folder / bucket.SHARDS / part
    log = sources.open_log(config.data.events, config.data)
    # DuckDB's hash decides which users are in a shard, and may change with it.
    origin = ownership.as_dict(config) | {
      'log_sha256': log.sha256(),
      'duckdb': duckdb.__version__,
    }
    if folder.exists():
      _check_shard(folder, origin)
    else:
      shards_lib.write_shard(log, folder, (index, count), origin)
      workspace.upload()
    logging.info(
      '%s is prepared; once all %d are, run the same command without data.shard.',
      folder,
      count,
    )


def _complete(root: Path, origin: dict) -> list[Path]:
  """The folders of all shards in `root`; refuses missing and foreign ones."""
  matches = [re.fullmatch(r'(\d+)-of-(\d+)', p.name) for p in root.iterdir()]
  found = {(int(m[2]), int(m[1])): root / m[0] for m in matches if m}
  counts = sorted({count for count, _ in found})
  if len(counts) != 1:
    parts = ' and of '.join(map(str, counts))
    what = f'shards of {parts} parts' if counts else 'no shard'
    raise InputError(
      f'{root} holds {what}, but all parts of one number are needed; delete '
      'what does not belong to it, or the folder to prepare the log here.'
    )
  (count,) = counts
  missing = [i for i in range(count) if (count, i) not in found]
  if missing:
    listed = ', '.join(map(str, missing[:20]))
    raise InputError(
      f'{root} holds {count - len(missing)} of {count} shards and lacks '
      f'{listed}{", ..." * (len(missing) > 20)}; run this command with '
      f'--config.data.shard={missing[0]}/{count} for each, or delete the '
      'folder to prepare the log here.'
    )
  # In the order of their numbers; any other would give the same events.
  folders = [found[count, i] for i in range(count)]
  # Who joins hashes nothing, so its own DuckDB may be another: all shards need
  # that of the first.
  origin = origin | {'duckdb': (ownership.read_config(folders[0]) or {}).get('duckdb')}
  for folder in folders:
    _check_shard(folder, origin)
  return folders


def _check_shard(folder: Path, origin: dict) -> None:
  """Refuses a shard of another log or config; the log may have moved."""
  theirs = ownership.read_config(folder) or {}
  decides = [name for name in ownership.DECIDES['events'] if name != 'data.events']
  found = ownership.differences(origin, theirs, ['log_sha256', 'duckdb', *decides])
  if found:
    raise InputError(
      f'{folder} was made of another log or config, or by another version: '
      f'{", ".join(found)}; delete it and prepare it again, or use the old '
      'ones.'
    )
