"""Samples: positions in the event table that may be asked for, or learned.

A sample is an event with enough past of the same user and a behavior that the
training split knows. Nothing is copied; everything later holds positions.
"""

import numpy as np

from behaviorlm_jax import seeds
from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.errors import InputError

# Training events from which on plan.shots limits a tail behavior: below it,
# learning from 50 samples could not be compared with learning from fewer.
FEW_SHOT_FROM = 50


class NoSamples(InputError):
  """A split has nothing that a stage could learn from."""


def require(samples, stage):
  """Refuses to go on without samples."""
  if not len(samples):
    raise NoSamples(f'data.events: no sample is left for {stage}; '
                    'give users more events or lower plan.min_context.')


def eligible(events, split, config, anchors_only=False):
  """Positions int64, sorted, of the samples of a split.

  plan.shots leaves that many samples of each tail behavior with FEW_SHOT_FROM
  training events or more in the training split, the same ones for a seed: more
  shots add to them. The others may stand in a context, and are never learned.
  """
  mask = events.split == events_lib.SPLITS.index(split)
  mask = mask & (events.behavior < events.known)
  positions = np.flatnonzero(mask)
  context = positions - events.first[positions]
  positions = positions[context >= config.plan.min_context]
  if anchors_only:
    return positions[anchor_mask(events)[events.behavior[positions]]]
  if split == 'train' and config.plan.shots is not None:
    return _few_shot(events, positions, config)
  return positions


def _few_shot(events, positions, config):
  behavior = events.behavior[positions]
  kept = np.ones(len(positions), bool)
  for b in np.flatnonzero(few_shot_mask(events)):
    mine = np.flatnonzero(behavior == b)
    rng = seeds.stream(config.seed, 'shots', str(b))
    kept[rng.permutation(mine)[config.plan.shots:]] = False
  return positions[kept]


def anchor_mask(events):
  """bool [known]: which candidate behaviors are anchors."""
  return np.array([b.group == 'anchor' for b in
                   events.behaviors[:events.known]], bool)


def few_shot_mask(events):
  """bool [known]: tail behaviors that plan.shots limits."""
  counts = np.array([b.train_count for b in events.behaviors[:events.known]])
  return ~anchor_mask(events) & (counts >= FEW_SHOT_FROM)


def by_behavior(events, positions):
  """{behavior: its positions}, of those that have any."""
  behavior = events.behavior[positions]
  return {int(b): positions[behavior == b] for b in np.unique(behavior)}
