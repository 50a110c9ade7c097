"""Logs of which frequent tail behaviors keep but a few training events.

Prepared events are thinned, and not the file that they were read from: cuts,
ids and groups stay those of the whole log, and with them the events of
validation and test. A sample of these goes only where fewer than
plan.min_context events are left before it.
"""

import hashlib
import shutil
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from behaviorlm_jax import seeds
from behaviorlm_jax.cluster import ownership, workspace
from behaviorlm_jax.data import prepared
from behaviorlm_jax.data.log import columns
from behaviorlm_jax.io import files
from behaviorlm_jax.report import run_files

# Training events from which on a tail behavior is thinned: below it, learning
# from 50 could not be compared with learning from fewer.
FROM = 50


def thinned_names(run: run_files.RunFiles) -> list[str]:
  """Of the behaviors that were thinned, or could be."""
  tails = [b for b in run.behaviors if b['group'] == 'tail']
  frequent = [b['name'] for b in tails if b['train_count'] >= FROM]
  return run.summary.get('thinned', frequent)


def thin(config: ConfigDict, workdir: Path, shots: int) -> None:
  """Prepares a run's events with `shots` of each such behavior in training."""
  whole = workdir / 'whole'
  shutil.rmtree(whole, ignore_errors=True)  # Of a sweep that was killed.
  config = ownership.pin_addresses(config, ['data.events'])
  events = prepared.load_events(config, workspace.local(whole))
  folder = whole / 'events'
  run, kept = run_files.read_run(whole), np.ones(len(events.user), bool)
  behaviors = run_files.read_json(folder / 'behaviors.json', None)
  for name in thinned_names(run):
    b = run.ids[name]
    found = np.flatnonzero((events.behavior == b) & (events.split == 0))
    # One order per seed and name, whose beginning stays: more shots include fewer.
    lost = seeds.stream(config.seed, 'shots', name).permutation(found)[shots:]
    kept[lost] = False
    behaviors[b]['count'] -= len(lost)
    behaviors[b]['train_count'] -= len(lost)
  table = {name: getattr(events, name)[kept] for name in columns.DTYPES}
  # Users are sorted, so the leftmost place of a user is that of the first event.
  table['first'] = np.searchsorted(table['user'], table['user'])
  with columns.Writer(folder, columns.DTYPES) as writer:
    writer.add(**table)
  made_from = f'{events.fingerprint} {config.seed} {shots}'
  summary = run.summary | {
    'events': int(kept.sum()),
    'thinned': thinned_names(run),
    'fingerprint': hashlib.sha256(made_from.encode()).hexdigest(),
  }
  summary['splits']['train'] -= int((~kept).sum())
  files.write_json(folder / 'behaviors.json', behaviors)
  files.write_json(folder / 'summary.json', summary)
  # Last: events/ exists only when all of it is there.
  folder.rename(workdir / 'events')
  whole.rmdir()
