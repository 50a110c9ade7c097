"""The whole story on one page: log -> A-Tuning -> difficulty -> B-Tuning.

    events -> base scores, baselines
           -> stage a: plan of behaviors and conversations -> train -> evaluate
           -> stage b: candidates (-> difficulty) -> balanced plan -> train
              -> evaluate
           -> report

Each arrow is a file in the work directory. What is finished is not done again,
so the same command resumes a run wherever it ended.
"""

import dataclasses
import pathlib

import jax
import numpy as np
from absl import logging

from behaviorlm_jax import config as config_lib
from behaviorlm_jax import curriculum
from behaviorlm_jax import seeds
from behaviorlm_jax import setup
from behaviorlm_jax.cluster import preemption
from behaviorlm_jax.cluster import processes
from behaviorlm_jax.cluster import workspace as workdir_lib
from behaviorlm_jax.data import loader
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import prepared
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.evaluate import evaluation
from behaviorlm_jax.evaluate import measure
from behaviorlm_jax.io import bucket
from behaviorlm_jax.io import hub
from behaviorlm_jax.model import lora
from behaviorlm_jax.report import report
from behaviorlm_jax.train import checkpoints as checkpoints_lib
from behaviorlm_jax.train import loop
from behaviorlm_jax.train import sharding
from behaviorlm_jax.train import step as step_lib


def run(config, workdir):
  """Runs the config's stages in `workdir` and writes the report.

  With data.shard it only prepares that part of the log.
  """
  config_lib.check(config)
  if config.data.shard:
    prepare_shard(config, workdir)
    return
  with preemption.at_once():
    processes.meet(config.distributed)
  processes.start(config.distributed)
  preemption.share()
  workdir = workdir_lib.make(workdir)
  workdir_lib.check_hosts(config, workdir)
  config = workdir_lib.pin(config, workdir)
  workdir_lib.check_config(config, workdir)
  this = setup.open_run(config, workdir, sharding.make_layout(config))
  workdir_lib.check_fingerprints(config, workdir, this.fingerprints)
  measure.evaluate_base(this)
  for stage in config.stages:
    run_stage(this, stage)
  processes.on_primary(
    report.write_report,
    workdir,
    'BehaviorLM: ' + _log_name(config),
    this.base.tokenizer.decode,
  )
  logging.info('report: %s', workdir / 'report.html')


def prepare_shard(config, workdir):
  """Prepares data.shard's part of the log; SIGTERM stops it at once."""
  try:
    with preemption.at_once():
      prepared.prepare_part(config, workdir)
  except RuntimeError:  # What DuckDB makes of a stop while it works.
    preemption.check()
    raise


def _log_name(config):
  return pathlib.PurePosixPath(config.data.events).name


def run_stage(this, stage):
  """Plans, trains, exports and evaluates one stage."""
  whole, folder = this.config, this.workdir / workdir_lib.FOLDERS[stage]
  folder.mkdir(exist_ok=True)
  config = config_lib.of_stage(whole, stage)
  this = dataclasses.replace(this, config=config)
  adapter = first_adapter(this, stage)
  plan, plan_hash = curriculum.make_plan(this, stage, folder, adapter)
  if processes.exists(folder / 'evaluation.json'):
    logging.info('%s is finished.', folder)
    return
  processes.on_primary(workdir_lib.claim, folder, whole, this.fingerprints)
  start = this.layout.gather(adapter)  # Training takes its place.
  adapter = train(this, stage, folder, plan, plan_hash, adapter)
  adapter = interpolate(start, adapter, config.train.interpolation)
  # A name that others have, too, before the folder it was fetched to.
  address = config.model.address
  name, revision = hub.repository(address) or (
    address if bucket.is_address(address) else this.base.folder or this.base.address,
    None,
  )
  processes.on_primary(
    lora.export,
    folder / 'adapter',
    this.layout.gather(adapter),
    config.lora.alpha,
    name,
    revision,
  )
  processes.on_primary(evaluation.write_labels, folder / 'labels.json', this.prompts)
  measure.evaluate(this, folder, adapter, evaluation.test_samples(this.events, config))


def interpolate(start, end, share):
  """The adapter `share` of the way from one to the other, factor by factor.

  After Wortsman et al., Robust fine-tuning of zero-shot models (CVPR 2022): a
  point on the way often keeps what the start knew and has much of what was
  learned since. On the factors a and b, not on their product: the rank stays.
  From a fresh adapter, whose b is zero, a is the end's, so that the product has
  `share` of what was learned.
  """
  if share == 1:
    return end
  mix = lambda x, y: (1 - share) * x + share * y
  return {
    name: {
      'a': mix(ab['a'], end[name]['a']) if np.any(ab['b']) else end[name]['a'],
      'b': mix(ab['b'], end[name]['b']),
    }
    for name, ab in start.items()
  }


def first_adapter(this, stage):
  """Where training starts: a fresh adapter, or for stage b that of stage a."""
  config = this.config
  shapes = lora.shapes(this.base.config, config.lora.rank, config.lora.targets)
  if stage == 'b' and workdir_lib.needs_stage_a(config):
    return setup.load_adapter(this, workdir_lib.stage_a_adapter(config, this.workdir))
  adapter = jax.device_get(
    lora.init(
      this.base.config,
      config.lora.rank,
      config.lora.targets,
      jax.random.key(config.seed),
    )
  )
  return jax.device_put(adapter, this.layout.adapter(shapes))


def train(this, stage, folder, plan, plan_hash, adapter):
  """Trains (or resumes) a stage; returns the best checkpoint's adapter."""
  config = this.config
  step_fn, optimizer, places = trainer(this, stage, plan)
  state = step_lib.init_state(adapter, optimizer, places)
  saved = checkpoints_lib.Checkpoints(
    bucket.place(folder / 'checkpoints'), config.checkpoint.keep, plan_hash
  )
  state = saved.restore_latest(state, config.checkpoint.every)
  assemble = assembler(this, plan)
  show_example(this, assemble, plan)
  rows = config.train.batch
  batches = loader.batches(
    plan,
    assemble,
    rows,
    int(state['step']),
    this.layout.host_rows(rows),
    config.train.workers,
  )
  state = loop.run(
    folder,
    config,
    state,
    step_fn,
    this.params,
    (this.layout.put_rows(batch, rows) for batch in batches),
    saved,
    validator(this, stage),
  )
  best = saved.best_step(config.checkpoint.best_by == 'loss')
  logging.info('%s: the checkpoint of step %d goes on.', folder.name, best)
  adapter = saved.restore_adapter(best, state)
  saved.close()
  return adapter


def trainer(this, stage, plan):
  """A stage's jitted step (step.make_step), its optimizer and shardings."""
  config, base = this.config, this.base.config
  optimizer, schedule = step_lib.make_optimizer(config.train)
  shapes = lora.shapes(base, config.lora.rank, config.lora.targets)
  places = step_lib.state_shardings(this.layout, shapes, optimizer)
  step_fn = step_lib.make_step(
    this.attach,
    optimizer,
    schedule,
    config.train.accumulate,
    places,
    this.layout,
    plan_lib.most_answers(
      plan, config.train.batch, config.train.accumulate, this.layout.row_parts
    ),
    curriculum.names(this, stage, plan),
  )
  return step_fn, optimizer, places


def assembler(this, plan):
  """What turns the rows of a plan into arrays."""
  return loader.Assembler(
    this.prompts, this.conversations, this.config.train.length, plan.answers, this.tree
  )


def show_example(this, assemble, plan):
  """Logs one decoded row, what it teaches in brackets."""
  row = assemble(plan.rows[0])
  learned = set(row['answer_positions'][row['answer_weights'] > 0] + 1)
  text = ''
  for i in range(int((row['segments'] > 0).sum())):
    token = this.base.tokenizer.decode([row['tokens'][i]])
    text += f'[{token}]' if i in learned else token
  logging.info('a row, the learned tokens in brackets:\n%s', text)


def validator(this, stage):
  """adapter -> {'val_loss'} on the stage's own kind of samples."""
  config, rows = this.config, this.config.train.batch
  rng = seeds.stream(config.seed, stage, 'validation')
  steps = -(-config.eval.validation_rows // rows)
  try:
    stream = curriculum.segments(this, stage, 'validation', rng)
    plan = plan_lib.take(stream, config, steps, '')
  except samples_lib.NoSamples:
    logging.warning(
      'the validation split has no sample for stage %s; the last '
      'checkpoint will be taken for the best.',
      stage,
    )
    return lambda adapter: {}
  assemble = assembler(this, plan)
  sums = step_lib.make_validation(
    this.attach,
    this.layout,
    plan_lib.most_answers(plan, rows, 1, this.layout.row_parts),
    curriculum.names(this, stage, plan),
  )

  def validate(adapter):
    loss = weight = 0.0
    for batch in loader.batches(plan, assemble, rows, own=this.layout.host_rows(rows)):
      batch = this.layout.put_rows(batch, rows)
      one, w = sums(adapter, this.params, batch)
      loss, weight = loss + float(one), weight + float(w)
    return {'val_loss': loss / weight}

  return validate
