"""Stage b's subset: how many samples of each behavior, and which ones.

    budgets      m_c, the samples of each behavior
    candidates   those that may be drawn, chosen before anything is scored
    choose       the draw, by difficulty

Behaviors are drawn from one by one; under the natural budget all candidates
are one pool (key NATURAL), of which the difficulty alone decides.
"""

import numpy as np
from ml_collections import ConfigDict

from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.data import samples as samples_lib

NATURAL = -1  # Key of the pool of all behaviors.


def budgets(events: events_lib.Events, config: ConfigDict) -> np.ndarray:
  """m_c int64 [known]: samples that stage b draws of each behavior.

  With n_c training samples of a behavior, plan.budget makes m_c
    balanced   plan.per_behavior
    tempered   proportional to n_c ** plan.temper: 0 is balanced, 1 natural
  of the same sum, but for rounding and at least one sample of each behavior.
  The natural budget, a pool of all behaviors, has that sum, too.
  """
  plan = config.plan
  n = counts(events, config)
  balanced = plan.per_behavior * (n > 0)
  if plan.budget != 'tempered':
    return balanced
  rates = np.maximum(n, 1).astype(np.float64) ** plan.temper * (n > 0)
  shares = balanced.sum() * rates / max(rates.sum(), 1e-12)
  return np.where(n > 0, np.maximum(np.rint(shares), 1), 0).astype(int)


def counts(events: events_lib.Events, config: ConfigDict) -> np.ndarray:
  """n_c int64 [known], training samples of each behavior."""
  found = samples_lib.behavior_counts(events, 'train', config)
  samples_lib.require(np.flatnonzero(found), 'stage b')
  return found


def candidates(
  events: events_lib.Events, config: ConfigDict, rng: np.random.Generator
) -> dict[int, np.ndarray]:
  """{behavior: positions} that may be drawn; rng: numpy Generator.

  At most difficulty.candidates of a behavior, but as many as its budget wants.
  """
  sizes = counts(events, config)
  limits = np.maximum(budgets(events, config), config.difficulty.candidates)
  draws = {
    b: samples_lib.draw_ranks(rng, sizes[b], limits[b])
    for b in np.flatnonzero(sizes).tolist()
  }
  samples = samples_lib.of_split(events, 'train', config)
  if config.plan.budget == 'natural':
    size = sum(map(len, draws.values()))
    ranks = samples_lib.draw_ranks(rng, sizes.sum(), size)
    return {NATURAL: samples.at(ranks)}
  return samples.at_of_behaviors(draws)


def choose(
  pools: dict[int, np.ndarray],
  scores: dict[int, float] | None,
  events: events_lib.Events,
  config: ConfigDict,
  rng: np.random.Generator,
) -> dict[int, np.ndarray]:
  """Draws {behavior: positions}, as many of each behavior as its budget says.

  The weight of a candidate is max(0, difficulty) ** plan.gamma. A behavior with
  fewer candidates than its budget repeats all of them evenly.

  Args:
    pools: as `candidates` made them.
    scores: {position: difficulty}, or None for uniform draws.
    events, config: the log and the settings.
    rng: numpy Generator.
  """
  sizes, subset = budgets(events, config), {}
  for b, pool in pools.items():
    size = int(sizes.sum() if b == NATURAL else sizes[b])
    if not size:
      continue
    weights = np.ones(len(pool))
    if scores is not None:
      difficulty = np.array([scores[int(p)] for p in pool])
      weights = np.maximum(difficulty, 0) ** config.plan.gamma
    subset[b] = weighted_draw(pool, weights, size, rng)
  return subset


def weighted_draw(
  positions: np.ndarray, weights: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
  """`size` of `positions` with probability by weight, without replacement.

  Efraimidis and Spirakis (2006): the largest keys u ** (1 / w), here as
  log(u) / w. A class with fewer members repeats all of them evenly.
  """
  whole, rest = divmod(size, len(positions))
  weights = np.maximum(np.asarray(weights, np.float64), 1e-12)
  keys = np.log(rng.random(len(positions))) / weights
  chosen = positions[np.argsort(-keys, kind='stable')[:rest]]
  return np.concatenate([np.tile(positions, whole), chosen])


def neighbour_weights(events: events_lib.Events, config: ConfigDict) -> np.ndarray:
  """float [known]: min(1, plan.neighbours m_c / n_c).

  So neighbours keep the proportions of the budgets m_c, whatever their
  frequencies n_c, and plan.neighbours says how much they count beside what is
  drawn. Under the natural budget all are 1: neighbours come at their natural
  rates.
  """
  if config.plan.budget == 'natural':
    return np.ones(events.known)
  rates = config.plan.neighbours * budgets(events, config)
  return np.minimum(1.0, rates / np.maximum(counts(events, config), 1))
