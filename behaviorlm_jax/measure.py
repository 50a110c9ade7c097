"""What is measured of the untuned model, the baselines and each stage.

Scores of samples, retention, predictions: what stands in the work directory
already is not measured again.
"""

import functools
from pathlib import Path

import numpy as np
import tqdm

from behaviorlm_jax.cluster import ownership, preemption
from behaviorlm_jax.evaluate import evaluation, sasrec
from behaviorlm_jax.io import files
from behaviorlm_jax.setup import Setup


def evaluate_base(setup: Setup) -> None:
  """The untuned model and the free baselines, once per work directory."""
  workspace, config = setup.workspace, setup.config
  folder = workspace.folder / 'base'
  if not workspace.exists(folder / 'config.json'):
    workspace.keep(ownership.claim, folder, config, setup.fingerprints)
  path = workspace.folder / 'baselines.json'
  if not workspace.exists(path):
    with setup.clock.part('baselines'):
      workspace.keep(evaluation.write_baselines, path, setup.counts, setup.samples.test)
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
  with tqdm.tqdm(total=recipe.steps, desc='sasrec', unit='step') as bar:

    def progress(done: int) -> None:
      bar.update(done)
      preemption.check()

    model = sasrec.fit_model(events, recipe, progress)
  _write_arm(
    setup,
    folder,
    lambda samples, what: evaluation.Scored(
      samples,
      sasrec.predict_log_p(model, events, samples, recipe),
      [setup.prompts.question(p) for p in samples],
    ),
  )


def evaluate(setup: Setup, folder: Path, adapter: dict | None) -> None:
  """Writes predictions and evaluation of one arm, unless they stand there."""
  if setup.workspace.exists(folder / 'evaluation.json'):
    return
  # Before the scores: whatever stops those, this is kept.
  with setup.clock.part(f'{folder.name}: retention'):
    measure_retention(setup, folder, adapter)
  with setup.clock.part(f'{folder.name}: evaluation'):
    _write_arm(setup, folder, functools.partial(score, setup, adapter))


def _write_arm(setup, folder, score):
  """Writes an arm; `score`: (samples, what it is for) -> evaluation.Scored."""
  samples, validation = setup.samples, None
  test = score(samples.test, f'{folder.name}: evaluate')
  if len(samples.validation):
    validation = score(samples.validation, f'{folder.name}: validation')
  setup.workspace.keep(
    evaluation.write_arm, folder, setup.prompts, setup.counts, test, validation
  )


def measure_retention(setup: Setup, folder: Path, adapter: dict | None) -> None:
  """Writes retention.json, if there is anything to measure it on."""
  path, rows = folder / 'retention.json', setup.retention.rows(adapter)
  if setup.workspace.exists(path) or not rows:
    return
  with tqdm.tqdm(total=rows, desc=f'{folder.name}: retention') as bar:

    def progress(done: int) -> None:
      bar.update(done)
      preemption.check()

    setup.workspace.keep(
      files.write_json, path, setup.retention.measure(adapter, progress)
    )


def score(
  setup: Setup, adapter: dict | None, samples: np.ndarray, what: str
) -> evaluation.Scored:
  """What scorer.Scorer says of samples: evaluation.Scored."""
  questions = [setup.prompts.question(p) for p in samples]
  with tqdm.tqdm(total=len(samples), desc=what, unit='prompt') as bar:

    def progress(done: int) -> None:
      bar.update(done)
      preemption.check()

    scores = setup.scorer(adapter, questions, progress)
    return evaluation.Scored(samples, scores, questions)
