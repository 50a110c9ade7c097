"""What is fitted on the validation split, on top of any predictor's log p.

  adjusted        log p(y | x) - tau log pi(y): post-hoc logit adjustment (Menon
                  et al., ICLR 2021), pi the training frequencies
  mixed           a log p(y | x) + b log p_counts(y | x), normalised: what
                  counting knows need not be learned
  mixed_adjusted  the second, adjusted as the first

tau is the one with the best macro-F1 over all behaviors, a and b have the least
loss; both on validation samples, never on those of the test split. tau below
zero undoes a stage that moved the odds towards the tail.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from behaviorlm_jax.evaluate import metrics
from behaviorlm_jax.score import label_tree

# Rounded, so that a value is found again: 3 * 0.1 is 0.30000000000000004.
TAUS = tuple(round(0.1 * i, 1) for i in range(-10, 16))
# Above 1 they sharpen a predictor that is less sure than it is right.
WEIGHTS = tuple(round(0.1 * i, 1) for i in range(13))
NAMES = ('adjusted', 'mixed', 'mixed_adjusted')


def log_prior(counts: np.ndarray | Sequence[int]) -> np.ndarray:
  """log pi float64 [Y] of training counts int [Y], one added to each."""
  # One added: behaviors of the validation split alone have no training event.
  counts = np.asarray(counts, np.float64) + 1
  return np.log(counts / counts.sum())


def fit(
  log_p: np.ndarray, counted: np.ndarray, prior: np.ndarray, true: np.ndarray
) -> dict[str, dict[str, float]]:
  """The numbers of every predictor of NAMES: {'adjusted': {'tau'}, ...}.

  Of log p [n, Y] of validation samples, `counted` the same of a count model, the
  log_prior [Y] and the true ids [n].
  """
  a, b = fit_mix(log_p, counted, true)
  mixed = mix_log_p(log_p, counted, a, b)
  return {
    'adjusted': {'tau': fit_tau(log_p, prior, true)},
    'mixed': {'a': a, 'b': b},
    # Its own tau: mixing has moved the prior already.
    'mixed_adjusted': {'a': a, 'b': b, 'tau': fit_tau(mixed, prior, true)},
  }


def apply(
  numbers: Mapping[str, float],
  log_p: np.ndarray,
  counted: np.ndarray | None,
  prior: np.ndarray,
) -> np.ndarray:
  """Scores float [n, Y] of a predictor with these numbers; higher is better."""
  if 'a' in numbers:
    log_p = mix_log_p(log_p, counted, numbers['a'], numbers['b'])
  return log_p - numbers.get('tau', 0.0) * prior


def mix_log_p(log_p: np.ndarray, counted: np.ndarray, a: float, b: float) -> np.ndarray:
  """log p float64 [n, Y] of the log-linear mix."""
  return label_tree.log_softmax(a * np.asarray(log_p) + b * np.asarray(counted))


def fit_mix(
  log_p: np.ndarray, counted: np.ndarray, true: np.ndarray
) -> tuple[float, float]:
  """(a, b) of WEIGHTS with the least mean -log p(true)."""
  rows = np.arange(len(true))
  loss = lambda pair: -mix_log_p(log_p, counted, *pair)[rows, true].mean()
  # Without both weights nothing is left but equal odds.
  pairs = [pair for pair in itertools.product(WEIGHTS, WEIGHTS) if any(pair)]
  return min(pairs, key=loss)


def fit_tau(log_p: np.ndarray, prior: np.ndarray, true: np.ndarray) -> float:
  """The tau of TAUS with the best macro-F1; of equals the nearest to zero."""
  # Macro-F1 and not loss: tau is for the first choices of rare names, of which
  # the mean loss knows little.
  gains = {
    tau: metrics.per_behavior(true, best, len(prior))[2].mean()
    for tau, best in zip(TAUS, first_choices(log_p, prior), strict=True)
  }
  return max(sorted(TAUS, key=abs), key=gains.get)  # Of equals max takes the first.


def first_choices(log_p: np.ndarray, prior: np.ndarray) -> np.ndarray:
  """Of log p float [n, Y], adjusted by each of TAUS: ids int64 [T, n]."""
  return np.stack([np.argmax(log_p - tau * prior, axis=1) for tau in TAUS])


def trade_off(by_tau: np.ndarray, true: np.ndarray, anchor: np.ndarray) -> np.ndarray:
  """Anchor against tail over TAUS: float64 [T, 2], macro-F1 of both groups.

  `by_tau`: int64 [T, n] of first_choices; `true`: ids [n]; `anchor`: bool [Y].
  """
  mean = lambda f1, members: f1[members].mean() if members.any() else 0.0
  f1s = (metrics.per_behavior(true, best, len(anchor))[2] for best in by_tau)
  return np.array([[mean(f1, anchor), mean(f1, ~anchor)] for f1 in f1s])
