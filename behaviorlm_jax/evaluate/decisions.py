"""From probabilities to a choice: three operating points, frozen on validation.

  accuracy   the likeliest name
  macro_f1   the best macro-F1 over all names
  tail       the most tail F1 whose anchor F1 on the validation split is at most
             a tolerance below that of `accuracy`

All of them choose argmax_y gain_y p_y + offset_y, event by event, with numbers
that the validation split has settled. p is calibrated first: the softmax of
a log p + b log pi, a and b by the likelihood of validation labels, pi the
training frequencies (temperature and bias of Guo et al., ICML 2017). Scores that
are no log-probabilities are calibrated in the same way.

Macro-F1 is not a mean over events, so the best choice of one event depends on
what is chosen of the others. With F_y the F1 of name y, N_y how frequent it is
and Q_y how often it is chosen, a small change of the choices gains

  w_y (2 p_y - F_y) / (N_y + Q_y)

by choosing y, w_y its weight in the mean. The plug-in rule takes the y that
gains most, F and Q being those that this very rule leads to (Narasimhan et al.,
Consistent multiclass algorithms for complex performance measures, ICML 2015;
Schultheis et al., NeurIPS 2023). All three are expectations under p, so no label
is used, but thousands of contexts are needed: of fewer, `macro_f1` chooses by
p_y / pi_y^tau (Menon et al., ICLR 2021), its tau by the same expected macro-F1.
"""

import dataclasses

import numpy as np
from scipy import optimize

from behaviorlm_jax.evaluate import metrics
from behaviorlm_jax.score.label_tree import log_softmax

POINTS = ('accuracy', 'macro_f1', 'tail')
PLUG_IN_SAMPLES = 2000  # Validation contexts that the plug-in rule needs.
_ROUNDS, _DAMPING = 60, 0.5
# Of a and b. A predictor that is right about every label would be sharpened
# without end, and one that knows nothing turned around by chance.
_BOUNDS = (0.0, 10.0), (-10.0, 10.0)
_PRECISION = {'ftol': 1e-14, 'gtol': 1e-8}
_FLOOR = 100.0  # Nats; exp(-100) is 0 in float32.
_TAUS = np.linspace(0, 1.5, 31)
# How far from none of the anchors to their share, and from there to all of them.
_OMEGAS = np.linspace(0, 1, 21)


@dataclasses.dataclass(frozen=True)
class Calibration:
  """p = softmax(a log p + b log pi)."""

  a: float
  b: float
  log_pi: np.ndarray  # float [Y]

  def log(self, scores: np.ndarray) -> np.ndarray:
    """log p float64 [n, Y] of scores [n, Y]."""
    return log_softmax(self.a * _floored(scores) + self.b * self.log_pi)

  def __call__(self, scores: np.ndarray) -> np.ndarray:
    """p float64 [n, Y] of scores [n, Y]."""
    return np.exp(self.log(scores))


@dataclasses.dataclass(frozen=True)
class Rule:
  """Chooses argmax_y gain_y p_y + offset_y."""

  how: str  # In words: 'argmax', 'tau 0.30', 'plug-in'
  gain: np.ndarray  # float [Y]
  offset: np.ndarray | float = 0.0

  def values(self, p: np.ndarray) -> np.ndarray:
    """float [n, Y], of which the largest is chosen."""
    return self.gain * p + self.offset

  def choose(self, p: np.ndarray) -> np.ndarray:
    """Ids int64 [n] of probabilities [n, Y]."""
    return np.argmax(self.values(p), axis=1)


def calibrate(scores: np.ndarray, log_pi: np.ndarray, true: np.ndarray) -> Calibration:
  """Fits a and b to labels int [n] of validation scores float [n, Y].

  Fewer than two labels leave them at 1 and 0, with which log p stays what it is.
  """
  rows, start = np.arange(len(true)), np.array([1.0, 0.0])
  if len(true) < 2:
    return Calibration(*start.tolist(), np.asarray(log_pi))
  columns = np.stack([_floored(scores), np.broadcast_to(log_pi, scores.shape)])

  def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
    log_q = log_softmax(np.tensordot(weights, columns, 1))
    expected = np.einsum('ny,kny->k', np.exp(log_q), columns)
    observed = columns[:, rows, true].sum(axis=1)
    gradient = (expected - observed) / len(true)
    return -log_q[rows, true].mean(), gradient

  # The loss is convex: what is found does not depend on where it starts.
  found = optimize.minimize(
    loss, start, jac=True, method='L-BFGS-B', bounds=_BOUNDS, options=_PRECISION
  )
  return Calibration(*found.x.tolist(), np.asarray(log_pi))


def _floored(scores):
  """Scores float64 [n, Y], none of them _FLOOR below the best of its row."""
  # An infinite one has no gradient, and 0 times it is no number.
  scores = np.asarray(scores, np.float64)
  return np.maximum(scores, scores.max(axis=1, keepdims=True) - _FLOOR)


def expected_f1(p: np.ndarray, chosen: np.ndarray) -> np.ndarray:
  """Expected F1 float64 [Y] of choices int [n], were p float [n, Y] true."""
  hits = np.bincount(chosen, p[np.arange(len(p)), chosen], p.shape[1])
  claimed = np.bincount(chosen, minlength=p.shape[1])
  return 2 * hits / np.maximum(p.sum(axis=0) + claimed, 1e-12)


def plug_in(p: np.ndarray, weights: np.ndarray) -> Rule:
  """The rule of the most expected F1, averaged by weights float [Y].

  No worse than argmax, which is the first that is tried.

  Args:
    p: float [n, Y] of contexts like those to come.
    weights: of each name's F1 in the mean.
  """
  frequent = p.mean(axis=0)
  best = rule = argmax(len(frequent))
  most, f1, claimed = -1.0, 0.0, 0.0
  for round_ in range(_ROUNDS):
    chosen = rule.choose(p)
    new = expected_f1(p, chosen)
    if weights @ new > most:
      best, most = rule, weights @ new
    # Damped: two names could change places for ever.
    keep = _DAMPING if round_ else 0.0
    share = np.bincount(chosen, minlength=len(frequent)) / len(p)
    f1 = keep * f1 + (1 - keep) * new
    claimed = keep * claimed + (1 - keep) * share
    slope = weights / np.maximum(frequent + claimed, 1e-12)
    rule = Rule('plug-in', 2 * slope, -slope * f1)
  return best


def argmax(count: int) -> Rule:
  """The likeliest of so many names."""
  return Rule('argmax', np.ones(count))


def of_tau(tau: float, log_pi: np.ndarray) -> Rule:
  """The rule that chooses by log p - tau log pi."""
  return Rule(f'tau {tau:.2f}', np.exp(-tau * (log_pi - log_pi.max())))


def fit_rules(
  p: np.ndarray,
  true: np.ndarray,
  log_pi: np.ndarray,
  anchor: np.ndarray,
  tolerance: float,
) -> dict[str, Rule]:
  """{point: Rule} of POINTS.

  Args:
    p: calibrated, float [n, Y], of the validation split.
    true: int [n], its labels.
    log_pi: float [Y], log of the training frequencies.
    anchor: bool [Y].
    tolerance: of anchor F1, see the module.
  """
  likeliest = argmax(len(log_pi))
  by_tau = [of_tau(tau, log_pi) for tau in _TAUS]
  every = np.full(len(anchor), 1 / len(anchor))
  if len(p) >= PLUG_IN_SAMPLES:
    macro = plug_in(p, every)
    tried = [plug_in(p, w) for w in _weightings(anchor)]
  else:
    macro = max(by_tau, key=lambda rule: every @ expected_f1(p, rule.choose(p)))
    tried = []
  return {
    'accuracy': likeliest,
    'macro_f1': macro,
    'tail': _most_tail([likeliest, *by_tau, *tried], p, true, anchor, tolerance),
  }


def _weightings(anchor):
  """Weights [Y] with less and less for the anchors."""
  share = anchor.mean()
  each = lambda omega: np.where(
    anchor, omega / max(anchor.sum(), 1), (1 - omega) / max((~anchor).sum(), 1)
  )
  return [each(omega * share) for omega in _OMEGAS[1:]] + [
    each(share + omega * (1 - share)) for omega in _OMEGAS[1:-1]
  ]


def _most_tail(rules, p, true, anchor, tolerance):
  """Of rules, the first of which is argmax, the one of point `tail`."""
  f1 = [metrics.per_behavior(true, rule.choose(p), len(anchor))[2] for rule in rules]
  mean = lambda values, group: values[group].mean() if group.any() else 0.0
  least = mean(f1[0], anchor) - tolerance
  fitting = [i for i in range(len(rules)) if mean(f1[i], anchor) >= least]
  return rules[max(fitting, key=lambda i: mean(f1[i], ~anchor))]
