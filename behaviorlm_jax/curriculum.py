"""What a stage teaches: which samples in which order, and within which names.

Stage a tiles the training split (or takes behaviors in turns); stage b draws a
subset by difficulty, each behavior at the rate of its budget. Conversations are
mixed in. The outcome is a plan, made once and kept in the stage's folder.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from absl import logging

from behaviorlm_jax import measure, seeds
from behaviorlm_jax.cluster import ownership, processes
from behaviorlm_jax.config import FOLDERS, Stage
from behaviorlm_jax.data import loader
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.data import subset as subset_lib
from behaviorlm_jax.data.plan import Plan
from behaviorlm_jax.score import difficulty, label_tree
from behaviorlm_jax.setup import Setup
from behaviorlm_jax.train import loss as loss_lib
from behaviorlm_jax.train.trainer import Lesson


def make_plan(setup: Setup, stage: Stage, folder: Path, adapter: dict) -> Plan:
  """The stage's plan; read if it stands there already."""
  config, path = setup.config, folder / 'plan.parquet'
  sections = ('data', 'plan', 'difficulty', 'train', 'seed', 'score')
  made_from = fingerprint(setup, f'stage {stage.name}', adapter, sections, stage)
  if setup.workspace.exists(path):
    return plan_lib.load(path, made_from)
  # A stream of its own: what is drawn elsewhere does not move a plan.
  rng = seeds.stream(config.seed, stage.name, 'plan')
  rows, length = stage.steps * config.train.batch, config.train.length
  with setup.clock.part(f'{folder.name}: plan'):
    stream = segments(setup, stage, 'train', rng, adapter)
    plan = plan_lib.take(stream, rows, length, made_from)
  logging.info('%s: plan of %s.', folder.name, plan_lib.summary(plan, length))
  processes.assert_same({f'the plan of {folder.name}': plan_lib.content_hash(plan)})
  setup.workspace.keep(plan_lib.save, path, plan, config.train.batch)
  return plan


def fingerprint(
  setup: Setup,
  what: str,
  adapter: dict,
  sections: Iterable[str],
  stage: Stage | None = None,
) -> str:
  """SHA-256 of what decides an artifact of a stage.

  Args:
    setup: of the run.
    what: names the artifact.
    adapter: that the stage starts from.
    sections: of the config, that decide.
    stage: decides, too, if given.
  """
  digest = hashlib.sha256()
  values = ownership.as_dict(setup.config)
  for path in ('events', 'conversations'):  # Their content counts, see below.
    del values['data'][path]
  chosen = {name: values[name] for name in sections}
  parts = (
    what,
    setup.events.fingerprint,
    setup.base.fingerprint,
    json.dumps(chosen, sort_keys=True),
    json.dumps(stage and dataclasses.asdict(stage), sort_keys=True),
  )
  for part in parts:
    digest.update(part.encode())
  for conversation in setup.conversations:
    digest.update(conversation.tokens.tobytes())
  adapter = setup.model.layout.gather(adapter or {})
  for name in sorted(adapter):
    for side in ('a', 'b'):
      digest.update(adapter[name][side].tobytes())
  processes.assert_same({f'what decides {what}': digest.hexdigest()})
  return digest.hexdigest()


# Samples, in the order of training.


def segments(
  setup: Setup,
  stage: Stage,
  split: str,
  rng: np.random.Generator,
  adapter: dict | None = None,
) -> Iterator[plan_lib.Segment]:
  """The endless stream of segments of a stage, for training or validation.

  `adapter`: that stage b starts from, whose difficulties count in training.
  """
  plan, length = setup.config.plan, setup.config.train.length
  samples = _samples(setup, split, stage.content == 'anchors')
  windows = plan_lib.Windows(
    setup.prompts,
    samples,
    plan.window,
    plan.targets_per_row,
    length,
    tree_of(setup, stage),
  )
  if stage.content in ('all', 'anchors'):
    stream = plan_lib.tile(windows, rng)
  else:
    drawn, rates = _drawn(setup, stage, samples, adapter)
    stream = plan_lib.spread(windows, drawn, rates, rng, _neighbours(setup))
  if split == 'train':  # Validation is of behaviors alone.
    stream = plan_lib.mix(stream, setup.conversations, stage.conversation_share, rng)
  return stream


def _drawn(setup, stage, samples, adapter):
  """What windows end with: {behavior: samples}, {behavior: windows an epoch}."""
  if stage.content == 'balanced':
    drawn = samples.by_behavior()
    return drawn, dict.fromkeys(drawn, 1)
  if samples.split == 'train':
    drawn = _choose_subset(setup, adapter)
    return drawn, {b: len(positions) for b, positions in drawn.items()}
  # Nothing is scored for validation: the rates alone are those of training.
  if setup.config.plan.budget == 'natural':
    return {subset_lib.NATURAL: samples.all()}, {subset_lib.NATURAL: 1}
  return samples.by_behavior(), dict(enumerate(_budget(setup).sizes))


def _neighbours(setup):
  """Loss weights of a drawn sample's neighbours, or None: not learned."""
  neighbours = setup.config.plan.neighbours
  return _budget(setup).neighbour_weights(neighbours) if neighbours else None


def _samples(setup, split, anchors_only=False):
  context = setup.config.plan.min_context
  return samples_lib.of_split(setup.events, split, context, anchors_only)


def _budget(setup):
  """How much stage b draws of each behavior."""
  plan = setup.config.plan
  return subset_lib.Budget(
    _samples(setup, 'train'), plan.budget, plan.per_behavior, plan.temper
  )


def _choose_subset(setup, adapter):
  """Stage b's subset: candidates, their difficulty, the weighted draw."""
  config = setup.config
  draw = lambda purpose: seeds.stream(config.seed, 'b', purpose)
  budget = _budget(setup)
  pools = budget.candidates(config.difficulty.candidates, draw('candidates'))
  scores = None
  if config.difficulty.score != 'random':
    if config.difficulty.candidates <= config.plan.per_behavior:
      logging.warning(
        'difficulty.candidates is %d and plan.per_behavior %d: every '
        'candidate is drawn, however difficult; raise the first, or save the '
        'scoring with difficulty.score=random.',
        config.difficulty.candidates,
        config.plan.per_behavior,
      )
    scores = _score_difficulty(setup, adapter, np.concatenate(list(pools.values())))
  return budget.choose(pools, scores, config.plan.gamma, draw('subset'))


def _score_difficulty(setup, adapter, samples):
  """{sample: difficulty} under the model that stage b starts from."""
  folder, name = setup.workspace.folder / FOLDERS['b'], setup.config.difficulty.score
  path = folder / 'difficulty.parquet'
  made_from = fingerprint(
    setup, 'difficulty', adapter, ('data', 'plan', 'difficulty', 'seed', 'score')
  )
  if not setup.workspace.exists(path):
    with setup.clock.part(f'{folder.name}: difficulty'):
      scored = measure.score(setup, adapter, samples, folder / 'difficulty')
    values = difficulty.compute(name, scored.scores, setup.events.behavior[samples])
    setup.workspace.keep(
      difficulty.write_difficulty, path, setup.events, samples, values, made_from
    )
  return difficulty.read_difficulty(path, made_from)


# What is taught of them.


def lesson(setup: Setup, stage: Stage, plan: Plan) -> Lesson:
  """What a plan of a stage teaches."""
  tree = tree_of(setup, stage)
  assemble = loader.Assembler(
    setup.prompts, setup.conversations, setup.config.train.length, plan.answers, tree
  )
  return Lesson(plan, assemble, _names(setup, stage, plan))


def validation(setup: Setup, stage: Stage) -> Lesson | None:
  """The stage's own kind of samples, of the validation split; None: no sample."""
  config = setup.config
  rng = seeds.stream(config.seed, stage.name, 'validation')
  steps = -(-config.eval.validation_rows // config.train.batch)
  try:
    stream = segments(setup, stage, 'validation', rng)
    rows = steps * config.train.batch
    plan = plan_lib.take(stream, rows, config.train.length, '')
  except samples_lib.NoSamples:
    return None
  return lesson(setup, stage, plan)


def tree_of(setup: Setup, stage: Stage) -> label_tree.Tree | None:
  """The names within which a stage teaches, or None: over the vocabulary."""
  if stage.softmax == 'vocabulary':
    return None
  # Where anchors alone are taught, every one of them would push the tail down.
  return setup.anchor_tree if stage.content == 'anchors' else setup.tree


def _names(setup, stage, plan):
  """The names of the loss, and the prior that it corrects."""
  tree = tree_of(setup, stage)
  if tree is None or stage.prior == 'drawn':
    return tree and loss_lib.names_of(tree)
  kept = np.ones(setup.events.known)
  if stage.prior == 'natural':
    # At least one: a prior of zero has no logarithm.
    kept = np.maximum(_samples(setup, 'train').counts, 1)
  inside = slice(len(tree.paths))
  drawn = drawn_counts(setup, stage, plan)
  return loss_lib.names_of(tree, drawn[inside], kept[inside])


def drawn_counts(setup: Setup, stage: Stage, plan: Plan) -> np.ndarray:
  """How much a stage teaches of each behavior, float [known], of any sum.

  Counted where behaviors take turns. Natural draws are known beforehand: what
  a short plan happens to hold of a rare behavior says little.
  """
  natural = stage.content == 'subset' and setup.config.plan.budget == 'natural'
  if stage.content in ('balanced', 'subset') and not natural:
    return plan_lib.taught(plan, setup.events)
  counts = _samples(setup, 'train').counts
  return counts * setup.events.anchors if stage.content == 'anchors' else counts


def show_example(setup: Setup, lesson: Lesson) -> None:
  """Logs one decoded row, what it teaches in brackets."""
  row = lesson.assemble(lesson.plan.rows[0])
  learned = set(row['answer_positions'][row['answer_weights'] > 0] + 1)
  text = ''
  for i in range(int((row['segments'] > 0).sum())):
    token = setup.base.tokenizer.decode([row['tokens'][i]])
    text += f'[{token}]' if i in learned else token
  logging.info('a row, the learned tokens in brackets:\n%s', text)
