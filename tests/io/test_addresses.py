"""Addresses: what is fetched, what is refused, what stays in the cache."""

import hashlib
import zipfile

import pytest

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import addresses

ADDRESS = 'pypi://toy-logs==1.0/toy_logs/data/ecom.csv'
WHEEL = 'toy_logs-1.0-py3-none-any.whl'


@pytest.fixture
def index(tmp_path, monkeypatch):
  """A package index of one wheel in a folder; returns that folder."""
  folder = tmp_path / 'index'
  folder.mkdir()
  info = 'toy_logs-1.0.dist-info'
  with zipfile.ZipFile(folder / WHEEL, 'w') as wheel:
    wheel.writestr('toy_logs/data/ecom.csv', 'user,time,behavior\n')
    wheel.writestr('toy_logs/other.txt', 'not asked for')
    wheel.writestr(
      f'{info}/METADATA',
      'Metadata-Version: 2.1\nName: toy-logs\nVersion: 1.0\n'
      'Requires-Dist: does-not-exist\n',
    )
    wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any\n')
    wheel.writestr(f'{info}/RECORD', '')
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(folder))
  monkeypatch.setenv('BEHAVIORLM_CACHE', str(tmp_path / 'cache'))
  return folder


def files_in(folder):
  return sorted(p.name for p in folder.rglob('*') if p.is_file())


def test_only_the_member_is_fetched_and_then_reused(index, tmp_path):
  path = addresses.resolve(ADDRESS, 'data.events')
  assert path.read_text() == 'user,time,behavior\n'
  cache = tmp_path / 'cache'
  assert path.is_relative_to(cache / 'pypi' / 'toy-logs-1.0')
  assert files_in(cache) == ['ecom.csv', 'ecom.csv.origin.json']
  assert [p.name for p in (cache / 'pypi').iterdir()] == ['toy-logs-1.0']
  (index / WHEEL).unlink()
  assert addresses.resolve(ADDRESS, 'data.events') == path


def test_a_damaged_cached_file_is_fetched_again(index):
  path = addresses.resolve(ADDRESS, 'data.events')
  path.write_text('user,ti')
  assert addresses.resolve(ADDRESS, 'data.events') == path
  assert path.read_text() == 'user,time,behavior\n'


def test_a_cached_file_without_its_record_is_fetched_again(index):
  path = addresses.resolve(ADDRESS, 'data.events')
  path.with_name('ecom.csv.origin.json').unlink()
  (index / WHEEL).unlink()
  with pytest.raises(InputError, match=r'pip could not fetch toy-logs==1.0'):
    addresses.resolve(ADDRESS, 'data.events')


def test_the_right_checksum_passes_and_a_wrong_one_stops(index, tmp_path):
  right = hashlib.sha256((index / WHEEL).read_bytes()).hexdigest()
  wrong = '0' * 64
  with pytest.raises(InputError, match=f'{right} but {wrong} is expected'):
    addresses.resolve(f'{ADDRESS}#sha256={wrong}', 'data.events')
  assert files_in(tmp_path / 'cache') == []
  addresses.resolve(f'{ADDRESS}#sha256={right}', 'data.events')
  # A cached copy does not excuse a wrong checksum.
  with pytest.raises(InputError, match='is expected'):
    addresses.resolve(f'{ADDRESS}#sha256={wrong}', 'data.events')


def test_the_table_of_checksums_is_used(index, monkeypatch):
  wheel = ('toy-logs', '1.0')
  monkeypatch.setitem(addresses.CHECKSUMS, wheel, 'f' * 64)
  with pytest.raises(InputError, match='f' * 64):
    addresses.resolve(ADDRESS.replace('toy-logs', 'Toy_Logs'), 'data.events')


def test_a_missing_member_names_close_ones(index, tmp_path):
  address = 'pypi://toy-logs==1.0/toy_logs/dataset/ecom.csv'
  close = r'data.events.*toy_logs/data/ecom.csv'
  with pytest.raises(InputError, match=close):
    addresses.resolve(address, 'data.events')
  assert files_in(tmp_path / 'cache') == []


@pytest.mark.parametrize(
  'member', ['/etc/passwd', '../secret', 'a/../../secret', 'a\\..\\b', './x']
)
def test_a_member_that_leaves_its_folder_is_refused(index, tmp_path, member):
  with pytest.raises(InputError, match='leaves its folder'):
    addresses.resolve(f'pypi://toy-logs==1.0/{member}', 'data.events')
  assert not (tmp_path / 'cache').exists()


def test_a_version_that_is_not_there_gives_the_reason_of_pip(index, tmp_path):
  address = ADDRESS.replace('1.0', '2.0')
  with pytest.raises(InputError, match='No matching distribution') as caught:
    addresses.resolve(address, 'model.address')
  assert str(caught.value).startswith('model.address: ')
  assert '\n' not in str(caught.value)
  assert files_in(tmp_path / 'cache') == []


def test_a_damaged_wheel_is_refused(index, tmp_path):
  # pip itself opens wheels, so only our own unpacking is asked here.
  wheel = tmp_path / WHEEL
  wheel.write_bytes(b'no archive')
  wanted = addresses._parse(ADDRESS, 'data.events')
  with pytest.raises(InputError, match='is damaged'):
    addresses._unpack(wheel, tmp_path / 'out', wanted)


@pytest.mark.parametrize(
  'address',
  [
    'pypi://toy-logs/x.csv',
    'pypi://--index-url==1.0/x.csv',
    'pypi://toy-logs==../x.csv',
    'pypi://toy-logs==1.0/x.csv#sha256=12',
  ],
)
def test_a_malformed_address_is_refused(address):
  with pytest.raises(InputError, match='is not of the form'):
    addresses.resolve(address, 'data.events')


def test_local_paths_pass_and_absent_ones_stop(tmp_path):
  assert addresses.resolve(str(tmp_path), 'data.events') == tmp_path
  with pytest.raises(InputError, match=r'data.events.*does not exist'):
    addresses.resolve(str(tmp_path / 'absent.csv'), 'data.events')
  with pytest.raises(InputError, match='does not exist'):
    addresses.resolve('', 'data.events')
  with pytest.raises(InputError, match=r's3://.*not supported'):
    addresses.resolve('s3://bucket/log.csv', 'data.events')


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
  monkeypatch.delenv('BEHAVIORLM_CACHE', raising=False)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert addresses.cache_dir() == tmp_path / 'behaviorlm_jax'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert addresses.cache_dir() == tmp_path / '.cache' / 'behaviorlm_jax'
