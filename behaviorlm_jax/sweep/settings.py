"""The settings of a sweep, for config files; sweep.jobs runs them."""

from collections.abc import Iterable, Mapping

from ml_collections import ConfigDict

from behaviorlm_jax import config as config_lib


def empty() -> ConfigDict:
  """An empty sweep; a config file fills it."""
  config = ConfigDict()
  config.base = config_lib.default()  # Of every run.
  config.logs = ConfigDict()  # {name: address; '': left out}.
  config.log_fields = ConfigDict()  # {name: sections to change}.
  config.methods = ConfigDict()  # {name: method(...)}.
  config.order = ()  # Names of those that are run, the most wanted first.
  config.contrasts = ()  # Pairs (method, control) whose difference is shown.
  config.drawn = ()  # Methods with a curve in the figure.
  config.results = 'docs/results'  # Where rows stand that are not run again.
  return config


def method(
  ablations: Iterable[str] = (),
  start: str = '',
  seeds: int = 1,
  fields: Mapping[str, object] | None = None,
  shots: int | None = None,
) -> ConfigDict:
  """One method of a sweep.

  Args:
    start: method whose stage a it starts from; '': it runs its own.
    seeds: 1 runs seed 0 alone, 3 also 1 and 2.
    fields: {section: {field: value}} to change, or {field: value}.
    shots: training events that frequent tail behaviors keep (sweep.few_shot);
      None: all.
  """
  return ConfigDict(
    {
      'ablations': tuple(ablations),
      'start': start,
      'seeds': seeds,
      'fields': fields or {},
      'shots': shots,
    }
  )


def contrasts(controls: Mapping[str, Iterable[str]]) -> tuple[tuple[str, str], ...]:
  """Pairs (method, control), of {method: its controls}."""
  return tuple((name, other) for name, others in controls.items() for other in others)
