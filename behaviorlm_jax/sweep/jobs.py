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
from behaviorlm_jax.sweep.job import Job

# What runs of one log and seed have in common, by the file that is written last.
_SHARED = (
  'events/behaviors.json',
  'base/evaluation.json',
  'baselines.parquet',
  'baselines.json',
)
# What a method may not change if it is to take what is shared.
_FIXED = ('data', 'model', 'lora', 'score', 'eval', 'retention')
_FIXED_OF_PLAN = ('min_context', 'window')


def jobs(config: ConfigDict, workdir: str | Path) -> list[Job]:
  """All runs: seed by seed, in each the methods in `config.order`."""
  for name in config.order:
    if name not in config.methods:
      raise InputError(
        f'config.order names {name!r}{nearest(name, config.methods)}, which is not in '
        'config.methods.'
      )
  if config.base.distributed.coordinator:
    raise InputError(
      'distributed.coordinator is set, but a sweep is one process; leave it out, or '
      'give one run of it to main.'
    )
  methods = {name: config.methods[name] for name in config.order}
  logs = [name for name, address in config.logs.items() if address]
  if not logs or not methods:
    raise InputError(
      'config.logs names no log or config.order nothing to run; give '
      f'--config.logs.NAME=FILE for one of {", ".join(config.logs) or "none"}.'
    )
  # Seeds outermost: a sweep that is stopped early has all methods to compare.
  return [
    _job(config, workdir, log, seed, name)
    for seed in range(max(method.seeds for method in methods.values()))
    for name, method in methods.items()
    if seed < method.seeds
    for log in logs
  ]


def _job(
  config: ConfigDict, workdir: str | Path, log: str, seed: int, name: str
) -> Job:
  method = config.methods[name]
  run = config.base.copy_and_resolve_references()
  run.seed, run.data.events = seed, config.logs[log]
  # A method's last, so that it may change what is set for a log.
  for changes in (config.log_fields.get(log, {}), method.fields):
    run.update(changes)
  origin = ''
  if method.start:
    start = _job(config, workdir, log, seed, _start(config, name))
    origin, run.stages, run.init_from = start.settings, ('b',), str(start.folder)
  run = ablations.ablate(run, method.ablations)
  config_lib.check(run)
  shots = '' if method.shots is None else f'_{method.shots}_shots'
  folder = Path(workdir) / log / f'seed{seed}{shots}' / name
  settings = results.settings_hash(run, origin, method.shots)
  return Job(log, seed, name, method, folder, run, settings)


def _start(config: ConfigDict, name: str) -> str:
  """The method from whose stage a another one starts."""
  start = config.methods[name].start
  begins = f'config.methods.{name} starts from {start!r}'
  if start not in config.order:
    raise InputError(
      f'{begins}{nearest(start, config.order)}, which is not in config.order.'
    )
  if config.methods[start].start:
    raise InputError(
      f'{begins}, which has no stage a of its own; name the method that it starts from.'
    )
  return start


def run_all(config: ConfigDict, workdir: str | Path) -> None:
  """Runs what is neither finished nor committed; writes all rows."""
  if bucket.is_address(workdir):
    raise InputError(
      f'--workdir={workdir} lies in a bucket, where a sweep cannot work; give a local '
      'folder.'
    )
  every, committed = jobs(config, workdir), Path(config.results)
  workdir = workspace.local(workdir).folder
  known = {
    (row['data'], row['method'], row['seed'], row['settings'])
    for row in rows_lib.read_folder(committed).of('results.csv')
  }
  open_jobs = [job for job in every if not job.finished]
  wanted = {job.key for job in open_jobs if (*job.key, job.settings) not in known}
  # A method whose stage a another one starts from is run for it again, rows or
  # not: these say nothing of its adapter.
  wanted |= {
    (job.log, job.method.start, job.seed) for job in open_jobs if job.key in wanted
  }
  todo = [job for job in open_jobs if job.key in wanted]
  for number, job in enumerate(todo, start=1):
    logging.info('sweep: run %d of %d, %s.', number, len(todo), job.folder)
    run_job(job)
    # After each, not at the end: who is killed leaves what is known by then.
    collect(config, every, workdir)
    preemption.check()
  collect(config, every, workdir)  # Also where nothing was left to run.


def run_job(job: Job) -> None:
  """Runs one job, beginning with what its siblings have."""
  job.folder.mkdir(parents=True, exist_ok=True)
  fields = job.method.fields
  if not {*fields, *fields.get('plan', {})} & {*_FIXED, *_FIXED_OF_PLAN}:
    for last in _SHARED:
      _take(job.folder, last)
  # A sibling of as many shots may have brought them along.
  if job.method.shots is not None and not (job.folder / 'events').exists():
    few_shot.thin(job.config, job.folder, job.method.shots)
  run_lib.run(job.config, job.folder)
  for stage in ('a_tuning', 'b_tuning'):  # Adapters stay.
    shutil.rmtree(job.folder / stage / 'checkpoints', ignore_errors=True)
  # Last: with it a run counts as finished.
  (job.folder / 'settings.txt').write_text(job.settings)


def _take(folder: Path, last: str) -> None:
  """Copies the file or folder that ends with `last` from a sibling that has it."""
  name = Path(last).parts[0]
  found = [path for path in sorted(folder.parent.iterdir()) if (path / last).exists()]
  if (folder / name).exists() or not found:
    return
  source, copy = found[0] / name, folder / f'{name}.tmp'
  # Beside it and then renamed: half a copy would pass for a whole one.
  shutil.rmtree(copy, ignore_errors=True)
  if source.is_dir():
    shutil.copytree(source, copy)
  else:
    shutil.copy(source, copy)
  copy.rename(folder / name)


def collect(config: ConfigDict, every: Sequence[Job], workdir: Path) -> None:
  """Writes the rows of all finished runs, and committed ones, in `workdir`."""
  committed = Path(config.results)
  rows = rows_lib.read_folder(committed)
  # Committed ones first: those of runs that are finished here replace them.
  kept = committed / choices.FOLDER
  if kept.is_dir():
    shutil.copytree(kept, workdir / choices.FOLDER, dirs_exist_ok=True)
  results.add_rows(every, config.contrasts, rows, workdir)
  rows_lib.write_folder(workdir, rows)


def report(config: ConfigDict, workdir: str | Path) -> None:
  results_page.write_page(Path(workdir), config.order, config.drawn)
