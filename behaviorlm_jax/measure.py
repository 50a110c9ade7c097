"""What is measured of the untuned model, the baselines and each stage.

Scores of samples, retention, predictions: what stands in the work directory
already is not measured again.
"""

import contextlib
import hashlib
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import tqdm
from pyarrow import parquet

from behaviorlm_jax.cluster import ownership, preemption, processes
from behaviorlm_jax.data import questions
from behaviorlm_jax.evaluate import evaluation, sasrec
from behaviorlm_jax.evaluate.scored import read_scored, Scored
from behaviorlm_jax.io import files
from behaviorlm_jax.setup import Setup

LOG_P = 'log_p'  # Folder of an arm's scores.
# Tokens of a row, and rows of a batch of a part, which is the same on any machine;
# more rows are in it until so many events are asked for.
_LENGTH, _ROWS, _PART = 512, 8, 512


def evaluate_base(setup: Setup) -> None:
  """The untuned model and the free baselines, once per work directory."""
  workspace, config = setup.workspace, setup.config
  folder = workspace.folder / 'base'
  if not workspace.exists(folder / 'config.json'):
    workspace.keep(ownership.claim, folder, config, setup.fingerprints)
  path = workspace.folder / 'baselines.json'
  if not workspace.exists(path):
    tolerance = config.eval.anchor_tolerance
    with setup.clock.part('baselines'):
      workspace.keep(
        evaluation.write_baselines, path, setup.counts, setup.samples, tolerance
      )
  evaluate(setup, folder, None)
  if config.sasrec.steps:
    with setup.clock.part('sasrec'):
      evaluate_sasrec(setup)


def evaluate_sasrec(setup: Setup) -> None:
  """Trains and evaluates the baseline, once per work directory."""
  config, events = setup.config, setup.events
  folder = setup.workspace.folder / 'sasrec'
  if setup.workspace.exists(folder / 'evaluation.json'):
    return
  setup.workspace.keep(ownership.claim, folder, config, setup.fingerprints)
  recipe = sasrec.Recipe(
    **config.sasrec,
    weekday=config.data.weekday,
    min_context=config.plan.min_context,
    seed=config.seed,
  )
  with _progress(recipe.steps, 'sasrec', 'step') as progress:
    model = sasrec.fit_model(events, recipe, progress)
  samples = setup.samples.every
  log_p = sasrec.predict_log_p(model, events, samples, recipe)
  scored = Scored(samples, setup.prompts.question_start(samples), log_p)
  path = folder / LOG_P / '00000.parquet'
  setup.workspace.keep(_write_part, path, scored.table(events))
  _write_arm(setup, folder, scored)


def evaluate(setup: Setup, folder: Path, adapter: dict | None) -> None:
  """Writes predictions and evaluation of one arm, unless they stand there."""
  if setup.workspace.exists(folder / 'evaluation.json'):
    return
  # Before the scores: whatever stops those, this is kept.
  with setup.clock.part(f'{folder.name}: retention'):
    measure_retention(setup, folder, adapter)
  with setup.clock.part(f'{folder.name}: evaluation'):
    scored = score(setup, adapter, setup.samples.every, folder / LOG_P)
    _write_arm(setup, folder, scored)


def _write_arm(setup, folder, scored):
  """Writes what an arm's Scored of both splits come to."""
  samples, validation = setup.samples, None
  test = scored.of(samples.test)
  if len(samples.validation):
    validation = scored.of(samples.validation)
  setup.workspace.keep(
    evaluation.write_arm,
    folder,
    setup.prompts,
    setup.counts,
    test,
    validation,
    setup.config.eval.anchor_tolerance,
  )


def measure_retention(setup: Setup, folder: Path, adapter: dict | None) -> None:
  """Writes retention.json, if there is anything to measure it on."""
  path, rows = folder / 'retention.json', setup.retention.rows(adapter)
  if setup.workspace.exists(path) or not rows:
    return
  with _progress(rows, f'{folder.name}: retention', 'row') as progress:
    found = setup.retention.measure(adapter, progress)
  setup.workspace.keep(files.write_json, path, found)


def score(
  setup: Setup, adapter: dict | None, samples: np.ndarray, folder: Path
) -> Scored:
  """What the model says of samples int64 [n], in their order.

  Many are asked of one row (data.questions). Scores are kept in parts in `folder`:
  a run that was killed goes on behind the last of them.
  """
  length, rows = packed(setup, np.sort(samples))
  weights, tables = _digest(setup, adapter), []
  with _progress(len(samples), f'{folder.parent.name}: score', 'event') as progress:
    for number, part in enumerate(_parts(rows)):
      asked = [questions.row_of(setup.prompts, row, length) for row in part]
      path, made_from = folder / f'{number:05d}.parquet', _made_from(weights, asked)
      if _kept_from(setup.workspace, path) == made_from:
        progress(sum(len(row.targets) for row in asked))
      else:
        scores = setup.scorer(adapter, asked, progress)
        table = _together(asked, scores).table(setup.events)
        setup.workspace.keep(_write_part, path, table, made_from)
      tables.append(parquet.read_table(path))
  return read_scored(pa.concat_tables(tables)).of(samples)


@contextlib.contextmanager
def _progress(total, what, unit):
  """Yields what is told how much is done; it stops there if SIGTERM came."""
  silent = not processes.is_primary()
  with tqdm.tqdm(total=total, desc=what, unit=unit, disable=silent) as bar:

    def progress(done: int) -> None:
      bar.update(done)
      preemption.check()

    yield progress


def packed(
  setup: Setup, samples: np.ndarray
) -> tuple[int, list[list[questions.Window]]]:
  """Tokens of a row, and the windows of each, which ask for samples, sorted."""
  prompts, most = setup.prompts, setup.config.plan.window
  # Behind the last question stand the nodes of the label tree.
  longest = int(prompts.answer_lengths.max())
  length = min(_LENGTH, setup.base.config.max_length - longest)
  found = list(questions.windows(prompts, samples, most, length))
  # A question by itself may be longer.
  length = max(length, *(window.length for window in found))
  rows = questions.pack(found, length)
  # Those that are asked most first: who shares a batch is asked as much.
  rows.sort(key=lambda row: -sum(len(window.targets) for window in row))
  return length, rows


def _parts(rows):
  """Rows of each part: whole batches, of _PART questions or a few more."""
  parts = []
  for begin in range(0, len(rows), _ROWS):
    batch = rows[begin : begin + _ROWS]
    if parts and sum(len(w.targets) for row in parts[-1] for w in row) < _PART:
      parts[-1] += batch
    else:
      parts.append(batch)
  return parts


def _digest(setup, adapter):
  """SHA-256 of an adapter; what else decides scores, the folder's config holds."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(setup.model.layout.gather(adapter or {})):
    digest.update(leaf.tobytes())
  return digest.digest()


def _made_from(weights, asked):
  digest = hashlib.sha256(weights)
  for row in asked:
    digest.update(row.targets.tobytes() + row.starts.tobytes())
  return digest.hexdigest()


def _together(asked, scores):
  """Scored of rows' questions, and of the scores of each row."""
  samples = np.concatenate([row.targets for row in asked])
  starts = np.concatenate([row.starts for row in asked])
  return Scored(samples, starts, np.concatenate(scores))


def _kept_from(workspace, path):
  """What a part was made from, or None: it is not there."""
  if not workspace.exists(path):
    return None
  return parquet.read_schema(path).metadata[b'made_from'].decode()


def _write_part(path, table, made_from=''):
  path.parent.mkdir(exist_ok=True)
  files.write_parquet(path, table, {'made_from': made_from})
