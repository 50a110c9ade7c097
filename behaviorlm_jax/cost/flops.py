"""Counts the products of a traced function, loops and all.

XLA's own count takes the body of a loop once, however often it runs.
"""

import math
from collections.abc import Callable

import jax
from jax.extend import core


def count(function: Callable[..., object], *arguments: object) -> int:
  """Floating-point operations of all matrix products, over all devices.

  A multiplication and an addition each count. `arguments` may be
  jax.ShapeDtypeStruct. Of alternatives the largest counts. Products inside
  kernels (pallas_call, cuDNN) are not seen: trace another implementation.
  """
  return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr: core.Jaxpr) -> int:
  return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: core.JaxprEqn) -> int:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    # Each number of the result is a sum over the contracted axes.
    (contracted, _), _ = params['dimension_numbers']
    left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)
  if name == 'while':
    raise ValueError('how often a while loop runs is not known beforehand.')
  # pjit, remat, custom_vjp: what holds a jaxpr runs it once, but for cond and scan.
  inner = [_of(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
  if name == 'cond':
    return max(inner)
  return sum(inner) * (params['length'] if name == 'scan' else 1)


def _jaxprs(value: object) -> list[core.Jaxpr]:
  """The jaxprs in a parameter of an equation."""
  match value:
    case core.ClosedJaxpr():
      return [value.jaxpr]
    case core.Jaxpr():
      return [value]
    case tuple():
      return [jaxpr for one in value for jaxpr in _jaxprs(one)]
  return []
