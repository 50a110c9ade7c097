"""Stage b's subset: how many samples of each behavior, and which ones.

    sizes        m_c, the samples of each behavior
    candidates   those that may be drawn, chosen before anything is scored
    choose       the draw, by difficulty

Behaviors are drawn from one by one; under the natural budget all candidates
are one pool (key NATURAL), of which the difficulty alone decides.
"""

import dataclasses
import functools

import numpy as np

from behaviorlm_jax.data import samples as samples_lib

NATURAL = -1  # Key of the pool of all behaviors.


@dataclasses.dataclass(frozen=True, eq=False)
class Budget:
  """How much stage b draws of each behavior's training samples."""

  samples: samples_lib.Samples
  kind: str  # 'balanced', 'tempered' or 'natural'.
  per_behavior: int
  temper: float

  @functools.cached_property
  def sizes(self) -> np.ndarray:
    """m_c int64 [known], of n_c training samples of a behavior.

    balanced   per_behavior
    tempered   proportional to n_c ** temper: 0 is balanced, 1 natural
    natural    a pool of all behaviors, as large as the balanced ones together

    The tempered ones have the same sum, but for rounding and at least one sample
    of each behavior that has any.
    """
    counts = self.samples.counts
    learnable = counts > 0
    samples_lib.require(np.flatnonzero(learnable), 'stage b')
    balanced = self.per_behavior * learnable
    if self.kind != 'tempered':
      return balanced
    rates = np.maximum(counts, 1).astype(np.float64) ** self.temper * learnable
    shares = balanced.sum() * rates / rates.sum()
    return np.where(learnable, np.maximum(np.rint(shares), 1), 0).astype(int)

  def candidates(self, most: int, rng: np.random.Generator) -> dict[int, np.ndarray]:
    """{behavior: positions} that may be drawn.

    At most `most` of a behavior, but as many as its budget wants.
    """
    counts, limits = self.samples.counts, np.maximum(self.sizes, most)
    draws = {
      b: samples_lib.draw_ranks(rng, counts[b], limits[b])
      for b in np.flatnonzero(counts).tolist()
    }
    if self.kind != 'natural':
      return self.samples.at_of_behaviors(draws)
    size = sum(map(len, draws.values()))
    ranks = samples_lib.draw_ranks(rng, counts.sum(), size)
    return {NATURAL: self.samples.at(ranks)}

  def choose(
    self,
    pools: dict[int, np.ndarray],
    scores: dict[int, float] | None,
    gamma: float,
    rng: np.random.Generator,
  ) -> dict[int, np.ndarray]:
    """Draws {behavior: positions} of the candidates, as many as it has budget.

    A candidate has weight max(0, difficulty) ** gamma; `scores` are {position:
    difficulty}, or None for uniform draws.
    """
    subset = {}
    for b, pool in pools.items():
      size = self.sizes.sum() if b == NATURAL else self.sizes[b]
      weights = np.ones(len(pool))
      if scores is not None:
        difficulty = np.array([scores[int(p)] for p in pool])
        weights = np.maximum(difficulty, 0) ** gamma
      subset[b] = weighted_draw(pool, weights, int(size), rng)
    return subset

  def neighbour_weights(self, scale: float) -> np.ndarray:
    """float [known]: min(1, scale m_c / n_c).

    So neighbours keep the proportions of the budgets m_c, whatever their
    frequencies n_c, and `scale` says how much they count beside what is drawn.
    Under the natural budget all are 1: neighbours come at their natural rates.
    """
    if self.kind == 'natural':
      return np.ones(len(self.sizes))
    return np.minimum(1.0, scale * self.sizes / np.maximum(self.samples.counts, 1))


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
