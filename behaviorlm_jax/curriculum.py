"""What a stage teaches: which samples in which order, and within which names.

Stage a tiles the training split (or takes behaviors in turns); stage b draws a
subset by difficulty, each behavior at the rate of its budget. Conversations are
mixed in. The outcome is a plan, made once and kept in the stage's folder.
`this` is a setup.Run.
"""

import hashlib
import json

import numpy as np
from absl import logging

from behaviorlm_jax import seeds
from behaviorlm_jax.cluster import processes
from behaviorlm_jax.cluster import workspace as workdir_lib
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.data import subset as subset_lib
from behaviorlm_jax.evaluate import measure
from behaviorlm_jax.score import difficulty
from behaviorlm_jax.train import step as step_lib


def make_plan(this, stage, folder, adapter):
  """The stage's plan and its hash; read if it stands there already."""
  config, path = this.config, folder / 'plan.parquet'
  sections = ('data', 'plan', 'difficulty', 'train', 'seed', 'score')
  made_from = fingerprint(this, stage, adapter, sections)
  if processes.exists(path):
    plan = plan_lib.load(path, made_from)
    return plan, plan_lib.content_hash(plan)
  rng = seeds.stream(config.seed, stage, 'plan')
  stream = segments(this, stage, 'train', rng, adapter, folder)
  plan = plan_lib.take(stream, config, config.train.steps, made_from)
  logging.info(
    '%s: plan of %s.', folder.name, plan_lib.summary(plan, config.train.length)
  )
  plan_hash = plan_lib.content_hash(plan)
  processes.assert_same({f'the plan of {folder.name}': plan_hash})
  processes.on_primary(plan_lib.save, path, plan, config.train.batch)
  return plan, plan_hash


def fingerprint(this, stage, adapter, sections):
  """SHA-256 of what decides an artifact of a stage."""
  digest = hashlib.sha256()
  values = workdir_lib.as_dict(this.config)
  for path in ('events', 'conversations'):  # Their content counts, see below.
    del values['data'][path]
  chosen = {name: values[name] for name in sections}
  parts = (
    stage,
    this.events.fingerprint,
    this.base.fingerprint,
    json.dumps(chosen, sort_keys=True),
  )
  for part in parts:
    digest.update(part.encode())
  for conversation in this.conversations:
    digest.update(conversation.tokens.tobytes())
  adapter = this.layout.gather(adapter or {})
  for name in sorted(adapter):
    for side in ('a', 'b'):
      digest.update(adapter[name][side].tobytes())
  processes.assert_same({f'what decides stage {stage}': digest.hexdigest()})
  return digest.hexdigest()


def segments(this, stage, split, rng, adapter=None, folder=None):
  """The endless stream of segments of a stage, for training or validation."""
  config, plan = this.config, this.config.plan
  windows = plan_lib.Windows(this.prompts, config, this.tree)
  share = plan.conversation_share
  if stage == 'b':
    share = plan.balanced_conversation_share
    stream = drawn(this, split, windows, rng, adapter, folder)
  elif plan.content == 'balanced':
    samples = samples_lib.by_behavior(
      this.events, samples_lib.eligible(this.events, split, config)
    )
    rates = dict.fromkeys(samples, 1)
    stream = plan_lib.spread(windows, samples, rates, rng, neighbours(this))
  else:
    samples = samples_lib.of_split(
      this.events, split, config, _only_anchors(this, stage)
    )
    stream = plan_lib.tile(windows, samples, rng)
  if split == 'train':
    stream = plan_lib.mix(stream, this.conversations, share, rng)
  return stream


def drawn(this, split, windows, rng, adapter, folder):
  """Stage b's stream: a subset, each behavior at the rate of its budget."""
  config, events = this.config, this.events
  if split == 'train':
    samples = choose_subset(this, adapter, folder)
    rates = {b: len(s) for b, s in samples.items()}
  else:
    every = samples_lib.eligible(events, split, config)
    samples = samples_lib.by_behavior(events, every)
    rates = dict(enumerate(subset_lib.budgets(events, config)))
    if config.plan.budget == 'natural':
      samples, rates = {subset_lib.NATURAL: every}, {subset_lib.NATURAL: 1}
  return plan_lib.spread(windows, samples, rates, rng, neighbours(this))


def neighbours(this):
  """Loss weights of a drawn sample's neighbours, or None: not learned."""
  if this.config.plan.neighbours:
    return subset_lib.neighbour_weights(this.events, this.config)
  return None


def choose_subset(this, adapter, folder):
  """Stage b's subset: candidates, their difficulty, the weighted draw."""
  config = this.config
  draw = lambda purpose: seeds.stream(config.seed, 'b', purpose)
  pools = subset_lib.candidates(this.events, config, draw('candidates'))
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
    scores = score_difficulty(this, adapter, folder, pools)
  return subset_lib.choose(pools, scores, this.events, config, draw('subset'))


def score_difficulty(this, adapter, folder, pools):
  """{sample: difficulty} under the model that stage b starts from."""
  path, name = folder / 'difficulty.parquet', this.config.difficulty.score
  made_from = fingerprint(
    this, 'difficulty', adapter, ('data', 'plan', 'difficulty', 'seed', 'score')
  )
  if not processes.exists(path):
    samples = np.concatenate(list(pools.values()))
    scored = measure.score(this, adapter, samples, f'{folder.name}: difficulty')
    values = difficulty.compute(name, scored.scores, this.events.behavior[samples])
    processes.on_primary(
      difficulty.write_difficulty, path, this.events, samples, values, made_from
    )
  return difficulty.read_difficulty(path, made_from)


def names(this, stage, plan):
  """`names` of step.make_step and make_validation; `plan` is what is drawn."""
  loss = this.config.train.loss
  if not this.tree:
    return None
  if loss == 'names':
    return step_lib.names_of(this.tree)
  kept = np.ones(this.events.known)
  if loss == 'natural':
    kept = np.maximum(subset_lib.counts(this.events, this.config), 1)
  return step_lib.names_of(this.tree, drawn_counts(this, stage, plan), kept)


def drawn_counts(this, stage, plan):
  """How much a stage teaches of each behavior, float [known], of any sum.

  Counted where behaviors take turns. Natural draws are known beforehand: what
  a short plan happens to hold of a rare behavior says little.
  """
  by_turns = this.config.plan.content == 'balanced'
  if stage == 'b':
    by_turns = this.config.plan.budget != 'natural'
  if by_turns:
    return plan_lib.taught(plan, this.events)
  counts = subset_lib.counts(this.events, this.config)
  if _only_anchors(this, stage):
    counts = counts * samples_lib.anchor_mask(this.events)
  return counts


def _only_anchors(this, stage):
  return stage == 'a' and this.config.plan.content == 'anchors'
