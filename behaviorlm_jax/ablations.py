"""What one flag takes away: --ablation=NAME, and which of them contradict."""

from collections.abc import Iterable

from ml_collections import ConfigDict

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.errors import InputError, nearest

# Each ablation changes these fields; `stages` is checked in `_left`.
ABLATIONS = {
  'no_auxiliary': {'a.conversation_share': 0.0, 'b.conversation_share': 0.0},
  'no_difficulty': {'difficulty.score': 'random', 'plan.gamma': 1.0},
  'no_balance': {'plan.budget': 'natural', 'plan.temper': 0.5},
  'no_balanced_stage': {},
  'no_anchor_stage': {},
  'all_behaviors_first': {'a.content': 'all'},
  'anchors_first': {'a.content': 'anchors'},
  'one_stage': {},
  'one_stage_balanced': {'a.content': 'balanced', 'plan.neighbours': 0.0},
}
# Those whose one stage takes the place of both.
_ONE_STAGE = ('one_stage', 'one_stage_balanced')
# The stage that each of them changes or drops.
_CHANGES = {
  'no_difficulty': 'b',
  'no_balance': 'b',
  'no_balanced_stage': 'b',
  'no_anchor_stage': 'a',
  'all_behaviors_first': 'a',
  'anchors_first': 'a',
}
# Pairs that contradict each other, with the reason.
_CLASHES = {
  ('no_balanced_stage', 'no_anchor_stage'): 'no stage would be left',
  ('no_balanced_stage', 'no_difficulty'): 'there is no stage b to change',
  ('no_balanced_stage', 'no_balance'): 'there is no stage b to change',
  ('no_anchor_stage', 'all_behaviors_first'): 'there is no stage a to change',
  ('no_anchor_stage', 'anchors_first'): 'there is no stage a to change',
  ('all_behaviors_first', 'anchors_first'): 'both name what stage a learns',
  ('one_stage', 'one_stage_balanced'): 'both name what the one stage draws',
  **{
    (name, other): f'{name} draws no subset'
    if other in ('no_difficulty', 'no_balance')
    else f'{name} replaces both stages'
    for name in _ONE_STAGE
    for other in _CHANGES
  },
}


def ablate(config: ConfigDict, names: Iterable[str]) -> ConfigDict:
  """Returns a copy of `config` with the named ablations applied."""
  config = config.copy_and_resolve_references()
  # Sorted: two orders of flags are one run. With those of the config, which a
  # sweep's may have already.
  names = sorted({*names, *config.ablations})
  for name in names:
    if name not in ABLATIONS:
      raise InputError(
        f'--ablation={name} is unknown{nearest(name, ABLATIONS)}; choose from '
        f'{", ".join(ABLATIONS)}.'
      )
  for pair, reason in _CLASHES.items():
    if set(pair) <= set(names):
      raise InputError(
        f'--ablation={pair[0]} and --ablation={pair[1]} cannot '
        f'be combined: {reason}; drop one of them.'
      )
  for name in names:
    fields = ABLATIONS[name]
    if fields and fields == {f: config_lib.value_of(config, f) for f in fields}:
      already = ' and '.join(f'{f} = {value!r}' for f, value in fields.items())
      raise InputError(
        f'--ablation={name} changes nothing: this config has {already} already; '
        'leave it out.'
      )
    config.update_from_flattened_dict(fields)
  if set(_ONE_STAGE) & set(names):  # As many steps as both stages together.
    config.a.steps += config_lib.stage_of(config, 'b').steps
  config.stages = _left(tuple(config.stages), names)
  config.ablations = tuple(names)
  return config


def _left(stages, names):
  """The stages that are left to run."""
  if set(_ONE_STAGE) & set(names):
    return ('one',)
  dropped = {'no_balanced_stage': 'b', 'no_anchor_stage': 'a'}
  left = tuple(s for s in stages if s not in [dropped.get(name) for name in names])
  # Stage b alone can still be told not to start from stage a.
  needs = _CHANGES | {'no_anchor_stage': None}
  for name in names:
    if not left or needs.get(name) not in (None, *stages):
      raise InputError(
        f'--ablation={name} leaves nothing to change or run: this config '
        f'runs stages {", ".join(stages)}; use a config that runs the stage.'
      )
  return left
