"""Many runs: methods x logs x seeds.

Each run has a folder DIR/LOG/seedS/METHOD, or seedS_N_shots/METHOD, a work
directory like any other. Runs of one log, seed and shots share the events, the
evaluation of the untuned model and the baselines, and a method that starts from
another's stage a takes its adapter. Runs whose rows stand in `config.results`
with the same settings are not run again; a killed sweep goes on where it ended.
After every run all rows are written to DIR (sweep.rows has the files), and to
DIR/choices what the runs chose: where both take the place of those in
`config.results`, runs of another machine are compared with them, those of a log
and seed that it has a run of.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from behaviorlm_jax import ablations
from behaviorlm_jax import config as config_lib
from behaviorlm_jax import run as run_lib
from behaviorlm_jax.cluster import preemption, workspace
from behaviorlm_jax.errors import InputError, nearest
from behaviorlm_jax.io import bucket
from behaviorlm_jax.sweep import choices, few_shot, results, results_page
from behaviorlm_jax.sweep import rows as rows_lib

# What runs of one log and seed have in common, and when it is finished.
_SHARED = (
  ('events', 'behaviors.json'),
  ('base', 'evaluation.json'),
  ('baselines.json', ''),
)
# Sections that a method may not change if it is to take what is shared.
_FIXED = ('data', 'model', 'lora', 'score', 'eval')


@dataclasses.dataclass(frozen=True)
class Job:
  """One run."""

  log: str
  seed: int
  name: str  # Of the method.
  method: ConfigDict
  folder: Path
  config: ConfigDict  # Of the run, ablations applied.
  origin: str  # Settings of the run whose stage a it starts from, or ''.

  @property
  def key(self) -> tuple[str, str, int]:
    return self.log, self.name, self.seed

  @property
  def settings(self) -> str:
    return results.settings_hash(self.config, self.origin, self.method.shots)

  @property
  def finished(self) -> bool:
    # Of what runs last: the folders before it may be there and this one not.
    stages, last = tuple(self.config.stages), 'b_tuning'
    if stages == ('a',):
      last = 'a_tuning'
    elif not stages:
      last = 'sasrec' if self.config.sasrec.steps else 'base'
    settings = self.folder / 'settings.txt'
    return (
      (self.folder / last / 'evaluation.json').exists()
      and settings.exists()
      and settings.read_text() == self.settings
    )


def jobs(config: ConfigDict, workdir: str | Path) -> list[Job]:
  """All runs: seed by seed, in each the methods in `config.order`."""
  for name in config.order:
    if name not in config.methods:
      raise InputError(
        f'config.order names {name!r}'
        f'{nearest(name, config.methods)}, which is '
        'not in config.methods.'
      )
  if config.base.distributed.coordinator:
    raise InputError(
      'distributed.coordinator is set, but a sweep is one '
      'process; leave it out, or give one run of it to main.'
    )
  methods = {name: config.methods[name] for name in config.order}
  seeds = max((m.seeds for m in methods.values()), default=0)
  logs = [name for name, address in config.logs.items() if address]
  if not logs or not methods:
    raise InputError(
      'config.logs names no log or config.order nothing to '
      'run; give --config.logs.NAME=FILE for one of '
      f'{", ".join(config.logs) or "none"}.'
    )
  # Seeds outermost: a sweep that is stopped early has all methods to compare.
  return [
    _job(config, workdir, log, seed, name)
    for seed in range(seeds)
    for name, m in methods.items()
    if seed < m.seeds
    for log in logs
  ]


def _job(
  config: ConfigDict, workdir: str | Path, log: str, seed: int, name: str
) -> Job:
  chosen = config.methods[name]
  run = config.base.copy_and_resolve_references()
  run.seed, run.data.events = seed, config.logs[log]
  # A method's last, so that it may change what is set for a log.
  for changes in (config.log_fields.get(log, {}), chosen.fields):
    run.update(changes)
  shots = '' if chosen.shots is None else f'_{chosen.shots}_shots'
  folder = Path(workdir) / log / f'seed{seed}{shots}' / name
  origin = ''
  if chosen.start:
    if chosen.start not in config.order:
      raise InputError(
        f'config.methods.{name} starts from {chosen.start!r}'
        f'{nearest(chosen.start, config.order)}, '
        'which is not in config.order.'
      )
    if config.methods[chosen.start].start:
      raise InputError(
        f'config.methods.{name} starts from {chosen.start!r}, which has no '
        'stage a of its own; name the method that it starts from.'
      )
    start = _job(config, workdir, log, seed, chosen.start)
    origin, run.stages, run.init_from = start.settings, ('b',), str(start.folder)
  run = ablations.ablate(run, chosen.ablations)
  config_lib.check(run)
  return Job(log, seed, name, chosen, folder, run, origin)


def run_all(config: ConfigDict, workdir: str | Path) -> None:
  """Runs what is neither finished nor committed; writes all rows."""
  if bucket.is_address(workdir):
    raise InputError(
      f'--workdir={workdir} lies in a bucket, where a sweep '
      'cannot work; give a local folder.'
    )
  every, committed = jobs(config, workdir), Path(config.results)
  workdir = workspace.local(workdir).folder
  known = {
    (row['data'], row['method'], row['seed'], row['settings'])
    for row in rows_lib.read_folder(committed).of('results.csv')
  }
  todo = [
    job for job in every if not job.finished and (*job.key, job.settings) not in known
  ]
  # A method whose stage a another one starts from is run for it again, rows or
  # not: these say nothing of its adapter.
  starts = {(job.log, job.seed, job.method.start) for job in todo}
  todo += [
    job
    for job in every
    if not job.finished and job not in todo and (job.log, job.seed, job.name) in starts
  ]
  for number, job in enumerate(sorted(todo, key=every.index), start=1):
    logging.info('sweep: run %d of %d, %s.', number, len(todo), job.folder)
    run_job(job)
    # After each, not at the end: who is killed leaves what is known by then.
    collect(config, every, workdir)
    preemption.check()
  collect(config, every, workdir)  # Also where nothing was left to run.


def run_job(job: Job) -> None:
  """Runs one job, beginning with what its siblings have."""
  job.folder.mkdir(parents=True, exist_ok=True)
  if not set(job.method.fields) & set(_FIXED):
    for name, last in _SHARED:
      _take(job.folder, name, last)
  # A sibling of as many shots may have brought them along.
  if job.method.shots is not None and not (job.folder / 'events').exists():
    few_shot.thin(job.config, job.folder, job.method.shots)
  run_lib.run(job.config, job.folder)
  for stage in ('a_tuning', 'b_tuning'):  # Adapters stay.
    shutil.rmtree(job.folder / stage / 'checkpoints', ignore_errors=True)
  # Last: with it a run counts as finished.
  (job.folder / 'settings.txt').write_text(job.settings)


def _take(folder: Path, name: str, last: str) -> None:
  """Copies a finished file or folder of a sibling.

  `last`: what is written last in a folder of this name; '': it is a file.
  """
  if (folder / name).exists():
    return
  for sibling in sorted(folder.parent.iterdir()):
    if (sibling / name / last).exists() and sibling != folder:
      if last:
        # Beside it and then renamed: half a copy would pass for a whole one.
        copy = folder / f'{name}.tmp'
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(sibling / name, copy)
        copy.rename(folder / name)
      else:
        shutil.copy(sibling / name, folder / name)
      return


def collect(config: ConfigDict, every: Sequence[Job], workdir: Path) -> None:
  """Writes the rows of all finished runs, and committed ones, in `workdir`."""
  committed = Path(config.results)
  rows = rows_lib.read_folder(committed)
  # Committed ones first: those of runs that are finished here replace them.
  if (committed / choices.FOLDER).is_dir():
    shutil.copytree(
      committed / choices.FOLDER, workdir / choices.FOLDER, dirs_exist_ok=True
    )
  results.add_rows(every, config.contrasts, rows, workdir)
  rows_lib.write_folder(workdir, rows)


def report(config: ConfigDict, workdir: str | Path) -> None:
  results_page.write_page(Path(workdir), config.order, config.drawn)
