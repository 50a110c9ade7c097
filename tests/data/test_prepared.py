"""A log that is prepared in shards is the one that one machine prepares."""

import shutil

import pytest

from behaviorlm_jax import config as config_lib
from behaviorlm_jax import run as run_lib
from behaviorlm_jax.cluster import preemption, workspace
from behaviorlm_jax.data import prepared
from behaviorlm_jax.data.log import reader
from behaviorlm_jax.errors import InputError


@pytest.fixture
def log(tmp_path, make_log):
  return make_log(tmp_path / 'log.csv', users=7)


@pytest.fixture
def config_of(log):
  """The config of the log, with some fields changed."""

  def make(fields=()):
    config = config_lib.default()
    config.update_from_flattened_dict({'data.events': str(log)} | dict(fields))
    return config

  return make


@pytest.fixture
def shards(tmp_path, config_of):
  """Prepares some parts and returns the work directory."""

  def prepare(*parts, fields=()):
    for part in parts:
      config = config_of({'data.shard': part} | dict(fields))
      config_lib.check(config)
      prepared.prepare_part(config, tmp_path / 'work')
    return workspace.local(tmp_path / 'work')

  return prepare


def test_shards_are_joined_to_what_one_machine_prepares(
  tmp_path, config_of, shards, log
):
  config = config_of()
  joint = shards('2/3', '0/3', '1/3', '1/3')  # Again: nothing to do.
  config.data.events = str(log.rename(tmp_path / 'moved.csv'))
  joined = prepared.load_events(config, joint)
  whole = prepared.load_events(config, workspace.local(tmp_path / 'whole'))
  assert joined.fingerprint == whole.fingerprint
  prepared.load_events(config, joint)  # And opened again.
  shutil.rmtree(joint.folder / 'events.shards')
  shards('0/3')  # Nothing is left to prepare.
  assert not (joint.folder / 'events.shards').exists()


@pytest.mark.parametrize(
  'parts, sentence',
  [
    (['0/3', '2/3'], r'holds 2 of 3 shards and lacks 1; .*shard=1/3'),
    (['0/3', '1/3', '2/3', '0/2'], 'shards of 2 and of 3 parts'),
  ],
)
def test_shards_that_are_not_all_there_are_refused(config_of, shards, parts, sentence):
  joint = shards(*parts)
  with pytest.raises(InputError, match=sentence):
    prepared.load_events(config_of(), joint)
  assert not (joint.folder / 'events').exists()


@pytest.mark.parametrize(
  'fields, sentence',
  [
    ({}, r'0-of-1 was made of another log .*: log_sha256 '),
    ({'data.split': (0.6, 0.2, 0.2)}, r'data\.split \(\[0\.6, 0\.2, 0\.2\], now'),
  ],
)
def test_a_shard_of_another_log_or_config_is_refused(
  config_of, shards, log, fields, sentence
):
  joint = shards('0/1', fields=fields)
  if not fields:
    log.write_text(log.read_text() + 'u1,2024-02-01 10:00,a\n')
  with pytest.raises(InputError, match=sentence):
    prepared.load_events(config_of(), joint)
  with pytest.raises(InputError, match=sentence):
    shards('0/1')


def test_shards_need_one_duckdb_and_who_joins_them_need_not_have_it(
  config_of, shards, monkeypatch
):
  joint = shards('0/2')
  monkeypatch.setattr(prepared.duckdb, '__version__', '99')
  shards('1/2')
  with pytest.raises(InputError, match=r"1-of-2 was made of .* duckdb \('99'"):
    prepared.load_events(config_of(), joint)
  shutil.rmtree(joint.folder / 'events.shards/0-of-2')
  shards('0/2')
  monkeypatch.setattr(prepared.duckdb, '__version__', '100')
  assert len(prepared.load_events(config_of(), joint).users)


def test_a_run_with_a_shard_asks_for_nothing_but_the_log_and_ends(tmp_path, config_of):
  config = config_of(
    {
      'data.shard': '1/2',
      'stages': ('b',),
      'init_from': str(tmp_path / 'none'),
      'model.address': 'hf://no/model',
    }
  )
  run_lib.run(config, tmp_path / 'work')
  found = sorted(p.name for p in (tmp_path / 'work').rglob('*') if p.is_dir())
  assert found == ['1-of-2', 'events.shards']


@pytest.mark.parametrize('text', ['3', '3/3', '-1/3', 'a/3', '0/0', '1/2/3'])
def test_a_shard_that_is_none_is_refused(config_of, text):
  with pytest.raises(InputError, match=r"data\.shard is '.*'; give i/n"):
    config_lib.check(config_of({'data.shard': text}))


def test_a_shard_has_one_process(config_of):
  fields = {'data.shard': '0/2', 'distributed.coordinator': 'auto'}
  with pytest.raises(InputError, match=r'data\.shard.*distributed\.coord'):
    config_lib.check(config_of(fields))


@pytest.mark.parametrize(
  'asked, error', [(True, preemption.Preempted), (False, RuntimeError)]
)
def test_a_stop_while_duckdb_works_is_a_stop(
  tmp_path, monkeypatch, config_of, asked, error
):
  def interrupt(*args):
    monkeypatch.setattr(preemption, '_requested', asked)
    raise RuntimeError('Query interrupted')

  monkeypatch.setattr(reader, 'read_rows', interrupt)
  with pytest.raises(error):
    run_lib.run(config_of({'data.shard': '1/2'}), tmp_path / 'work')
  assert not list((tmp_path / 'work' / 'events.shards').iterdir())
