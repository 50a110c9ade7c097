"""What a config leaves open is settled once for a work directory."""

import json

import pytest

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.cluster import ownership, processor
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
  del values['score']['softmax']
  path.write_text(json.dumps(values))
  with pytest.raises(InputError, match=r'score\.softmax \(not there, now'):
    ownership.check_config(config, tmp_path)


def test_scores_follow_the_model_unless_told_otherwise(tmp_path, make_config, machine):
  machine('bfloat16')
  config = ownership.pin(make_config(**{'model.dtype': 'float32'}), tmp_path)
  assert (config.model.dtype, config.score.dtype) == ('float32', 'float32')
  config = ownership.pin(make_config(**{'score.dtype': 'float32'}), tmp_path)
  assert (config.model.dtype, config.score.dtype) == ('bfloat16', 'float32')
