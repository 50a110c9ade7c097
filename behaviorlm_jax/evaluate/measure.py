"""What is measured of the untuned model, the baselines and each stage.

Scores of samples, retention, predictions: what stands in the work directory
already is not measured again. `this` is a setup.Run.
"""

import tqdm

from behaviorlm_jax.cluster import preemption
from behaviorlm_jax.cluster import processes
from behaviorlm_jax.cluster import workspace as workdir_lib
from behaviorlm_jax.evaluate import evaluation
from behaviorlm_jax.evaluate import sasrec
from behaviorlm_jax.io import files


def evaluate_base(this):
  """The untuned model and the free baselines, once per work directory."""
  folder = this.workdir / 'base'
  if not processes.exists(folder / 'config.json'):
    processes.on_primary(workdir_lib.claim, folder, this.config, this.fingerprints)
  samples = evaluation.test_samples(this.events, this.config)
  path = this.workdir / 'baselines.json'
  if not processes.exists(path):
    processes.on_primary(
      evaluation.write_baselines, path, this.events, samples, this.config
    )
  evaluate(this, folder, None, samples)
  if this.config.sasrec.steps:
    evaluate_sasrec(this, samples)


def evaluate_sasrec(this, samples):
  """Trains and evaluates the baseline, once per work directory."""
  config, events = this.config, this.events
  folder = this.workdir / 'sasrec'
  if processes.exists(folder / 'evaluation.json'):
    return
  processes.on_primary(workdir_lib.claim, folder, config, this.fingerprints)
  with tqdm.tqdm(total=config.sasrec.steps, desc='sasrec', unit='step') as bar:

    def progress(done):
      bar.update(done)
      preemption.check()

    model = sasrec.fit_model(events, config, progress)
  validation = evaluation.draw_samples(
    events, 'validation', config.eval.validation_samples, config
  )
  scored = [
    evaluation.Scored(
      positions,
      sasrec.predict_log_p(model, events, positions, config),
      [this.prompts.question(p) for p in positions],
    )
    for positions in (samples, validation)
    if len(positions)
  ]
  fitted = scored[1] if config.eval.fit and len(validation) else None
  processes.on_primary(
    evaluation.write_arm, folder, this.prompts, scored[0], fitted, config
  )


def evaluate(this, folder, adapter, samples):
  """Writes predictions and evaluation of one arm, unless they stand there."""
  if processes.exists(folder / 'evaluation.json'):
    return
  config = this.config
  measure_retention(this, folder, adapter)
  test = score(this, adapter, samples, f'{folder.name}: evaluate')
  validation = None
  if config.eval.fit:
    drawn = evaluation.draw_samples(
      this.events, 'validation', config.eval.validation_samples, config
    )
    if len(drawn):
      validation = score(this, adapter, drawn, f'{folder.name}: validation')
  processes.on_primary(
    evaluation.write_arm, folder, this.prompts, test, validation, config
  )


def measure_retention(this, folder, adapter):
  """Writes retention.json, if there is anything to measure it on."""
  path, rows = folder / 'retention.json', this.retention.rows(adapter)
  if processes.exists(path) or not rows:
    return
  with tqdm.tqdm(total=rows, desc=f'{folder.name}: retention') as bar:

    def progress(done):
      bar.update(done)
      preemption.check()

    processes.on_primary(
      files.write_json, path, this.retention.measure(adapter, progress)
    )


def score(this, adapter, samples, what):
  """What scorer.Scorer says of samples: evaluation.Scored."""
  questions = [this.prompts.question(p) for p in samples]
  with tqdm.tqdm(total=len(samples), desc=what, unit='prompt') as bar:

    def progress(done):
      bar.update(done)
      preemption.check()

    scores = this.scorer(adapter, questions, progress)
    return evaluation.Scored(samples, scores, questions)
