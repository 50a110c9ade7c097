"""A bucket, held by an emulator in this process, as a work directory."""

import shutil
import socket
import time

import pytest
from gcp_storage_emulator import server as emulator

from behaviorlm_jax import addresses
from behaviorlm_jax import bucket
from behaviorlm_jax import stages
from behaviorlm_jax import sweep
from behaviorlm_jax import workdir as workdir_lib
from behaviorlm_jax.errors import InputError

STAGES = ('a_tuning', 'b_tuning')


@pytest.fixture(scope='module')
def service():
  """Environment variables that lead to an emulator with the bucket 'logs'."""
  with socket.create_server(('localhost', 0)) as free:
    port = free.getsockname()[1]
  with emulator.create_server('localhost', port, in_memory=True,
                              default_bucket='logs'):
    url = f'http://localhost:{port}'
    yield {'STORAGE_EMULATOR_HOST': url,  # Of gcsfs.
           'TENSORSTORE_GCS_HTTP_URL': url,  # Of Orbax.
           'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
           'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}


@pytest.fixture(autouse=True)
def use(service, monkeypatch, tmp_path):
  for name, value in service.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv('BEHAVIORLM_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(bucket, '_mirror', None)


@pytest.fixture
def address(request):
  """A place in the bucket of each test's own."""
  return f'gs://logs/{request.node.name}'


@pytest.fixture
def mirror(address, tmp_path):
  """Opens a copy of the work directory by name, as one more host."""

  def opened(name):
    copy = bucket.Mirror(bucket.Bucket(address, '--workdir'), tmp_path / name)
    copy.pull()
    return copy
  return opened


def contents(folder):
  return {path.relative_to(folder).as_posix(): path.read_bytes()
          for path in folder.rglob('*') if path.is_file()}


def write(folder, **texts):
  for name, text in texts.items():
    path = folder / name.replace('__', '/')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_one_host_pushes_the_others_pull(mirror):
  one, other = mirror('one'), mirror('other')
  write(one.folder, a='1', b__c='2', b__d='3' * 6_000_000)
  one.push()
  other.pull()
  assert contents(other.folder) == contents(one.folder)
  write(one.folder, a='4')
  shutil.rmtree(one.folder / 'b')
  one.push()
  other.pull()
  assert contents(other.folder) == {'a': b'4'}
  assert not (other.folder / 'b').exists()  # Or it would pass for made.
  assert set(one.bucket.objects()) == {'a', 'contents.txt'}


def test_only_what_changed_is_fetched_and_pushed(mirror, monkeypatch):
  one, moved = mirror('one'), []
  write(one.folder, a='1', b='2')
  one.push()
  for name in ('get', 'put'):
    real = getattr(bucket.Bucket, name)
    monkeypatch.setattr(
        bucket.Bucket, name, lambda self, files, real=real, name=name: (
            moved.append((name, sorted(files.values()))), real(self, files)))
  again = mirror('one')  # The same machine, a later run.
  write(one.folder, b='3')
  one.push()
  again.pull()
  assert moved == [('get', []), ('put', ['b']), ('get', [])]
  mirror('other')
  assert moved[-1] == ('get', ['a', 'b'])


def test_a_push_that_was_cut_short_did_not_happen(mirror, monkeypatch):
  one = mirror('one')
  write(one.folder, a='1')
  one.push()
  write(one.folder, events__part='2', events__config='3')

  def killed(self, name, text):
    raise KeyboardInterrupt
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(bucket.Bucket, 'write', killed)
    one.push()
  assert contents(mirror('other').folder) == {'a': b'1'}
  one.push()
  assert set(contents(mirror('other').folder)) == {
      'a', 'events/part', 'events/config'}


def test_a_copy_of_another_run_becomes_what_the_bucket_holds(mirror, tmp_path):
  write(tmp_path / 'one', a='0', old='1', older__b='2')
  one = mirror('one')
  assert contents(one.folder) == {}
  write(one.folder, a='1')
  one.push()
  write(tmp_path / 'other', a='2', torn__c='3')
  assert contents(mirror('other').folder) == {'a': b'1'}


def test_what_a_user_deleted_in_the_bucket_is_gone(mirror):
  one = mirror('one')
  write(one.folder, a_tuning__plan='1', a='2')
  one.push()
  one.bucket.remove(['a_tuning/plan'])
  assert contents(mirror('other').folder) == {'a': b'2'}


def test_a_file_or_folder_is_fetched_by_its_address(address, mirror, tmp_path):
  one = mirror('one')
  write(one.folder, log='user,time\n', model__config='{}', model__rest__b='1')
  one.push()
  path = addresses.resolve(f'{address}/log', 'data.events')
  assert (path.name, path.read_text()) == ('log', 'user,time\n')
  write(one.folder, log='other')
  one.push()
  assert addresses.resolve(f'{address}/log', 'data.events').read_text() == (
      'other')
  folder = addresses.resolve(f'{address}/model/', 'model.address')
  assert contents(folder) == {'config': b'{}', 'rest/b': b'1'}


@pytest.mark.parametrize('place, match', [
    ('gs://logs/nothing.csv', 'data.events: there is nothing at gs://logs/n'),
    ('gs://other/log.csv', 'data.events: gs://other/log.csv refuses '
     r'\(FileNotFoundError: .*; see that the bucket exists'),
    ('gs://', "data.events: 'gs://' names no bucket")])
def test_what_is_not_there_is_said(place, match):
  with pytest.raises(InputError, match=match):
    addresses.resolve(place, 'data.events')


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'gcsfs', None)
  with pytest.raises(InputError, match=r"needs gcsfs; run pip install -e '\.\["
                     r"gcs\]', or give a local"):
    addresses.resolve('gs://logs/log.csv', 'data.events')


def test_a_bucket_that_refuses_ends_the_run_before_it_begins(make_run_config):
  with pytest.raises(InputError, match='--workdir: gs://other/run refuses'):
    stages.run(make_run_config(), 'gs://other/run')


def test_a_sweep_wants_a_local_folder():
  with pytest.raises(InputError, match='gs://logs/s lies in a bucket'):
    sweep.run_all(None, 'gs://logs/s')


def test_shards_that_are_prepared_at_once_all_count(
    make_run_config, address, held, monkeypatch):
  for index in ('0', '1'):
    monkeypatch.setattr(bucket, '_mirror', None)
    stages.run(make_run_config({'data.shard': f'{index}/2'}), address)
  assert {path.name for path in (held() / 'events.shards').iterdir()} == {
      '0-of-2', '1-of-2'}
  monkeypatch.setattr(bucket, '_mirror', None)
  config = make_run_config()
  workdir = workdir_lib.make(address)
  joined = workdir_lib.open_events(config, workdir)
  whole = workdir_lib.open_events(config, workdir.parent / 'whole')
  assert joined.fingerprint == whole.fingerprint
  assert (held() / 'events/summary.json').exists()


@pytest.fixture
def held(address, mirror):
  """The work directory in the bucket, as a new machine would have it."""
  return lambda: mirror('held').folder


@pytest.mark.slow
def test_a_run_of_two_hosts_is_killed_and_goes_on_on_other_machines(
    start_two, service, address, held, tmp_path, assert_same_numbers):
  cache = tmp_path / 'cache'
  environment = service | {'BEHAVIORLM_CACHE': str(cache)}
  process = start_two(address, environment=environment)
  deadline = time.monotonic() + 200
  finished = bucket.Bucket(f'{address}/a_tuning/checkpoints', '--workdir')
  saved = '3/commit_success.txt'
  while process.poll() is None and time.monotonic() < deadline and (
      saved not in finished.objects()):
    time.sleep(0.05)
  assert process.poll() is None, process.finish()[1][-3000:]
  process.kill_all()
  process.finish()
  assert saved in finished.objects()
  assert not (held() / 'a_tuning/evaluation.json').exists()
  shutil.rmtree(cache)  # The machine is gone.

  code, err = start_two(address, environment=environment).finish()
  assert code == 0, err[-3000:]
  assert f'report: {address}/report.html' in err
  assert err.count(str(cache)) == err.count(f'is worked on in {cache}') == 2
  assert_same_numbers(held())
  # Processes on one machine have copies of their own, which are the same.
  one, other = (folder for folder in (cache / 'buckets').iterdir())
  assert contents(one) == contents(other) == contents(held())
