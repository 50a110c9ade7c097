"""hf:// addresses, against a small hub of our own on this machine.

It speaks as much of the hub's protocol as fetching needs, so that the real
huggingface_hub runs from end to end.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants

from behaviorlm_jax.cluster import ownership
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import addresses
from behaviorlm_jax.io import hub as hub_lib
from behaviorlm_jax.model import families, weights

FIRST, SECOND = '1' * 40, '2' * 40
LOG = b'user,time,behavior\n'
MODEL, SHARDED = 'hf://org/tiny', 'hf://org/sharded'
EVENTS = 'hf://datasets/org/logs/2024/log.csv'
# The codes by which the hub tells its answers apart.
CODES = {401: 'GatedRepo', 404: 'RepoNotFound'}


class Hub:
  """A hub: repositories by URL prefix, each {commit: {path: bytes}}."""

  def __init__(self):
    self.repos = {}
    self.names = {'main': FIRST, 'v2': SECOND}
    self.broken = {}  # prefix: status of every answer about it
    self.requests = []
    self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), self._handler())
    self.url = f'http://127.0.0.1:{self.server.server_port}'
    threading.Thread(
      target=self.server.serve_forever, args=(0.01,), daemon=True
    ).start()

  def close(self):
    self.server.shutdown()
    self.server.server_close()

  def answer(self, path):
    """Status, body and headers of a request."""
    path = path.partition('?')[0].removeprefix('/api').removeprefix('/models')
    parts = path.strip('/').split('/')
    at = 3 if parts[0] == 'datasets' else 2
    repo, rest = '/'.join(parts[:at]), parts[at:]
    verb, revision = rest[:2] if rest else ('info', 'main')
    if status := self.broken.get(repo):
      return status, b'', {'X-Error-Code': CODES.get(status, 'Other')}
    if repo not in self.repos:
      return 404, b'', {'X-Error-Code': 'RepoNotFound'}
    commit = self.names.get(revision, revision)
    if commit not in self.repos[repo]:
      return 404, b'', {'X-Error-Code': 'RevisionNotFound'}
    files = self.repos[repo][commit]
    if verb == 'tree':
      return (
        200,
        json.dumps(
          [
            {'type': 'file', 'path': name, 'size': len(body), 'oid': name}
            for name, body in files.items()
          ]
        ).encode(),
        {},
      )
    if verb == 'resolve':
      return self._file(files, '/'.join(rest[2:]), commit)
    return 200, json.dumps({'id': repo, 'sha': commit}).encode(), {}

  @staticmethod
  def _file(files, name, commit):
    headers = {'X-Repo-Commit': commit}
    if name not in files:
      return 404, b'', headers | {'X-Error-Code': 'EntryNotFound'}
    etag = commit[:3] + name.replace('/', '-')
    return 200, files[name], headers | {'ETag': f'"{etag}"'}

  def _handler(hub):
    class Handler(http.server.BaseHTTPRequestHandler):
      def do_GET(self):
        hub.requests.append(f'{self.command} {self.path}')
        status, body, headers = hub.answer(self.path)
        self.send_response(status)
        for name, value in {**headers, 'Content-Length': len(body)}.items():
          self.send_header(name, str(value))
        self.end_headers()
        if self.command == 'GET':
          self.wfile.write(body)

      do_HEAD = do_GET

      def log_message(self, *args):
        pass

    return Handler


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  """A random Llama of transformers, its files whole and in shards."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=384,
      hidden_size=64,
      intermediate_size=128,
      head_dim=16,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      rms_norm_eps=1e-5,
      tie_word_embeddings=True,
    )
  )
  tokenizer = weights.open_base('random://tiny').tokenizer
  files = {}
  for name, size in {'whole': '1GB', 'shards': '60KB'}.items():
    folder = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder, max_shard_size=size)
    tokenizer.save_pretrained(folder)
    files[name] = {p.name: p.read_bytes() for p in folder.iterdir()}
  return model, files


@pytest.fixture
def hub(llama, tmp_path, monkeypatch):
  """The hub that huggingface_hub talks to; a cache of the test's own."""
  hub = Hub()
  monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
  monkeypatch.setattr(
    constants,
    'HUGGINGFACE_CO_URL_TEMPLATE',
    hub.url + '/{repo_id}/resolve/{revision}/{filename}',
  )
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hf'))
  monkeypatch.delenv('HF_TOKEN', raising=False)
  whole, shards = llama[1]['whole'], llama[1]['shards']
  useless = {
    'pytorch_model.bin': b'x',
    'model.fp16.safetensors': b'x',
    'onnx/model.onnx': b'x',
    'original/model.safetensors': b'x',
  }
  hub.repos['org/tiny'] = {
    FIRST: whole | useless,
    SECOND: whole | {'generation_config.json': b'{ }'},
  }
  hub.repos['org/sharded'] = {FIRST: shards}
  hub.repos['org/pickles'] = {FIRST: {'config.json': b'{}', 'pytorch_model.bin': b'x'}}
  hub.repos['datasets/org/logs'] = {
    FIRST: {'2024/log.csv': LOG},
    SECOND: {'2024/log.csv': LOG + b'u,1,a\n'},
  }
  yield hub
  hub.close()


@pytest.fixture
def refused(hub):
  """The address ends with one sentence that matches."""

  def check(match, address, field='model.address', call=hub_lib.fetch):
    with pytest.raises(InputError, match=match) as caught:
      call(address, field)
    said = str(caught.value)
    assert said.startswith(f'{field}: ') and said.endswith('.')
    assert '\n' not in said

  return check


# What is fetched.


@pytest.mark.parametrize('address', [MODEL, SHARDED])
def test_a_model_is_read_as_transformers_saved_it(hub, llama, address):
  base = weights.open_base(address)
  theirs = llama[0].state_dict()
  ours = weights.read_params(base, np.float32)
  for name in families.parameter_shapes(base.config):
    names = families.LLAMA_NAMES[name]
    values = ours[name] if name.startswith('layers.') else [ours[name]]
    for layer, value in enumerate(values):
      np.testing.assert_array_equal(value, theirs[names.format(layer)].numpy())
  assert len(base.tokenizer) > 256


def test_other_formats_of_the_weights_are_not_fetched(hub, llama):
  folder = addresses.resolve(MODEL, 'model.address')
  assert {p.name for p in folder.rglob('*')} == set(llama[1]['whole'])


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
  for revision, commit in {
    '': FIRST,
    '@main': FIRST,
    '@v2': SECOND,
    f'@{SECOND}': SECOND,
  }.items():
    pinned = hub_lib.pin_commit(MODEL + revision, 'model.address')
    assert pinned == f'{MODEL}@{commit}'
    folder = addresses.resolve(MODEL + revision, 'model.address')
    assert folder == addresses.resolve(pinned, 'model.address')
    text = (folder / 'generation_config.json').read_text()
    assert (text == '{ }') == (commit == SECOND)


def test_one_file_of_a_model_or_data_set(hub):
  for address, commit, rows in (
    (EVENTS, FIRST, 1),
    (EVENTS.replace('logs', 'logs@v2'), SECOND, 2),
  ):
    pinned = hub_lib.pin_commit(address, 'data.events')
    assert pinned == f'hf://datasets/org/logs@{commit}/2024/log.csv'
    path = addresses.resolve(pinned, 'data.events')
    assert path.name == 'log.csv'
    assert len(path.read_text().splitlines()) == rows
  path = addresses.resolve('hf://org/tiny/config.json', 'model.address')
  assert json.loads(path.read_text())['model_type'] == 'llama'


def test_a_pinned_address_in_the_cache_needs_no_hub(hub):
  pinned = [
    hub_lib.pin_commit(MODEL, 'model.address'),
    hub_lib.pin_commit(EVENTS, 'data.events'),
  ]
  paths = [addresses.resolve(a, 'model.address') for a in pinned]
  hub.requests.clear()
  assert [addresses.resolve(a, 'model.address') for a in pinned] == paths
  assert [hub_lib.pin_commit(a, 'model.address') for a in pinned] == pinned
  assert hub.requests == []


def test_an_offline_machine_with_a_cache_goes_on(hub, tmp_path):
  # In processes of their own, as only a fresh one reads the environment.
  program = (
    'import sys; from behaviorlm_jax.io import hub\n'
    'for a in sys.argv[1:]:\n'
    '  a = hub.pin_commit(a, "model.address")\n'
    '  print(a, hub.fetch(a, "model.address"))'
  )
  environment = os.environ | {
    'HF_ENDPOINT': hub.url,
    'HF_HOME': str(tmp_path / 'home'),
    'PYTHONPATH': str(Path(__file__).parents[2]),
  }
  for name in ('HF_HUB_CACHE', 'HF_HUB_OFFLINE', 'HF_TOKEN'):
    environment.pop(name, None)

  def run():
    done = subprocess.run(
      [sys.executable, '-c', program, MODEL, EVENTS],
      env=environment,
      capture_output=True,
      text=True,
      check=False,
      timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  online = run()
  assert f'{MODEL}@{FIRST}' in online and str(tmp_path / 'home') in online
  hub.close()
  assert run() == online


# What is refused.


@pytest.mark.parametrize(
  'address',
  [
    'hf://',
    'hf://tiny',
    'hf://org/',
    'hf://org/tiny/',
    'hf://org/tiny@',
    'hf://org/tiny@/x.gguf',
    'hf://org/tiny@a@b',
    'hf://datasets/logs',
    'hf:///org/tiny',
    'hf://org/ti ny',
    'hf://org/tiny@../x.gguf',
  ],
)
def test_a_malformed_address_is_refused(hub, refused, address):
  refused('is not of the form hf://org/name', address)
  refused('is not of the form hf://org/name', address, call=hub_lib.pin_commit)
  assert hub.requests == []


def test_impossible_names_and_paths_are_refused(hub, refused):
  refused('no valid name', 'hf://org/a--b')
  for path in ('../x', 'a/../x', 'a//x', '/x', 'a\\x'):
    refused('leaves its repository', f'{MODEL}/{path}')
  assert hub.requests == []


def test_a_file_is_needed_where_a_field_takes_no_folder(hub, refused):
  refused('one file is needed', MODEL, 'data.events')
  refused('one file is needed', 'hf://datasets/org/logs')
  assert hub.requests == []


@pytest.mark.parametrize('call', [hub_lib.fetch, hub_lib.pin_commit])
def test_what_the_hub_refuses_is_one_sentence(hub, refused, call):
  refused('no public model .* HF_TOKEN', 'hf://org/unknown', call=call)
  refused('no public dataset', 'hf://datasets/org/tiny/x', 'data.events', call)
  refused("revision 'v9', which does not exist", f'{MODEL}@v9', call=call)
  hub.broken['org/tiny'] = 401
  refused('is gated; ask .* HF_TOKEN', MODEL, call=call)
  hub.broken['org/tiny'] = 403
  refused('HTTP status 403; set HF_TOKEN', MODEL, call=call)
  hub.broken['org/tiny'] = 500
  refused('HTTP status 500; try again later', MODEL, call=call)


def test_missing_files_are_named(hub, refused):
  refused("no file 'none.gguf'", f'{MODEL}/none.gguf')
  refused(
    f'@{FIRST}/2023/log.csv does not exist',
    f'hf://datasets/org/logs@{FIRST}/2023/log.csv',
    'data.events',
  )
  refused('no model.safetensors.*hf://org/pickles/FILE.gguf', 'hf://org/pickles')


@pytest.mark.parametrize('call', [hub_lib.fetch, hub_lib.pin_commit])
def test_no_network_is_one_sentence(hub, refused, call, monkeypatch):
  hub.close()
  refused(f'not be fetched from {hub.url} .ConnectError.* local path', MODEL, call=call)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  refused('OfflineModeIsEnabled', MODEL, call=call)


def test_a_server_that_is_no_hub_is_one_sentence(hub, refused, monkeypatch):
  monkeypatch.setattr(hub, 'answer', lambda path: (200, b'<html>', {}))
  refused('could not be fetched .*JSONDecodeError', MODEL)


# What a work directory keeps.


def test_a_work_directory_keeps_its_commit(hub, make_run_config, tmp_path):
  fields = {
    'model.address': MODEL,
    'data.events': EVENTS,
    'data.conversations': 'talks.jsonl',
  }
  config = make_run_config(fields)
  pinned = ownership.pin(config, tmp_path)
  assert config.model.address == MODEL  # The caller's stays as it is.
  assert pinned.model.address == f'{MODEL}@{FIRST}'
  assert pinned.data.events == f'hf://datasets/org/logs@{FIRST}/2024/log.csv'
  assert pinned.data.conversations == 'talks.jsonl'
  ownership.claim(tmp_path / 'base', pinned, {})
  hub.names['main'] = SECOND
  again = ownership.pin(config, tmp_path)
  assert ownership.as_dict(again) == ownership.as_dict(pinned)
  ownership.check_config(again, tmp_path)
  # A new work directory, another model and another file start from today's.
  new = ownership.pin(config, tmp_path / 'new')
  assert new.model.address == f'{MODEL}@{SECOND}'
  for name, other in {
    'model.address': SHARDED,
    'data.events': 'hf://datasets/org/logs/2025.csv',
  }.items():
    hub.repos['org/sharded'][SECOND] = {}
    changed = ownership.pin(make_run_config(fields | {name: other}), tmp_path)
    with pytest.raises(InputError, match=rf'{name} \(.*{FIRST}.*{SECOND}'):
      ownership.check_config(changed, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures('compile_once')
def test_a_run_resumes_with_the_commit_it_began_with(hub, run_stages, tmp_path):
  work = tmp_path / 'work'
  fields = {'model.address': MODEL}
  run_stages(fields, only='a')
  for folder in ('events', 'base', 'a_tuning'):
    kept = json.loads((work / folder / 'config.json').read_text())
    assert kept['model']['address'] == f'{MODEL}@{FIRST}'
  settings = json.loads((work / 'a_tuning/adapter/adapter_config.json').read_text())
  assert f'hf://{settings["base_model_name_or_path"]}' == MODEL
  assert settings['revision'] == FIRST
  adapter = work / 'a_tuning/adapter/adapter_model.safetensors'
  (work / 'a_tuning/evaluation.json').unlink()
  before = adapter.read_bytes()
  adapter.unlink()
  hub.names['main'] = SECOND
  hub.close()  # And no network any more.
  run_stages(fields, only='a')
  assert adapter.read_bytes() == before
  with pytest.raises(InputError, match=rf'tiny@{FIRST}.*now .*tiny@{SECOND}'):
    run_stages({'model.address': f'{MODEL}@{SECOND}'}, only='a')


@pytest.mark.parametrize(
  'address, expected',
  [
    (f'{MODEL}@{FIRST}', ('org/tiny', FIRST)),
    (MODEL, ('org/tiny', None)),
    ('hf://org/tiny/file.gguf', None),
    ('/a/folder', None),
  ],
)
def test_only_a_whole_model_of_the_hub_has_a_name_for_others(address, expected):
  assert hub_lib.repository(address) == expected
