"""Whole runs on a random tiny model: log, settings, and one finished run for
each of pytest's workers.

Compiled programs are shared between a worker's runs through JAX's cache on
disk, which stores what was compiled: runs are faster and their bits the same.
LLVM optimises none of them, here and in the processes that tests start: most
run for milliseconds and are compiled for seconds. To have them as users do, set
XLA_FLAGS=--xla_backend_optimization_level=3.
"""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# Before JAX is loaded; in front, so that a caller's own flag wins.
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0 ' + os.environ.get(
  'XLA_FLAGS', ''
)

import jax
import numpy as np
import pytest
import torch
import transformers
from jax.experimental.compilation_cache import compilation_cache
from pyarrow import parquet
from safetensors import numpy as safetensors_numpy

from behaviorlm_jax import ablations as ablations_lib
from behaviorlm_jax import config as config_lib
from behaviorlm_jax import run as run_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import families, weights

sys.path.append(str(Path(__file__).parents[1] / 'benchmarks'))

import tiny

ROOT = Path(__file__).parents[1]
# JAX's settings and their names in the environment.
CACHE = {
  'jax_persistent_cache_min_compile_time_secs': 0,
  'jax_persistent_cache_min_entry_size_bytes': 0,
}


def write_conversations(path):
  """Short ones, so that byte tokens fit a row."""
  with path.open('w') as file:
    for i in range(6):
      turns = [
        {'role': 'user', 'content': f'{i} and 1?'},
        {'role': 'assistant', 'content': f'That is {i + 1}.'},
      ]
      file.write(json.dumps({'messages': turns}) + '\n')
  return path


def write_model(folder, seed=0):
  """A tiny Llama as a Hugging Face folder whose tokenizer has no template."""
  base = weights.open_base('random://tiny')
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(
    json.dumps(
      {
        'model_type': 'llama',
        'vocab_size': 384,
        'hidden_size': 64,
        'intermediate_size': 128,
        'num_hidden_layers': 2,
        'head_dim': 16,
        'num_attention_heads': 4,
        'num_key_value_heads': 2,
        'rope_theta': 10000.0,
        'rms_norm_eps': 1e-5,
        'tie_word_embeddings': True,
      }
    )
  )
  tokenizer = copy.deepcopy(base.tokenizer)
  tokenizer.chat_template = None
  tokenizer.save_pretrained(folder)
  rng = np.random.default_rng(seed)
  safetensors_numpy.save_file(
    {
      name: rng.standard_normal(shape, np.float32) * np.float32(0.02)
      for name, shape in families.hf_shapes(base.config)
    },
    folder / 'model.safetensors',
  )
  return folder


@pytest.fixture(scope='session')
def make_llama(tmp_path_factory):
  """(tied, spread) -> a tiny Llama in torch, and its base as we open it."""

  def make(tied, spread):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
      transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        max_position_embeddings=512,
      )
    )
    for parameter in model.parameters():  # Norms would all be ones.
      torch.nn.init.normal_(parameter, std=spread if parameter.ndim == 2 else 1)
    folder = tmp_path_factory.mktemp('llama')
    model.save_pretrained(folder)
    weights.open_base('random://tiny').tokenizer.save_pretrained(folder)
    return model.eval(), weights.open_base(str(folder))

  return make


@pytest.fixture(scope='session')
def llama(make_llama):
  """The torch model and the opened base of the same random weights."""
  return make_llama(tied=False, spread=0.3)


@pytest.fixture(scope='session')
def brute_force():
  """One forward pass of transformers per prompt and name."""

  def score(model, prompts, names):
    with torch.no_grad():
      return np.array(
        [[score_one(model, prompt, name) for name in names] for prompt in prompts]
      )

  return score


def score_one(model, prompt, name):
  """log p(name | prompt), both token ids."""
  tokens = torch.tensor([[*prompt, *name]])
  logits = model(tokens).logits[0, len(prompt) - 1 : -1]
  scores = torch.log_softmax(logits, -1)
  return float(scores[range(len(name)), list(name)].sum())


@pytest.fixture(scope='session')
def steps():
  return tiny.STEPS


@pytest.fixture(scope='session')
def make_log():
  return tiny.write_log


@pytest.fixture(scope='session', name='write_model')
def _write_model():
  return write_model


@pytest.fixture(scope='session')
def run_fields(tmp_path_factory):
  """{dotted name: value} of what the finished run has other than the defaults."""
  folder = tmp_path_factory.mktemp('input')
  return tiny.FIELDS | {
    'data.events': str(tiny.write_log(folder / 'log.csv')),
    'data.conversations': str(write_conversations(folder / 'talk.jsonl')),
  }


@pytest.fixture(scope='session')
def make_run_config(run_fields):
  """The config of a whole run, some fields changed, as a script would."""

  def make(fields=None, config=None):
    config = config or config_lib.default()
    config.update_from_flattened_dict(run_fields | (fields or {}))
    return config

  return make


@pytest.fixture(scope='session')
def compiled(tmp_path_factory):
  """Folder of the compiled programs of all runs."""
  return tmp_path_factory.mktemp('compiled')


@pytest.fixture
def compile_once(compiled):
  """This process takes compiled programs from the folder, too."""
  changed = CACHE | {'jax_compilation_cache_dir': str(compiled)}
  before = {name: getattr(jax.config, name) for name in changed}
  for settings in (changed, before):
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    if settings is changed:
      yield


@pytest.fixture(scope='session')
def command_environment(compiled):
  cache = {name.upper(): str(value) for name, value in CACHE.items()}
  return (
    os.environ
    | cache
    | {'PYTHONPATH': str(ROOT), 'JAX_COMPILATION_CACHE_DIR': str(compiled)}
  )


@pytest.fixture(scope='session')
def field_flags(run_fields):
  """Flags of the finished run, with some settings changed."""
  return lambda fields=(): [
    f'--config={tiny.__file__}',
    *(
      f'--config.{name}={value}' for name, value in (run_fields | dict(fields)).items()
    ),
  ]


@pytest.fixture(scope='session')
def run_command(field_flags, command_environment):
  """Runs the command in a process of its own and returns what it left.

  Args of the returned function: workdir; fields: settings to change; program:
  arguments of Python before the flags; environment: variables to add.
  """

  def run(workdir, fields=(), program=('-m', 'behaviorlm_jax.main'), environment=None):
    flags = [*field_flags(fields), f'--workdir={workdir}']
    return subprocess.run(
      [sys.executable, *program, *flags],
      cwd=ROOT,
      env=command_environment | (environment or {}),
      capture_output=True,
      text=True,
      check=False,
      timeout=300,
    )

  return run


@pytest.fixture(scope='session')
def finished(tmp_path_factory, run_command):
  """Work directory of a run of both stages; treat it as read-only."""
  workdir = tmp_path_factory.mktemp('finished') / 'work'
  done = run_command(workdir)
  assert done.returncode == 0, done.stderr[-3000:]
  return workdir


@pytest.fixture
def copy_run(finished, tmp_path):
  """A copy of the finished run without some of its files and folders."""

  def copy(*without, name='work'):
    workdir = tmp_path / name
    shutil.copytree(finished, workdir)
    for path in without:
      assert (workdir / path).exists(), path
      if (workdir / path).is_dir():
        shutil.rmtree(workdir / path)
      else:
        (workdir / path).unlink()
    return workdir

  return copy


@pytest.fixture
def run_stages(make_run_config, tmp_path):
  """Runs stages in this process, in a new work directory by default."""

  def run(fields=None, workdir=None, only=None, ablations=()):
    config = make_run_config(fields)
    if only:
      config.stages = (only,)
    run_lib.run(ablations_lib.ablate(config, ablations), workdir or tmp_path / 'work')

  return run


@pytest.fixture
def refused(run_stages, tmp_path):
  """The run ends with one sentence that matches; `left` is all it leaves."""

  def check(match, fields=None, left=(), **options):
    with pytest.raises(InputError, match=match) as caught:
      run_stages(fields, **options)
    assert '\n' not in str(caught.value)
    if 'workdir' not in options:
      work = tmp_path / 'work'
      assert {path.name for path in work.glob('*')} == set(left)
      assert not list(work.rglob('*.tmp'))

  return check


@pytest.fixture(scope='session')
def read_rows():
  """Rows of a JSON-lines file."""
  return lambda path: [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='session')
def start_two(field_flags, command_environment, tmp_path_factory):
  """Starts launch/local.sh with two processes; its Popen, with `finish`
  and `kill_all`.

  `flags`: of both; `environment`: variables to add. `finish()` returns its code
  and what was said; whoever runs in the end is stopped.
  """
  started = []

  def start(workdir, *flags, environment=None):
    command = [str(ROOT / 'launch/local.sh'), '2', *field_flags()]
    command += [f'--workdir={workdir}', *flags]
    said = tmp_path_factory.mktemp('said') / 'err'
    with said.open('w') as err:
      process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=err,
        env=command_environment | {'PYTHON': sys.executable} | (environment or {}),
        start_new_session=True,
      )
    started.append(process)

    def finish():
      process.wait(timeout=300)
      return process.returncode, said.read_text()

    process.finish = finish
    process.kill_all = lambda: os.killpg(process.pid, signal.SIGKILL)
    return process

  yield start
  for process in started:
    if process.poll() is None:
      process.terminate()


@pytest.fixture(scope='session')
def run_two(start_two):
  """The same, to its end: (code, stderr)."""

  def run(*arguments, **options):
    return start_two(*arguments, **options).finish()

  return run


def _plan_rows(folder):
  return parquet.read_table(folder / 'plan.parquet')['segments'].to_pylist()


@pytest.fixture
def assert_same_numbers(finished, read_rows, steps):
  """The run ended as the finished one of a single device did, but for rounding;
  `workdir`."""

  def check(workdir):
    for stage in ('a_tuning', 'b_tuning'):
      one, other = finished / stage, workdir / stage
      assert _plan_rows(one) == _plan_rows(other)
      losses, expected = (
        [
          (row['step'], row['loss'], row.get('val_loss', 0.0))
          for row in read_rows(folder / 'metrics.jsonl')
        ]
        for folder in (other, one)
      )
      assert len(losses) == steps  # Written once.
      np.testing.assert_allclose(losses, expected, rtol=1e-4)
      found, expected = (
        json.loads((folder / 'evaluation.json').read_text()) for folder in (other, one)
      )
      for group in ('all', 'anchor', 'tail'):
        assert found[group] == pytest.approx(expected[group], abs=1e-4)
      found, expected = (
        parquet.read_table(folder / 'log_p').sort_by('sample')['log_p'].to_pylist()
        for folder in (other, one)
      )
      np.testing.assert_allclose(found, expected, atol=1e-4)

  return check
