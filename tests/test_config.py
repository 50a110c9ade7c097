"""Configs: what is refused and how it is said, ablations, flags."""

import itertools
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from behaviorlm_jax import ablations, cli
from behaviorlm_jax import config as config_lib
from behaviorlm_jax.errors import InputError

CONFIGS = Path(__file__).parents[1] / 'configs'
NAMES = (
  'foursquare_nyc.py',
  'india_time_use.py',
  'paper.py',
  'quickstart.py',
  'stage1.py',
  'stage2.py',
)
# What scripts may rely on, and a value that differs from every default.
RELIED_ON = {
  'data.events': 'mine.csv',
  'data.columns.user': 'who',
  'data.columns.time': 'when',
  'data.columns.behavior': 'what',
  'data.columns.place': 'where',
  'data.columns.group': 'team',
  'data.history': 7,
  'data.conversations': 'talks.jsonl',
  'model.address': 'random://tiny',
  'lora.rank': 3,
  'lora.alpha': 6.5,
  'lora.targets': ('q_proj', 'v_proj'),
  'a.steps': 9,
  'train.batch': 6,
  'train.length': 700,
  'a.learning_rate': 0.5,
  'checkpoint.every': 5,
  'difficulty.candidates': 11,
  'plan.per_behavior': 13,
  'plan.targets_per_row': 2,
  'eval.max_samples': 17,
  'seed': 19,
}


def changed(**fields):
  """The default config with some fields, '__' for the dots, changed."""
  config = config_lib.default()
  config.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in fields.items()}
  )
  return config


def read_flags(*arguments, name='stage1.py'):
  """The config that these arguments give on the command line."""
  values, argv = flags.FlagValues(), ['main', f'--config={CONFIGS / name}', *arguments]
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
  values(argv)
  return values.config


def explained(*arguments, name='stage1.py'):
  """The sentence for arguments that cannot be used."""
  with pytest.raises(Exception, match=r'.') as caught:
    read_flags(*arguments, name=name).keys()
  argv = ['main', f'--config={CONFIGS / name}', *arguments]
  sentence = cli.explain(argv, caught.value)
  assert '\n' not in sentence
  return sentence


# check().


@pytest.mark.parametrize('name', NAMES)
def test_the_shipped_configs_are_right(name):
  config_lib.check(read_flags(name=name))


@pytest.mark.parametrize(
  ('name', 'field'), [(n, f) for n, f in config_lib.FIELDS.items() if f.bounds]
)
def test_a_number_out_of_bounds_is_refused(name, field):
  outside = [field.least - 1, *([] if field.most == math.inf else [field.most + 1])]
  for value in outside:
    with pytest.raises(InputError, match=f'^{name} is .*; it must be {field.bounds}'):
      config_lib.check(changed(**{name: value}))


@pytest.mark.parametrize('alpha', [0.0, -1.0, float('nan'), float('inf')])
def test_an_alpha_that_teaches_nothing_is_refused(alpha):
  with pytest.raises(InputError, match=r'^lora\.alpha is .*; it must be above'):
    config_lib.check(changed(**{'lora.alpha': alpha}))


def test_a_number_that_is_none_is_refused():
  with pytest.raises(InputError, match=r'^train\.clip is nan; '):
    config_lib.check(changed(train__clip=float('nan')))


@pytest.mark.parametrize(
  ('name', 'field'), [(n, f) for n, f in config_lib.FIELDS.items() if f.choices]
)
def test_a_word_that_is_no_choice_is_refused(name, field):
  wrong = field.choices[-1][:-1]
  nearest = rf'\(did you mean {field.choices[-1]}\?\)'
  with pytest.raises(
    InputError, match=rf"^{name} is '{wrong}' {nearest}; choose from .*, .*\.$"
  ):
    config_lib.check(changed(**{name: wrong}))


@pytest.mark.parametrize(
  ('fields', 'parts'),
  [
    ({'data.split': (0.5, 0.5)}, ('data.split', '(0.5, 0.5)')),
    ({'data.split': (0.8, 0.1, 0.2)}, ('data.split', '(0.8, 0.1, 0.2)')),
    ({'data.split': (1.1, -0.2, 0.1)}, ('data.split', '(1.1, -0.2, 0.1)')),
    ({'plan.window': 4}, ('plan.window is 4', 'plan.min_context is 4')),
    ({'data.history': 3}, ('data.history is 3', 'plan.min_context is 4')),
    ({'train.accumulate': 3}, ('train.batch is 8', 'train.accumulate is 3')),
    (
      {'a.softmax': 'vocabulary', 'b.prior': 'natural', 'score.softmax': 'vocabulary'},
      ("b.softmax is 'names'", 'set score.softmax=names or b.softmax=vocabulary.'),
    ),
    (
      {'b.softmax': 'vocabulary', 'b.prior': 'uniform'},
      ("b.prior is 'uniform'", "b.softmax is 'vocabulary'", 'set b.prior=drawn'),
    ),
    (
      {'score.softmax': 'vocabulary'},
      (
        "a.softmax is 'names' and b.softmax is 'names', which",
        "score.softmax is 'vocabulary'; set score.softmax=names or "
        'a.softmax=vocabulary and b.softmax=vocabulary.',
      ),
    ),
    (
      {'difficulty.score': 'random', 'plan.gamma': 2.0},
      (
        'plan.gamma is 2.0',
        "difficulty.score is 'random'",
        'set plan.gamma=1.0 or difficulty.score to nll or',
      ),
    ),
    (
      {'plan.budget': 'natural', 'plan.temper': 0.3},
      ('plan.temper is 0.3', "plan.budget is 'natural'", 'to tempered'),
    ),
    ({'sasrec.width': 51}, ('sasrec.width is 51', 'must be even')),
    (
      {'stages': ('a',), 'init_from': 'runs/a'},
      ('init_from is runs/a', 'leave it out'),
    ),
    ({'stages': ('a', 'c')}, ('stages', "('a', 'c')")),
  ],
)
def test_values_that_contradict_each_other_are_refused(fields, parts):
  with pytest.raises(InputError) as caught:
    config_lib.check(changed(**fields))
  sentence = str(caught.value)
  assert all(part in sentence for part in parts)
  assert sentence.endswith('.') and '\n' not in sentence


# Ablations.


@pytest.mark.parametrize(
  ('name', 'stages', 'fields'),
  [
    (
      'no_auxiliary',
      ('a', 'b'),
      {'a.conversation_share': 0.0, 'b.conversation_share': 0.0},
    ),
    ('no_difficulty', ('a', 'b'), {'difficulty.score': 'random'}),
    ('no_balance', ('a', 'b'), {'plan.budget': 'natural'}),
    ('no_balanced_stage', ('a',), {}),
    ('no_anchor_stage', ('b',), {}),
    ('anchors_first', ('a', 'b'), {'a.content': 'anchors'}),
    ('one_stage', ('one',), {'a.steps': 400}),
    (
      'one_stage_balanced',
      ('one',),
      {'a.steps': 400, 'a.content': 'balanced', 'plan.neighbours': 0.0},
    ),
  ],
)
def test_an_ablation_changes_its_fields_and_stages_only(name, stages, fields):
  before = changed(b__conversation_share=0.1, difficulty__score='nll')
  after = ablations.ablate(before, [name])
  expected = before.copy_and_resolve_references()
  expected.update_from_flattened_dict(fields)
  expected.stages, expected.ablations = stages, (name,)
  assert after.to_dict() == expected.to_dict()
  assert before.ablations == () and before.stages == ('a', 'b')
  config_lib.check(after)


@pytest.mark.parametrize(
  ('name', 'fields'),
  [
    ('no_difficulty', {'difficulty__score': 'nll', 'plan__gamma': 2.0}),
    ('no_balance', {'plan__budget': 'tempered', 'plan__temper': 0.3}),
  ],
)
def test_an_ablation_takes_along_what_would_change_nothing_then(name, fields):
  config_lib.check(changed(**fields))
  config_lib.check(ablations.ablate(changed(**fields), [name]))


def test_stage_b_is_gentler_than_the_stage_it_starts_from():
  """But for what it is given."""

  def stage(name, **fields):
    one = config_lib.stage_of(changed(a__learning_rate=4e-3, **fields), name)
    return one.steps, one.learning_rate, one.interpolation, one.prior

  assert stage('a') == stage('one') == (200, 4e-3, 1.0, 'drawn')
  assert stage('b') == (200, 2e-3, 0.5, 'natural')
  assert stage('b', ablations=('no_anchor_stage',)) == (200, 4e-3, 1.0, 'natural')
  own = {
    'b__steps': 7,
    'b__learning_rate': 1e-4,
    'b__interpolation': 0.9,
    'b__prior': 'drawn',
  }
  assert stage('b', **own) == (7, 1e-4, 0.9, 'drawn')
  assert stage('a', **own) == stage('a')


def test_the_config_of_the_paper_changes_what_the_readme_says_and_no_more():
  paper = runpy.run_path(str(CONFIGS / 'paper.py'))['get_config']()
  config_lib.check(paper)
  different = {
    name
    for name, field in config_lib.FIELDS.items()
    if config_lib.value_of(paper, name) != field.default
  }
  assert different == {
    'a.content',
    'plan.neighbours',
    'difficulty.score',
    'b.prior',
    'b.interpolation',
    'b.learning_rate',
  }
  first, second = (config_lib.stage_of(paper, stage) for stage in 'ab')
  for name in ('steps', 'learning_rate', 'interpolation', 'softmax', 'prior'):
    assert getattr(first, name) == getattr(second, name)


def test_all_behaviors_first_undoes_a_config_of_anchors():
  after = ablations.ablate(changed(a__content='anchors'), ['all_behaviors_first'])
  assert after.a.content == 'all' and after.stages == ('a', 'b')


def test_every_pair_works_in_both_orders_or_is_refused_in_both():
  alone = {'one_stage', 'one_stage_balanced'}
  without_b = {'no_difficulty', 'no_balance', 'no_anchor_stage', *alone}
  refused = (
    {frozenset(('no_balanced_stage', name)) for name in without_b}
    | {
      frozenset((one, name))
      for one in alone
      for name in (
        'no_anchor_stage',
        'no_difficulty',
        'no_balance',
        'all_behaviors_first',
        'anchors_first',
      )
    }
    | {
      frozenset(pair)
      for pair in itertools.combinations(
        ('no_anchor_stage', 'all_behaviors_first', 'anchors_first'), 2
      )
    }
    | {frozenset(alone)}
  )
  assert len(refused) == 19
  for pair in itertools.permutations(ablations.ABLATIONS, 2):
    # Of a config in which either would change something.
    content = 'anchors' if 'all_behaviors_first' in pair else 'all'
    config = changed(a__content=content, difficulty__score='nll')
    if frozenset(pair) in refused:
      with pytest.raises(InputError) as caught:
        ablations.ablate(config, pair)
      assert all(f'--ablation={name}' in str(caught.value) for name in pair)
    else:
      config = ablations.ablate(config, pair)
      assert config.ablations == tuple(sorted(pair))
      config_lib.check(config)


@pytest.mark.parametrize(
  ('stage', 'name'),
  [
    ('a', 'no_difficulty'),
    ('a', 'no_balance'),
    ('a', 'no_anchor_stage'),
    ('a', 'no_balanced_stage'),
    ('b', 'anchors_first'),
    ('b', 'no_balanced_stage'),
  ],
)
def test_an_ablation_of_a_stage_that_does_not_run_is_refused(stage, name):
  with pytest.raises(InputError, match=f'^--ablation={name} .* stages {stage}'):
    ablations.ablate(changed(stages=(stage,), difficulty__score='nll'), [name])


@pytest.mark.parametrize(
  ('name', 'fields', 'already'),
  [
    ('all_behaviors_first', {}, "a.content = 'all'"),
    ('anchors_first', {'a__content': 'anchors'}, "a.content = 'anchors'"),
    ('no_difficulty', {}, "difficulty.score = 'random' and .*"),
    (
      'no_auxiliary',
      {'a__conversation_share': 0.0},
      'a.conversation_share = 0.0 and b.conversation_share = 0.0',
    ),
  ],
)
def test_an_ablation_that_changes_nothing_is_refused(name, fields, already):
  with pytest.raises(
    InputError,
    match=(f'^--ablation={name} changes nothing: this config has {already} already'),
  ):
    ablations.ablate(changed(**fields), [name])


def test_an_unknown_ablation_names_the_nearest():
  with pytest.raises(
    InputError,
    match=(
      r'^--ablation=no_dificulty is unknown \(did you mean no_difficulty\?\); '
      r'choose from no_auxiliary, .*one_stage_balanced\.$'
    ),
  ):
    ablations.ablate(config_lib.default(), ['no_dificulty'])


# Fields and flags.


def test_field_names_are_dotted_and_hold_no_section():
  names = list(config_lib.FIELDS)
  assert {'seed', 'a.steps', 'data.columns.user', 'init_from', *RELIED_ON} <= set(names)
  assert not {'train', 'data', 'data.columns'} & set(names)
  assert len(names) == len(set(names))


@pytest.mark.parametrize('name', NAMES)
def test_fields_that_scripts_rely_on_can_be_overridden(name):
  config = read_flags(name=name)
  arguments = [f'--config.{field}={value}' for field, value in RELIED_ON.items()]
  overridden = read_flags(*arguments, name=name)
  for field, value in RELIED_ON.items():
    assert config_lib.value_of(config, field) != value
    assert config_lib.value_of(overridden, field) == value
  config_lib.check(overridden)


def test_a_config_file_cannot_invent_a_field(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
    (CONFIGS / 'stage1.py').read_text().replace('config.stages', 'config.a.stepz')
  )
  assert explained(name=path) == (
    f'--config={path}: config has no field stepz (did you mean steps?).'
  )


@pytest.mark.parametrize(
  ('argument', 'sentence'),
  [
    ('--config.a.stepz=3', 'config has no field a.stepz (did you mean a.steps?).'),
    ('--config.aa.steps=3', 'config has no field aa.steps (did you mean a.steps?).'),
    (
      '--noconfig.data.weekdy',
      'config has no field data.weekdy (did you mean data.weekday?).',
    ),
    ('--config.qqq=3', 'config has no field qqq.'),
    (
      '--config.data.columns=3',
      'config.data.columns is a section; set one of '
      'its fields, such as data.columns.user.',
    ),
    ('--config.a.steps=abc', "a.steps is 'abc'; it must be of type int, like 200."),
    (
      '--config.lora.alpha=x',
      "lora.alpha is 'x'; it must be of type float, like 32.0.",
    ),
    ('--config.b.steps=x', "b.steps is 'x'; it must be of type int."),
    ('--config.seed=', "seed is ''; it must be of type int, like 0."),
  ],
)
def test_a_wrong_flag_is_explained(argument, sentence):
  assert explained(argument) == sentence


@pytest.mark.parametrize(
  ('text', 'reason'),
  [
    (None, r'.*No such file'),
    ('def get_config(:\n', 'invalid syntax'),
    ('def get_config():\n  return 1 + []\n', 'TypeError: unsupported operand'),
    ('def get_config():\n  return 1 / 0\n', 'division by zero'),
  ],
)
def test_a_config_file_that_cannot_be_used_is_explained(tmp_path, text, reason):
  path = tmp_path / 'mine.py'
  if text:
    path.write_text(text)
  assert re.match(f'--config={path}: {reason}', explained(name=path))


def test_what_is_missing_on_the_command_line_is_named():
  error = flags.IllegalFlagValueError(
    'flag --workdir=None: Flag --workdir must have a value other than None.'
  )
  assert cli.explain(['main'], error).startswith('--workdir is missing; ')


@pytest.mark.parametrize(('old', 'new'), config_lib.RENAMED.items())
def test_fields_are_known_by_their_old_names_on_the_command_line(old, new):
  assert cli.renamed(f'--config.{old}=3') == f'--config.{new}=3'
  assert new in config_lib.FIELDS and old not in config_lib.FIELDS
  assert cli.renamed('--config.train.batch=3') == '--config.train.batch=3'


def test_a_command_takes_an_old_name():
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'behaviorlm_jax.main',
      f'--config={CONFIGS / "stage1.py"}',
      '--config.train.steps=0',
      '--workdir=/nowhere/at/all',
    ],
    capture_output=True,
    text=True,
    check=False,
    cwd=CONFIGS.parent,
  )
  assert done.returncode == 2
  assert 'config.train.steps is config.a.steps now' in done.stderr
  assert done.stderr.splitlines()[-1] == 'error: a.steps is 0; it must be at least 1.'


def test_old_names_in_a_config_file_are_explained(tmp_path):
  path = tmp_path / 'mine.py'
  for old, new in (('train.steps', 'a.steps'), ('train.loss', 'a.softmax and a.prior')):
    path.write_text(
      'from behaviorlm_jax import config\n'
      'def get_config():\n'
      '  mine = config.default()\n'
      f'  mine.{old} = 3\n'
      '  return mine\n'
    )
    assert new in explained(name=path)
  assert explained('--config.eval.fit=False').endswith(
    'no field eval.fit: eval.validation_samples=0 says it now.'
  )
  assert explained('--config.train.loss=names').endswith(
    'no field train.loss: a.softmax and a.prior, b.softmax and b.prior say it now.'
  )


def test_the_page_of_settings_is_that_of_the_declarations():
  """python -m behaviorlm_jax.config > docs/config.md"""
  assert (CONFIGS.parent / 'docs/config.md').read_text() == config_lib.page()


def test_every_field_is_declared_with_what_it_means():
  config = config_lib.default()
  for name, field in config_lib.FIELDS.items():
    assert field.doc.endswith(('.', ',')), name
    assert config_lib.value_of(config, name) == field.default


def test_what_is_none_has_to_be_unset_by_default():
  for name in ('a.content', 'model.remat', 'a.steps', 'lora.rank'):
    with pytest.raises(InputError, match=rf'^{name} is None; its default is'):
      config_lib.check(changed(**{name: None}))
  config_lib.check(changed(b__steps=None))
