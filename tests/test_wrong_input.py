"""Wrong input ends a run with one sentence and leaves nothing half-written.

What the sentences of single modules say is tested with those modules; here
whole runs meet wrong input.
"""

import copy
import json
import logging
import shutil
import struct
import zipfile

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from behaviorlm_jax import addresses
from behaviorlm_jax import config as config_lib
from behaviorlm_jax import stages
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import families
from behaviorlm_jax.model import weights

HEADER = 'user,time,behavior'
ROW = 'u,2024-01-01 10:{:02d},{}'
ADAPTER = 'adapter/adapter_model.safetensors'

pytestmark = pytest.mark.usefixtures('compile_once')


@pytest.fixture
def run(make_run_config, tmp_path):
  """Runs stages in this process, in a new work directory by default."""

  def run(fields=None, workdir=None, only=None, ablations=()):
    config = make_run_config(fields)
    if only:
      config.stages = (only,)
    stages.run(config_lib.ablate(config, ablations),
               workdir or tmp_path / 'work')
  return run


@pytest.fixture
def refused(run, tmp_path):
  """The run ends with one sentence that matches; `left` is all it leaves."""

  def check(match, fields=None, left=(), **options):
    with pytest.raises(InputError, match=match) as caught:
      run(fields, **options)
    assert '\n' not in str(caught.value)
    if 'workdir' not in options:
      work = tmp_path / 'work'
      assert {path.name for path in work.glob('*')} == set(left)
      assert not list(work.rglob('*.tmp'))
  return check


@pytest.fixture
def log_of(tmp_path):
  """A log of the lines, as config fields."""

  def write(lines, header=HEADER):
    path = tmp_path / 'log.csv'
    path.write_text('\n'.join([*([header] if header else []), *lines]))
    return {'data.events': str(path)}
  return write


def write_model(folder, seed=0):
  """A tiny Llama as a Hugging Face folder whose tokenizer has no template."""
  base = weights.open_base('random://tiny')
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps({
      'model_type': 'llama', 'vocab_size': 384, 'hidden_size': 64,
      'intermediate_size': 128, 'num_hidden_layers': 2, 'head_dim': 16,
      'num_attention_heads': 4, 'num_key_value_heads': 2,
      'rope_theta': 10000.0, 'rms_norm_eps': 1e-5,
      'tie_word_embeddings': True}))
  tokenizer = copy.deepcopy(base.tokenizer)
  tokenizer.chat_template = None
  tokenizer.save_pretrained(folder)
  rng = np.random.default_rng(seed)
  safetensors_numpy.save_file(
      {name: rng.standard_normal(shape, np.float32) * np.float32(0.02)
       for name, shape in families.hf_shapes(base.config)},
      folder / 'model.safetensors')
  return folder


# The log.


def test_missing_log(refused, tmp_path):
  path = str(tmp_path / 'no.csv')
  refused(r'data\.events: .*no\.csv.* does not exist', {'data.events': path})
  refused(r'data\.events is empty', {'data.events': ''})


def test_empty_log(refused, log_of):
  refused(r'log\.csv', log_of([], header=''))
  refused(r'log\.csv holds no rows', log_of([]))


def test_missing_column(refused, log_of):
  lines = [ROW.format(i, 'ab'[i % 2]) for i in range(20)]
  refused('behavior', log_of(lines, header='user,time,action'))


def test_too_many_malformed_rows(refused, log_of):
  lines = [ROW.format(i, 'ab'[i % 2]) for i in range(20)]
  lines[6] = 'u,yesterday,a'
  refused(r'log\.csv line 8: .*1 of 20 rows', log_of(lines))


@pytest.mark.parametrize('name, what', [
    ('', 'is empty'), ('x' * 257, 'has 257 characters')])
def test_unusable_behavior_name(refused, log_of, name, what):
  lines = [ROW.format(i, 'ab'[i % 2]) for i in range(20)]
  lines[4] = ROW.format(4, name)
  refused(rf'log\.csv line 6: the behavior name {what}', log_of(lines))


def test_fewer_than_two_behaviors(refused, log_of):
  # Repeats would be one event.
  fields = {'data.collapse_repeats': False}
  lines = [ROW.format(i, 'home') for i in range(20)]
  refused(r"1 behavior, 'home'", log_of(lines) | fields)


def test_wheel_with_another_checksum(refused, tmp_path, monkeypatch):
  def download(wanted, folder):
    with zipfile.ZipFile(folder / 'toy-1.0.whl', 'w') as wheel:
      wheel.writestr('log.csv', HEADER)
    return folder / 'toy-1.0.whl'

  monkeypatch.setattr(addresses, '_download', download)
  monkeypatch.setenv('BEHAVIORLM_CACHE', str(tmp_path / 'cache'))
  address = f'pypi://toy==1.0/log.csv#sha256={"0" * 64}'
  refused('0{64} is expected', {'data.events': address})
  assert not [p for p in (tmp_path / 'cache').rglob('*') if p.is_file()]


# Model and conversations: the events stand complete, nothing else does.


def test_model_that_does_not_exist(refused, tmp_path):
  refused(r'model\.address: .*does not exist',
          {'model.address': str(tmp_path / 'none')}, left=['events'])


def test_corrupt_safetensors(refused, tmp_path):
  folder = write_model(tmp_path / 'model')
  file = folder / 'model.safetensors'
  whole = file.read_bytes()
  file.write_bytes(whole[:-100])
  fields = {'model.address': str(folder)}
  refused('corrupt or truncated', fields, left=['events'])
  file.write_bytes(struct.pack('<Q', len(whole) + 1) + whole[8:])
  refused('its header should take', fields, left=['events'])


def test_corrupt_gguf(refused, tmp_path):
  file = tmp_path / 'model.gguf'
  file.write_bytes(b'GGUF' + struct.pack('<IQQ', 3, 5, 5) + b'\0' * 50)
  refused(r'model\.gguf', {'model.address': str(file)}, left=['events'])


def test_conversation_without_assistant_turn(refused, run_fields, tmp_path):
  good = open(run_fields['data.conversations']).readline()
  path = tmp_path / 'talk.jsonl'
  path.write_text(good + json.dumps(
      {'messages': [{'role': 'user', 'content': 'Hello?'}]}) + '\n')
  refused(r'talk\.jsonl line 2: .*without an assistant',
          {'data.conversations': str(path)}, left=['events'])


def test_a_mended_field_runs_in_the_same_work_directory(
    run, refused, tmp_path, copy_run, run_fields):
  """As long as nothing but the events stands, only what made them is fixed."""
  wrong = tmp_path / 'wrong.jsonl'
  wrong.write_text('{}\n')
  fields = {'data.conversations': str(wrong)}
  workdir = copy_run('base', 'a_tuning', 'b_tuning', 'baselines.json')
  (workdir / 'events/config.json').unlink()
  refused('wrong.jsonl line 1', fields, workdir=workdir)
  run({'data.conversations': run_fields['data.conversations']}, workdir,
      ablations=['no_balanced_stage'])


# Stages and work directories.


def test_work_directory_of_another_config(refused, copy_run):
  workdir = copy_run()
  refused(r'a_tuning/config\.json .*train\.learning_rate \(0\.001, now 0\.5\)',
          {'train.learning_rate': 0.5}, workdir=workdir)
  refused(r'seed \(0, now 1\)', {'seed': 1}, workdir=workdir)
  # Stage b alone may train otherwise, but not on another model.
  refused(r'lora\.rank \(4, now 8\)', {'lora.rank': 8}, workdir=workdir,
          only='b')


def test_stage_b_without_stage_a(refused, tmp_path):
  refused(r'no finished a_tuning/adapter', only='b')
  refused(r'nowhere \(init_from\)', {'init_from': str(tmp_path / 'nowhere')},
          only='b')


def test_plan_of_another_log(refused, copy_run, make_log, run_fields,
                             tmp_path):
  workdir = copy_run('a_tuning/evaluation.json', 'b_tuning', 'events')
  # The same path holds another log now, and its events are to be made anew.
  log = tmp_path / 'log.csv'
  make_log(log, seed=1)
  for name in ('base', 'a_tuning'):
    path = workdir / name / 'config.json'
    path.write_text(path.read_text().replace(
        run_fields['data.events'], str(log)))
  refused(r'a_tuning/plan\.parquet was made from other events',
          {'data.events': str(log)}, workdir=workdir)


def test_difficulty_of_another_model(refused, copy_run):
  workdir = copy_run('b_tuning/evaluation.json', 'b_tuning/plan.parquet')
  file = workdir / 'a_tuning' / ADAPTER
  tensors = safetensors_numpy.load_file(file)
  safetensors_numpy.save_file({k: v * 2 for k, v in tensors.items()}, file)
  refused(r'difficulty\.parquet was made from .*another model',
          workdir=workdir)


def test_loss_that_is_not_a_number(run, copy_run, read_rows):
  workdir = copy_run('a_tuning', 'b_tuning')
  # Adam's first update has this size and overflows.
  fields = {'train.learning_rate': 3e38, 'checkpoint.every': 1}
  with pytest.raises(InputError, match=(
      r'a_tuning: the loss of step (\d) is (nan|inf); the checkpoint of step 1 '
      r'stays\. Lower train\.learning_rate \(3e\+38\)')):
    run(fields, workdir)
  folder = workdir / 'a_tuning'
  assert [p.name for p in (folder / 'checkpoints').iterdir()
          if p.name.isdigit()] == ['1']
  assert [row['step'] for row in read_rows(folder / 'metrics.jsonl')] == [1]
  assert not (folder / 'adapter').exists()


# Warnings: the run goes on.


@pytest.fixture(scope='module')
def odd_input(tmp_path_factory, make_log):
  """A log without tail, with a behavior of the test split; a plain model."""
  folder = tmp_path_factory.mktemp('odd')
  path = make_log(folder / 'log.csv')
  text = path.read_text().replace('airport', 'gym').replace('hotel', 'cafe')
  lines = text.splitlines()
  lines[-1] = lines[-1].rpartition(',')[0] + ',surprise'
  path.write_text('\n'.join(lines) + '\n')
  model = write_model(folder / 'model')
  return {'data.events': str(path), 'model.address': str(model)}


def test_odd_input_is_warned_of_and_runs(odd_input, run, tmp_path, caplog):
  work = tmp_path / 'work'
  with caplog.at_level(logging.WARNING):
    run(odd_input, ablations=['no_balanced_stage'])
  assert 'no tail behavior' in caplog.text
  assert 'only in the test split: 1' in caplog.text
  assert 'has no chat template' in caplog.text
  labels = json.loads((work / 'a_tuning/labels.json').read_text())
  assert {label['name'] for label in labels} == {'home', 'work', 'gym', 'cafe'}
  assert (work / 'report.md').exists()
  # The same address holds another model now: its plan is not taken.
  (work / 'a_tuning/evaluation.json').unlink()
  write_model(work.parents[0] / 'model', seed=1)
  shutil.copy(work.parents[0] / 'model/model.safetensors',
              odd_input['model.address'])
  with pytest.raises(InputError, match=r'plan\.parquet .*another model'):
    run(odd_input, ablations=['no_balanced_stage'])


# The command: exit status and one line.


@pytest.mark.parametrize('fields, environment, sentence', [
    ({'plan.window_size': 3}, {},
     r'no field plan.window_size (did you mean plan.window?)'),
    ({}, {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'},
     'train.batch is 2 and mesh.data x mesh.fsdp is 8')])
def test_the_command_ends_with_one_line(
    run_command, tmp_path, fields, environment, sentence):
  done = run_command(tmp_path / 'work', fields, environment=environment)
  assert done.returncode not in (0, 75)
  (line,) = [line for line in done.stderr.splitlines() if 'error' in line]
  assert line.startswith('error: ')
  assert sentence in line
  assert 'Traceback' not in done.stderr + done.stdout
  assert not list((tmp_path / 'work').glob('*'))


def test_unknown_ablation_is_refused_by_name(run):
  with pytest.raises(InputError, match='did you mean no_balance'):
    run(ablations=['no_balanc'])
