"""The method, its controls and the untuned model, on two logs.

  python -m behaviorlm_jax.sweep --config=configs/ablations.py --workdir=DIR \
    --config.logs.foursquare_nyc=foursquare_nyc.csv.gz \
    --config.logs.india_time_use=india_time_use.csv.gz

Methods take 72 steps of 4 x 640 tokens: 48 of stage a, which two methods show
by itself, and 24 of stage b, or 72 of one stage. That is less than a fifth of a
pass over either log: what two CPU cores can repeat often enough to tell methods
apart.

configs/ablations.py:one_pass first learns all behaviors, every training target,
over the vocabulary, and then compares stages b of 48 steps: of balanced
or natural draws, by difficulty or at random; SASRec is beside them.

configs/ablations.py:few_shot runs two stages and one where tail behaviors
of 50 training events or more keep that few of them, chosen by seed, more of
them including fewer. Stage a learns anchors alone, so stage b is the
first to see these; it teaches them as often as it draws them, for their natural
frequency would hide them. Stage b takes 48 steps here, some two windows of each
behavior, drawn at random, whose other events count, too.
"""

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.sweep import settings as sweep

SHOTS = (5, 50, 0, 1, 20, 2, 10)  # The most wanted first.
# All neighbours count alike, and scores stay those of natural frequencies: on
# validation events draws of equal frequency moved the prior further than tau
# undoes. Of stage b's methods alone, so that the rows of others stay valid.
_STAGE_B = {'plan': {'neighbours': 1e4}, 'b': {'prior': 'natural'}}


def get_config(name='controls'):
  config = sweep.empty()
  config.base = _base()
  config.logs = dict.fromkeys(('foursquare_nyc', 'india_time_use'), '')
  config.log_fields = {
    'india_time_use': {'data': {'columns': {'group': 'household'}, 'weekday': False}}
  }
  {'controls': _controls, 'one_pass': _one_pass, 'few_shot': _few_shot}[name](config)
  return config


def _controls(config):
  anchors, every = 'no_balanced_stage', 'all_behaviors_alone'
  two = dict(seeds=3, fields=_STAGE_B)
  methods = {
    # Stage a by itself, on anchors or on all behaviors, and then stage b.
    anchors: sweep.method(('no_balanced_stage',), seeds=3),
    'behaviorlm': sweep.method(start=anchors, **two),
    'one_stage': sweep.method(('one_stage',), seeds=3),
    every: sweep.method(seeds=3, fields={'stages': ('a',), 'a': {'content': 'all'}}),
    'all_behaviors_first': sweep.method(start=every, **two),
    'sasrec': _sasrec(),
    'no_difficulty': sweep.method(('no_difficulty',), anchors, **two),
    # Not one_stage_balanced: windows' other events count by `neighbours`.
    'one_stage_balanced_windows': sweep.method(
      ('one_stage',), seeds=3, fields={'a': {'content': 'balanced'}}
    ),
    'balanced_softmax': sweep.method(
      ('one_stage',), seeds=3, fields={'a': {'prior': 'uniform'}}
    ),
    'no_auxiliary': sweep.method(('no_auxiliary',), **two),
    'over_vocabulary': sweep.method(
      ('one_stage',), fields={'a': {'softmax': 'vocabulary'}}
    ),
    'no_balance': sweep.method(('no_balance',), anchors, fields=_STAGE_B),
    'no_anchor_stage': sweep.method(('no_anchor_stage',), fields=_STAGE_B),
  }
  config.methods, config.order = methods, tuple(methods)
  others = [name for name in methods if name != 'behaviorlm']
  adjusted = [f'{name}_adjusted' for name in ('one_stage', 'balanced_softmax')]
  adjusted += ['sasrec_adjusted', 'markov_adjusted']
  mixed = ['one_stage_mixed', 'sasrec_mixed']
  mixed_adjusted = [*(f'{name}_adjusted' for name in mixed), 'markov_adjusted']
  config.contrasts = sweep.contrasts(
    {
      'behaviorlm': (*others, 'untuned', 'markov', 'one_stage_adjusted'),
      'behaviorlm_adjusted': adjusted,
      'behaviorlm_matched': (*adjusted, 'one_stage_balanced_windows'),
      'behaviorlm_mixed': (*mixed, 'markov'),
      'behaviorlm_mixed_adjusted': mixed_adjusted,
      'behaviorlm_mixed_matched': mixed_adjusted,
      'all_behaviors_first': (every,),
      'one_stage': ('over_vocabulary',),
    }
  )
  config.drawn = ('behaviorlm', 'one_stage', 'all_behaviors_first', 'sasrec', 'markov')


def _one_pass(config):
  base = config.base
  base.a.content = 'all'
  base.a.conversation_share = 0.1
  base.plan.per_behavior = 2
  base.plan.neighbours = 1e4  # All of them count alike.
  base.difficulty.candidates = 4
  base.a.update({'steps': 400, 'learning_rate': 1e-3, 'softmax': 'vocabulary'})
  base.b.update(
    {'steps': 48, 'learning_rate': 5e-4, 'prior': 'natural', 'interpolation': 0.5}
  )
  base.eval.max_samples = 500
  base.eval.validation_rows = 32
  config.log_fields.india_time_use.a = {'steps': 505}
  start = 'all_behaviors_alone'
  config.methods = {
    start: sweep.method(seeds=3, fields={'stages': ('a',)}),
    'behaviorlm': sweep.method(start=start, seeds=3),
    'natural_stage': sweep.method(('no_balance', 'no_difficulty'), start, seeds=3),
    'behaviorlm_whole_way': sweep.method(
      start=start, fields={'b': {'interpolation': 1.0}}
    ),
    'no_difficulty': sweep.method(('no_difficulty',), start, seeds=3),
    'sasrec': _sasrec(),
  }
  config.order = tuple(config.methods)
  config.drawn = (start, 'behaviorlm', 'natural_stage', 'sasrec', 'markov')
  others = (start, 'natural_stage', 'no_difficulty', 'sasrec')
  adjusted = [f'{name}_adjusted' for name in (*others, 'markov')]
  config.contrasts = sweep.contrasts(
    {
      'behaviorlm': (*others, 'markov', 'behaviorlm_whole_way'),
      'behaviorlm_adjusted': adjusted,
      'behaviorlm_matched': adjusted,
      'behaviorlm_mixed_adjusted': [f'{name}_mixed_adjusted' for name in others],
      'behaviorlm_whole_way': (start,),
      start: ('sasrec',),
      f'{start}_adjusted': ('sasrec_adjusted',),
      f'{start}_matched': ('sasrec_adjusted',),
    }
  )
  config.results = 'docs/results/one_pass'


def _few_shot(config):
  config.methods = {'no_balanced_stage': sweep.method(('no_balanced_stage',))}
  for shots in SHOTS:
    config.methods[f'two_stages_{shots}_shots'] = sweep.method(
      ('no_difficulty',),
      'no_balanced_stage',
      fields={'plan': {'per_behavior': 2}, 'b': {'steps': 48}},
      shots=shots,
    )
    config.methods[f'one_stage_{shots}_shots'] = sweep.method(
      ('one_stage',), fields={'b': {'steps': 48}}, shots=shots
    )
  config.order = (
    'no_balanced_stage',
    *(f'two_stages_{shots}_shots' for shots in SHOTS),
    *(f'one_stage_{shots}_shots' for shots in SHOTS),
  )
  config.contrasts = tuple(
    (f'two_stages_{shots}_shots{kind}', control + kind)
    for shots in SHOTS
    for kind in ('', '_adjusted')
    for control in (f'one_stage_{shots}_shots', 'two_stages_50_shots')
    if control != f'two_stages_{shots}_shots'
  )
  config.results = 'docs/results/few_shot'


def _sasrec():
  return sweep.method(seeds=3, fields={'stages': (), 'sasrec': {'steps': 1500}})


def _base():
  config = config_lib.default()
  config.a.conversation_share = 0.25
  # As the paper has it: stage a learns anchors, stage b moves the prior.
  config.a.content = 'anchors'
  config.b.prior = 'drawn'
  config.b.interpolation = 1.0
  config.plan.per_behavior = 1  # Of at most 3, once each in stage b's steps.
  config.plan.neighbours = 50.0
  config.a.learning_rate = 2e-3
  config.difficulty.score = 'nll'
  config.difficulty.candidates = 3
  config.train.batch = 4
  config.train.length = 640
  config.train.accumulate = 2
  config.a.steps = 48
  config.b.steps = 24
  # 2e-4, or half of the way, hardly teaches the tail after anchors alone.
  config.b.learning_rate = 1e-3
  config.checkpoint.every = 100
  config.score.batch = 2
  config.eval.max_samples = 400
  config.eval.validation_samples = 200  # As of the committed rows.
  config.eval.validation_rows = 8
  return config
