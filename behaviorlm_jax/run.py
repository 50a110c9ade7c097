"""The whole story on one page: log -> A-Tuning -> difficulty -> B-Tuning.

    events -> base scores, baselines
           -> stage a: plan of behaviors and conversations -> train -> evaluate
           -> stage b: candidates (-> difficulty) -> balanced plan -> train
              -> evaluate
           -> report

Each arrow is a file in the work directory. What is finished is not done again,
so the same command resumes a run wherever it ended.
"""

from pathlib import Path, PurePosixPath

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from behaviorlm_jax import config as config_lib
from behaviorlm_jax import curriculum, estimate, measure
from behaviorlm_jax import setup as setup_lib
from behaviorlm_jax.cluster import ownership, preemption, processes
from behaviorlm_jax.cluster import workspace as workspace_lib
from behaviorlm_jax.cluster.workspace import Workspace
from behaviorlm_jax.data import prepared
from behaviorlm_jax.evaluate import evaluation
from behaviorlm_jax.io import bucket, hub
from behaviorlm_jax.model import lora
from behaviorlm_jax.report import report
from behaviorlm_jax.train import sharding, trainer


def run(config: ConfigDict, workdir: str | Path) -> None:
  """Runs the config's stages in `workdir` and writes the report.

  With data.shard it only prepares that part of the log.
  """
  config_lib.check(config)
  if config.data.shard:
    prepare_shard(config, workdir)
    return
  with preemption.at_once():  # Others may never come.
    processes.meet(config.distributed)
  processes.start(config.distributed)
  preemption.share()
  with workspace_lib.opened(workdir) as workspace:
    setup = open_run(config, workspace)
    logging.info('to do, and how long without compiling:\n%s', estimate.ahead(setup))
    measure.evaluate_base(setup)
    for name in setup.config.stages:
      run_stage(setup, config_lib.stage_of(setup.config, name))
    title = 'BehaviorLM: ' + PurePosixPath(config.data.events).name
    decode = setup.base.tokenizer.decode
    with setup.clock.part('report'):
      workspace.keep(report.write_report, workspace.folder, title, decode)
    setup.clock.keep(workspace)
    logging.info('report: %s', workspace.folder / 'report.html')


def open_run(config: ConfigDict, workspace: Workspace) -> setup_lib.Setup:
  """What a run is given, if the work directory belongs to it."""
  ownership.check_hosts(config, workspace)
  config = ownership.pin(config, workspace.folder)
  ownership.check_config(config, workspace.folder)
  layout = sharding.make_layout(config.mesh, config.train)
  setup = setup_lib.open_setup(config, workspace, layout)
  ownership.check_fingerprints(config, workspace.folder, setup.fingerprints)
  return setup


def prepare_shard(config: ConfigDict, workdir: str | Path) -> None:
  """Prepares data.shard's part of the log; SIGTERM stops it at once."""
  try:
    with preemption.at_once():
      prepared.prepare_part(config, workdir)
  except RuntimeError:  # What DuckDB makes of a stop while it works.
    preemption.check()
    raise


def run_stage(setup: setup_lib.Setup, stage: config_lib.Stage) -> None:
  """Plans, trains, exports and evaluates one stage."""
  config, workspace = setup.config, setup.workspace
  folder = workspace.folder / stage.folder
  folder.mkdir(exist_ok=True)
  adapter = setup_lib.first_adapter(setup, stage.name)
  # Also of a finished stage: a plan of other inputs is refused here.
  plan = curriculum.make_plan(setup, stage, folder, adapter)
  if workspace.exists(folder / 'evaluation.json'):
    logging.info('%s is finished.', folder)
    return
  workspace.keep(ownership.claim, folder, config, setup.fingerprints, stage.name)
  with setup.clock.part(f'{folder.name}: training'):
    adapter = train(setup, stage, plan, adapter)
  workspace.keep(
    lora.export,
    folder / 'adapter',
    setup.model.layout.gather(adapter),
    config.lora.alpha,
    *base_name(setup),
  )
  workspace.keep(evaluation.write_labels, folder / 'labels.json', setup.prompts)
  measure.evaluate(setup, folder, adapter)


def train(
  setup: setup_lib.Setup, stage: config_lib.Stage, plan: curriculum.Plan, adapter: dict
) -> dict:
  """Trains, or goes on training, a stage from `adapter`; returns its own."""
  lesson = curriculum.lesson(setup, stage, plan)
  curriculum.show_example(setup, lesson)
  start = setup.model.layout.gather(adapter)  # Training takes its place.
  end = trainer.Trainer(setup.model, stage, setup.config.train).fit(
    lesson,
    adapter,
    curriculum.validation(setup, stage),
    setup.workspace,
    setup.config.checkpoint.every,
  )
  return interpolate(start, end, stage.interpolation)


def base_name(setup: setup_lib.Setup) -> tuple[str, str | None]:
  """What an adapter calls its base, and the revision: before the folder it was
  fetched to a name that others have, too."""
  address = setup.config.model.address
  if bucket.is_address(address):
    return address, None
  return hub.repository(address) or (setup.base.folder or setup.base.address, None)


def interpolate(start: dict, end: dict, share: float) -> dict:
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
