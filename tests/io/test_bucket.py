"""A bucket, held by an emulator in this process, as a work directory."""

import shutil
import socket
import threading
import time

import gcsfs
import pytest
from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.handlers import objects
from google.auth import exceptions

from behaviorlm_jax import cli
from behaviorlm_jax import run as run_lib
from behaviorlm_jax.cluster import processes, workspace
from behaviorlm_jax.data import prepared
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import addresses, bucket
from behaviorlm_jax.sweep import jobs

STAGES = ('a_tuning', 'b_tuning')


def one_at_a_time(function):
  """`function`, which no two threads run at once."""
  lock = threading.Lock()

  def locked(*arguments):
    with lock:
      return function(*arguments)

  return locked


def with_generation(download):
  """`download`, whose answer names the generation, as that of a bucket does."""

  def answered(request, response, storage, *arguments):
    download(request, response, storage, *arguments)
    if response.status < 300:
      found = storage.get_file_obj(
        *(request.params[name] for name in ('bucket_name', 'object_id'))
      )
      response['x-goog-generation'] = found['generation']

  return answered


@pytest.fixture(scope='module')
def service():
  """Environment variables that lead to an emulator with the bucket 'logs'."""
  with socket.create_server(('localhost', 0)) as free:
    port = free.getsockname()[1]
  with pytest.MonkeyPatch.context() as patch:
    # A connection that is open and silent must not keep the others waiting, but
    # the storage is not safe for threads: requests are handled one at a time.
    # With each write it also dumps a list of all objects, which nobody reads.
    patch.setattr(emulator.server, 'HTTPServer', emulator.server.ThreadingHTTPServer)
    patch.setattr(emulator.Router, 'handle', one_at_a_time(emulator.Router.handle))
    patch.setattr(emulator.Storage, '_write_config_to_file', lambda self: None)
    # TensorStore writes under the condition that what it read is still there.
    patch.setattr(objects, 'download', with_generation(objects.download))
    started = emulator.create_server(
      'localhost', port, in_memory=True, default_bucket='logs'
    )
    started.start()
    url = f'http://localhost:{port}'
    yield {
      'STORAGE_EMULATOR_HOST': url,  # Of gcsfs.
      'TENSORSTORE_GCS_HTTP_URL': url,  # Of Orbax.
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
      'NO_GCE_CHECK': 'true',  # No credentials to wait for.
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }
    started.stop()


@pytest.fixture(autouse=True)
def use(service, monkeypatch, tmp_path):
  for name, value in service.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv('BEHAVIORLM_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def address(request):
  """A place in the bucket of each test's own."""
  return f'gs://logs/{request.node.name}'


@pytest.fixture
def remove(address):
  """Deletes objects, as a user would."""
  return lambda *names: bucket.Bucket(address, '')._fs.rm(
    [f'{address}/{name}' for name in names]
  )


@pytest.fixture
def mirror(address, tmp_path):
  """Opens a copy of the work directory by name, as one more host.

  `writes`: as process 0, which is to be the first; `part`: of a shard.
  """

  def opened(name, writes=False, part=''):
    copy = bucket.Mirror(
      bucket.Bucket(address, '--workdir'), tmp_path / name, writes or bool(part), part
    )
    copy.pull()
    return copy

  return opened


def written(address, name):
  """When an object was last written."""
  return bucket.Bucket(address, '')._fs.info(f'{address}/{name}')['updated']


def contents(folder):
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


def write(folder, **texts):
  for name, text in texts.items():
    path = folder / name.replace('__', '/')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_one_host_pushes_the_others_pull(mirror):
  one, other = mirror('one', writes=True), mirror('other')
  write(one.folder, a='1', b__c='2', b__d='3' * 6_000_000)
  one.push()
  other.pull()
  assert contents(other.folder) == contents(one.folder)
  write(one.folder, a='4')
  one.push()
  other.pull()
  assert contents(other.folder) == contents(one.folder)


def test_only_what_changed_is_fetched_and_pushed(mirror, monkeypatch):
  one, moved = mirror('one', writes=True), []
  write(one.folder, a='1', b='2')
  one.push()
  held = one.bucket._fs  # The one of all buckets here.

  def note(name, real):
    def noted(given, *rest, **options):
      moved.append((name, sorted(path.rpartition('/')[2] for path in given)))
      real(given, *rest, **options)

    monkeypatch.setattr(held, name, noted)

  note('get', held.get)
  note('put', held.put)
  again = mirror('one')  # The same machine, a later run.
  write(one.folder, b='3')
  one.push()
  again.pull()
  assert moved == [('put', ['b'])]
  mirror('other')
  assert moved[1:] == [('get', ['a', 'b'])]


def test_a_push_that_was_cut_short_did_not_happen(mirror, monkeypatch):
  one = mirror('one', writes=True)
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
  assert set(contents(mirror('other').folder)) == {'a', 'events/part', 'events/config'}


def test_a_copy_of_another_run_becomes_what_the_bucket_holds(mirror, tmp_path):
  write(tmp_path / 'one', a='0', old='1', older__b='2')
  one = mirror('one', writes=True)
  assert contents(one.folder) == {}
  assert not (one.folder / 'older').exists()  # Or it would pass for made.
  write(one.folder, a='1')
  one.push()
  write(tmp_path / 'other', a='2', torn__c='3')
  assert contents(mirror('other').folder) == {'a': b'1'}


def test_what_a_user_deleted_in_the_bucket_is_gone(mirror, remove, monkeypatch):
  one = mirror('one', writes=True)
  write(one.folder, events__config='1', events__part='2', a='3')
  one.push()
  remove('events/config', 'events/part')
  one = mirror('one', writes=True)
  assert contents(one.folder) == {'a': b'3'}
  write(one.folder, events__config='1', events__part='2')
  real = bucket.Bucket.put

  def killed(self, folder, names):
    real(self, folder, sorted(names)[:1])
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(bucket.Bucket, 'put', killed)
    one.push()
  assert contents(mirror('other').folder) == {'a': b'3'}  # No half of events.


def test_a_copy_that_lost_files_takes_none_from_the_bucket(mirror):
  one = mirror('one', writes=True)
  write(one.folder, a='1', b='2')
  one.push()
  shutil.rmtree(one.folder)
  with pytest.raises(
    InputError,
    match='2 files, such as a, are gone from the '
    r'local copy of gs://logs/.*the bucket still has them',
  ):
    one.push()
  assert contents(mirror('other').folder) == {'a': b'1', 'b': b'2'}


def test_a_place_that_holds_something_else_is_refused(mirror, address):
  bucket.Bucket(address, '').write('mine.txt', 'precious')
  with pytest.raises(
    InputError,
    match=f'--workdir: {address} holds 1 objects, '
    'such as mine.txt, but no contents.txt',
  ):
    mirror('one', writes=True)


def test_two_processes_do_not_share_a_copy(address):
  for _ in range(2):  # The first is done before the second.
    with workspace.opened(address) as one:
      with (
        pytest.raises(InputError, match=f'another process .* in {one.folder}'),
        workspace.opened(address),
      ):
        raise AssertionError('it began')
      with workspace.opened(address, '0-of-2') as other:
        assert other.folder != one.folder


def test_log_and_errors_name_the_address(address):
  with (
    pytest.raises(InputError, match=f'^{address}/a is wrong'),
    workspace.opened(address) as one,
  ):
    raise InputError(f'{one.folder}/a is wrong')


def test_a_file_or_folder_is_fetched_by_its_address(address, remove):
  held = bucket.Bucket(address, '')
  held.write('log', 'user,time\n')
  for name in ('model/config', 'model/rest/b', 'model/old'):
    held.write(name, name)
  held._fs.pipe_file(f'{address}/model/', b'')  # A console's folder.
  path = addresses.resolve(f'{address}/log', 'data.events')
  assert (path.name, path.read_text()) == ('log', 'user,time\n')
  held.write('log', 'other')
  assert addresses.resolve(f'{address}/log', 'data.events').read_text() == ('other')
  assert set(contents(addresses.resolve(f'{address}/model/', 'model.address'))) == {
    'config',
    'rest/b',
    'old',
  }
  remove('model/old')
  assert contents(addresses.resolve(f'{address}/model', 'model.address')) == {
    'config': b'model/config',
    'rest/b': b'model/rest/b',
  }


def test_what_the_bucket_put_together_is_fetched_too(address, monkeypatch):
  """Such objects, as large uploads become, have no MD5."""
  held = bucket.Bucket(address, '')
  for text in ('one', 'two'):
    held.write('log', text)
    with monkeypatch.context() as patch:
      real = held._fs.find
      patch.setattr(
        type(held._fs),
        'find',
        lambda self, path, real=real, **kw: {
          name: {key: value for key, value in facts.items() if key != 'md5Hash'}
          for name, facts in real(path, **kw).items()
        },
      )
      path = addresses.resolve(f'{address}/log', 'data.events')
    assert path.read_text() == text


def test_what_arrives_damaged_is_not_taken(address, tmp_path):
  held = bucket.Bucket(address, '--workdir')
  held.write('log', 'whole')
  with pytest.raises(bucket.Unreachable, match='arrived with another MD5'):
    held.get(tmp_path, {'log': 'another'})
  assert not (tmp_path / 'log').exists()


@pytest.mark.parametrize(
  'error, kind, match',
  [
    (
      gcsfs.retry.HttpError({'code': 503, 'message': 'later'}),
      bucket.Unreachable,
      'not answer .HttpError: later, 503.; run the',
    ),
    (exceptions.TransportError('no token'), bucket.Unreachable, 'not answer'),
    (exceptions.DefaultCredentialsError('who?'), InputError, 'refuses .Defau'),
    (
      gcsfs.retry.HttpError({'code': 403, 'message': 'no'}),
      InputError,
      'refuses .HttpError: no, 403.; see that',
    ),
    (OSError(28, 'No space left on device'), OSError, '^.Errno 28'),
  ],
)
def test_what_passes_is_told_from_what_stays(address, monkeypatch, error, kind, match):
  held = bucket.Bucket(address, '--workdir')

  def fail(*arguments, **options):
    raise error

  monkeypatch.setattr(held._fs, 'find', fail)
  with pytest.raises(kind, match=match):
    held.objects()


@pytest.mark.parametrize(
  'place, match',
  [
    ('gs://logs/nothing.csv', 'data.events: there is nothing at gs://logs/n'),
    (
      'gs://other/log.csv',
      'data.events: gs://other/log.csv refuses '
      r'\(FileNotFoundError: .*; see that the bucket exists',
    ),
    ('gs://', "data.events: 'gs://' names no bucket"),
  ],
)
def test_what_is_not_there_is_said(place, match):
  with pytest.raises(InputError, match=match):
    addresses.resolve(place, 'data.events')


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'gcsfs', None)
  with pytest.raises(
    InputError,
    match=r"needs gcsfs; run pip install -e '\.\["
    r"gcs\]', or give a local",
  ):
    addresses.resolve('gs://logs/log.csv', 'data.events')


def test_a_bucket_that_refuses_ends_the_run_before_it_begins(make_run_config):
  with pytest.raises(InputError, match='--workdir: gs://other/run refuses'):
    run_lib.run(make_run_config(), 'gs://other/run')


def test_a_bucket_that_does_not_answer_is_asked_again(capsys):
  def work():
    raise bucket.Unreachable(
      '--workdir: gs://b does not answer; run the same command again'
    )

  assert cli._code(work) == processes.EXIT_CODE
  assert capsys.readouterr().err == (
    'error: --workdir: gs://b does not answer; run the same command again.\n'
  )


def test_a_sweep_wants_a_local_folder():
  with pytest.raises(InputError, match='gs://logs/s lies in a bucket'):
    jobs.run_all(None, 'gs://logs/s')


@pytest.fixture
def held(address, mirror):
  """The work directory in the bucket, as a new machine would have it."""
  return lambda: mirror('held').folder


def test_shards_that_are_prepared_at_once_all_count(mirror):
  parts = [mirror(f'{i}-of-2', part=f'{i}-of-2') for i in range(2)]
  for i, part in enumerate(parts):
    write(part.folder, **{f'events.shards__{i}-of-2__config.json': str(i)})
  for part in parts:
    part.push()
  names = {f'events.shards/{i}-of-2/config.json' for i in range(2)}
  first = mirror('first', writes=True)
  assert set(contents(first.folder)) == names
  assert not contents(mirror('other').folder)  # Which joins none.
  write(first.folder, **{'events__config.json': ''})
  first.push()
  assert set(contents(mirror('first', writes=True).folder)) == {'events/config.json'}
  assert set(contents(mirror('0-of-2', part='0-of-2').folder)) == {
    'events.shards/0-of-2/config.json'
  }


def test_a_log_is_prepared_in_a_bucket_shard_by_shard(
  make_run_config, address, held, tmp_path
):
  for index in range(2):
    run_lib.run(make_run_config({'data.shard': f'{index}/2'}), address)
  config = make_run_config()
  with workspace.opened(address) as opened:
    joined = prepared.load_events(config, opened)
  assert (held() / 'events/summary.json').exists()
  run_lib.run(make_run_config({'data.shard': '2/3'}), address)  # For nothing.
  assert not any(
    'of-3' in name
    for name in bucket.Bucket(address, '').objects()
    if name.startswith('events')
  )
  whole = prepared.load_events(config, workspace.local(tmp_path / 'whole'))
  assert joined.fingerprint == whole.fingerprint


@pytest.mark.slow
def test_a_run_of_two_hosts_is_killed_and_goes_on_on_other_machines(
  start_two, service, address, held, tmp_path, assert_same_numbers
):
  cache = tmp_path / 'cache'
  environment = service | {'BEHAVIORLM_CACHE': str(cache)}
  process = start_two(address, environment=environment)
  deadline = time.monotonic() + 300
  finished = bucket.Bucket(f'{address}/a_tuning/checkpoints', '--workdir')
  saved = '3/commit_success.txt'
  while (
    process.poll() is None
    and time.monotonic() < deadline
    and (saved not in finished.objects())
  ):
    time.sleep(0.05)
  assert process.poll() is None, process.finish()[1][-3000:]
  process.kill_all()
  err = process.finish()[1]
  assert saved in finished.objects(), err[-3000:]
  assert not (held() / 'a_tuning/evaluation.json').exists()
  kept = {
    name: written(address, name)
    for name in (
      'events/time.npy',
      'a_tuning/plan.parquet',
      'a_tuning/checkpoints/3/_CHECKPOINT_METADATA',
    )
  }
  shutil.rmtree(cache)  # The machine is gone.

  code, err = start_two(address, environment=environment).finish()
  assert code == 0, err[-3000:]
  assert f'report: {address}/report.html' in err
  assert err.count(str(cache)) == err.count(f'is worked on in {cache}') == 2
  assert kept == {name: written(address, name) for name in kept}
  assert_same_numbers(held())
  # Processes on one machine have copies of their own, which are the same.
  one, other = (path for path in (cache / 'buckets').iterdir() if path.is_dir())
  assert contents(one) == contents(other) == contents(held())
