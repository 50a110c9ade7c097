"""What a config leaves open is settled once for a work directory."""

import json
import shutil

import pytest

from behaviorlm_jax import config as config_lib
from behaviorlm_jax import run as run_lib
from behaviorlm_jax.cluster import ownership, preemption, processor, workspace
from behaviorlm_jax.data import prepared
from behaviorlm_jax.data.log import reader
from behaviorlm_jax.errors import InputError

PRINTS = {'events': 'e', 'base': 'b'}


@pytest.fixture
def make_config():
  def make(**fields):
    config = config_lib.default()
    config.update_from_flattened_dict(fields)
    return config

  return make


@pytest.fixture
def machine(monkeypatch):
  """Sets what this machine multiplies fastest."""
  return lambda dtype: monkeypatch.setattr(
    processor, 'fastest_dtype', lambda backend: dtype
  )


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_auto_is_what_the_machine_multiplies_fastest(
  tmp_path, make_config, machine, dtype
):
  machine(dtype)
  config = ownership.pin(make_config(), tmp_path)
  assert (config.model.dtype, config.score.dtype) == (dtype, dtype)


def test_a_resumed_run_keeps_its_dtype_on_another_machine(
  tmp_path, make_config, machine
):
  machine('bfloat16')
  config = ownership.pin(make_config(), tmp_path)
  ownership.claim(tmp_path / 'a_tuning', config, PRINTS)
  machine('float32')
  config = ownership.pin(make_config(), tmp_path)
  assert (config.model.dtype, config.score.dtype) == ('bfloat16', 'bfloat16')
  ownership.check_config(config, tmp_path)  # Refuses nothing.


def test_stage_b_keeps_the_dtype_of_the_stage_a_it_starts_from(
  tmp_path, make_config, machine
):
  machine('bfloat16')
  origin = tmp_path / 'origin' / 'a_tuning'
  ownership.claim(origin, ownership.pin(make_config(), tmp_path), PRINTS)
  (origin / 'adapter').mkdir()
  (origin / 'adapter' / 'adapter_config.json').write_text('{}')
  machine('float32')
  config = make_config(init_from=str(tmp_path / 'origin'), stages=('b',))
  assert ownership.pin(config, tmp_path / 'new').model.dtype == 'bfloat16'


def test_a_field_that_an_older_version_lacked_is_named(tmp_path, make_config, machine):
  config = ownership.pin(make_config(), tmp_path)
  ownership.claim(tmp_path / 'base', config, PRINTS)
  path = tmp_path / 'base' / 'config.json'
  values = json.loads(path.read_text())
  del values['score']['names_per_pass']
  path.write_text(json.dumps(values))
  with pytest.raises(InputError, match=r'score\.names_per_pass \(not there, now'):
    ownership.check_config(config, tmp_path)


def test_scores_follow_the_model_unless_told_otherwise(tmp_path, make_config, machine):
  machine('bfloat16')
  config = ownership.pin(make_config(**{'model.dtype': 'float32'}), tmp_path)
  assert (config.model.dtype, config.score.dtype) == ('float32', 'float32')
  config = ownership.pin(make_config(**{'score.dtype': 'float32'}), tmp_path)
  assert (config.model.dtype, config.score.dtype) == ('bfloat16', 'float32')


# Shards of a log.


@pytest.fixture
def log(tmp_path, make_log):
  return make_log(tmp_path / 'log.csv', users=7)


@pytest.fixture
def shards(tmp_path, make_config, machine, log):
  """Prepares some of three parts and returns the work directory."""
  machine('float32')

  def prepare(*parts, **fields):
    made = workspace.local(tmp_path / 'work')
    for part in parts:
      config = make_config(**{'data.events': str(log), 'data.shard': part} | fields)
      config_lib.check(config)
      prepared.prepare_part(config, made.folder)
    return made

  return prepare


def test_shards_are_joined_to_what_one_machine_prepares(
  tmp_path, make_config, shards, log
):
  config = make_config(**{'data.events': str(log)})
  joint = shards('2/3', '0/3', '1/3', '1/3')  # Again: nothing to do.
  moved = log.rename(tmp_path / 'moved.csv')
  config.data.events = str(moved)
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
def test_shards_that_are_not_all_there_are_refused(
  make_config, shards, log, parts, sentence
):
  joint = shards(*parts)
  with pytest.raises(InputError, match=sentence):
    prepared.load_events(make_config(**{'data.events': str(log)}), joint)
  assert not (joint.folder / 'events').exists()


@pytest.mark.parametrize(
  'fields, sentence',
  [
    ({}, r'0-of-1 was made of another log .*: log_sha256 '),
    ({'data.split': (0.6, 0.2, 0.2)}, r'data\.split \(\[0\.6, 0\.2, 0\.2\], now'),
  ],
)
def test_a_shard_of_another_log_or_config_is_refused(
  make_config, shards, log, fields, sentence
):
  joint = shards('0/1', **fields)
  if not fields:
    log.write_text(log.read_text() + 'u1,2024-02-01 10:00,a\n')
  config = make_config(**{'data.events': str(log)})
  with pytest.raises(InputError, match=sentence):
    prepared.load_events(config, joint)
  with pytest.raises(InputError, match=sentence):
    shards('0/1')


def test_shards_need_one_duckdb_and_who_joins_them_need_not_have_it(
  make_config, shards, log, monkeypatch
):
  config = make_config(**{'data.events': str(log)})
  joint = shards('0/2')
  monkeypatch.setattr(prepared.duckdb, '__version__', '99')
  shards('1/2')
  with pytest.raises(InputError, match=r"1-of-2 was made of .* duckdb \('99'"):
    prepared.load_events(config, joint)
  shutil.rmtree(joint.folder / 'events.shards/0-of-2')
  shards('0/2')
  monkeypatch.setattr(prepared.duckdb, '__version__', '100')
  assert len(prepared.load_events(config, joint).users)


def test_a_shard_asks_for_nothing_but_the_log(tmp_path, make_config, log):
  config = make_config(
    **{
      'data.events': str(log),
      'data.shard': '0/1',
      'stages': ('b',),
      'init_from': str(tmp_path / 'none'),
      'model.address': 'hf://no/model',
    }
  )
  run_lib.run(config, tmp_path / 'work')
  assert (tmp_path / 'work/events.shards/0-of-1').exists()


@pytest.mark.parametrize('text', ['3', '3/3', '-1/3', 'a/3', '0/0', '1/2/3'])
def test_a_shard_that_is_none_is_refused(make_config, text):
  with pytest.raises(InputError, match=r"data\.shard is '.*'; give i/n"):
    config_lib.check(make_config(**{'data.shard': text}))


def test_a_shard_has_one_process(make_config):
  with pytest.raises(InputError, match=r'data\.shard.*distributed\.coord'):
    config_lib.check(
      make_config(**{'data.shard': '0/2', 'distributed.coordinator': 'auto'})
    )


def test_a_run_with_a_shard_prepares_it_and_ends(tmp_path, make_config, machine, log):
  machine('float32')
  config = make_config(**{'data.events': str(log), 'data.shard': '1/2'})
  run_lib.run(config, tmp_path / 'work')
  found = sorted(p.name for p in (tmp_path / 'work').rglob('*') if p.is_dir())
  assert found == ['1-of-2', 'events.shards']


@pytest.mark.parametrize(
  'asked, error', [(True, preemption.Preempted), (False, RuntimeError)]
)
def test_a_stop_while_duckdb_works_is_a_stop(
  tmp_path, monkeypatch, make_config, machine, log, asked, error
):
  machine('float32')

  def interrupt(*args):
    monkeypatch.setattr(preemption, '_requested', asked)
    raise RuntimeError('Query interrupted')

  monkeypatch.setattr(reader, 'read_rows', interrupt)
  config = make_config(**{'data.events': str(log), 'data.shard': '1/2'})
  with pytest.raises(error):
    run_lib.run(config, tmp_path / 'work')
  assert not list((tmp_path / 'work' / 'events.shards').iterdir())
