"""Small logs, and a tokenizer whose ids are the byte values."""

import datetime

import numpy as np
import pytest
import tokenizers
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data import events, prompts
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.data.log import splits
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import weights

HEADER = 'user,time,behavior'
CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content']"
  " + '<|im_end|>' + '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_config(**fields):
  """The whole config, with fields like plan__window=8 changed."""
  config = config_lib.default()
  config.data.instruction = 'Go on.'
  config.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in fields.items()}
  )
  return config


def make_log_config(**fields):
  data = config_lib.default().data
  for name, value in fields.items():
    section = data.columns if name in data.columns else data
    section[name] = value
  return data


def make_minute(i: int) -> str:
  start = datetime.datetime(2024, 1, 1)
  return str(start + datetime.timedelta(minutes=i))[:16]


@pytest.fixture
def log_config():
  """The `data` section of a config, with some fields changed."""
  return make_log_config


@pytest.fixture
def minute():
  """The i-th minute of 2024 as text."""
  return make_minute


@pytest.fixture
def history():
  def lines(behaviors, user='u'):
    """CSV lines of one user, a minute apart."""
    return [f'{user},{make_minute(i)},{name}' for i, name in enumerate(behaviors)]

  return lines


@pytest.fixture
def prepare():
  def write_and_read(tmp_path, lines, name='log.csv', seed=0, header=HEADER, **fields):
    """Events, summary and folder of a log of these lines."""
    path = tmp_path / name
    path.write_text('\n'.join([header, *lines]) + '\n')
    folder = tmp_path / 'work' / 'events'
    summary = events.prepare(make_log_config(**fields), str(path), folder, seed)
    return events.open_events(folder), summary, folder

  return write_and_read


@pytest.fixture
def refuse(prepare):
  def check(tmp_path, lines, *parts, **fields):
    """The log is refused in one line that has the parts; nothing is left."""
    with pytest.raises(InputError) as error:
      prepare(tmp_path, lines, **fields)
    sentence = str(error.value)
    for part in parts:
      assert part in sentence
    assert '\n' not in sentence
    assert not list((tmp_path / 'work').glob('*'))

  return check


@pytest.fixture
def names():
  """The behavior names of events, in their order."""
  return lambda log: [log.behaviors[i].name for i in log.behavior]


@pytest.fixture
def chatml():
  """The template of `make_tokenizer`."""
  return CHATML


@pytest.fixture(scope='session')
def byte_tokenizer():
  """That of the tiny random model; its ids are GPT-2's of bytes."""
  return weights.open_base('random://tiny').tokenizer


@pytest.fixture
def prompts_of(byte_tokenizer):
  """Makes the Prompts of events, with fields of the `data` section changed."""

  def make(events, tokenizer=None, **fields):
    data = make_config().data
    data.update(fields)
    return prompts.Prompts(
      events, tokenizer or byte_tokenizer, data.instruction, data.history, data.weekday
    )

  return make


@pytest.fixture
def make_windows(table, prompts_of):
  """Makes Windows over samples of a table, with fields of a config changed."""

  def make(events=None, split='train', anchors_only=False, **fields):
    config, events = make_config(**fields), events or table
    plan = config.plan
    return plan_lib.Windows(
      prompts_of(events, history=config.data.history),
      samples_lib.of_split(events, split, plan.min_context, anchors_only),
      plan.window,
      plan.targets_per_row,
      config.train.length,
    )

  return make


@pytest.fixture
def make_tokenizer():
  def make(template=CHATML, trim_offsets=False, **special):
    vocab = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False
    )
    tokenizer.post_processor = tokenizers.processors.ByteLevel(
      trim_offsets=trim_offsets
    )
    tokenizer.add_special_tokens(['<|im_start|>', '<|im_end|>', '<eos>'])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    return fast

  return make


@pytest.fixture
def table(make_events):
  """Four users, 157 events, 80 % of them for training; one user is short."""
  generator = np.random.default_rng(0)
  p = [0.4, 0.3, 0.2, 0.05, 0.03, 0.02]
  histories = [
    ''.join(generator.choice(list('abcxyz'), size, p=p)) for size in (60, 5, 12, 80)
  ]
  return make_events(histories, train=0.8, tails='xyz')


@pytest.fixture
def make_events():
  """Makes an event table by hand, without a log."""
  return make_table


def make_table(histories, times=None, places=None, train=1.0, tails=''):
  """Events of users with these behaviors, by default an hour apart from 1970.

  Args:
    histories: a list of names, or a string of one-letter names, per user.
    times: seconds of all events in one list.
    places: names ('' is none) of all events in one list.
    train: share of each history in the training split; the rest is test.
    tails: names of tail behaviors; the others are anchors.
  """
  sizes = [len(history) for history in histories]
  steps = np.concatenate([np.arange(size) for size in sizes])
  user = np.repeat(np.arange(len(sizes)), sizes)
  split = np.where(steps < train * np.array(sizes)[user], 0, 2)
  listed = [name for history in histories for name in history]
  names = sorted(set(listed))
  behavior = np.array([names.index(name) for name in listed], np.int32)
  counts = np.bincount(behavior[split == 0], minlength=len(names)).tolist()
  known = [
    splits.Behavior(
      name,
      listed.count(name),
      count,
      count / sum(counts),
      'tail' if name in tails else 'anchor',
    )
    for name, count in zip(names, counts, strict=True)
  ]
  places = places or [''] * len(listed)
  spots = sorted({*places} - {''})
  return events.Events(
    user=user.astype(np.int32),
    behavior=behavior,
    time=np.array(times if times is not None else steps * 3600, np.int64),
    place=np.array([spots.index(p) if p else -1 for p in places], np.int32),
    split=split.astype(np.int8),
    first=np.arange(len(user)) - steps,
    users=[f'u{i}' for i in range(len(sizes))],
    places=spots,
    behaviors=known,
    fingerprint='by hand',
    known=len(names),
  )
