"""Where the files of a log lie, and how their bytes become text."""

import bz2
import gzip
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behaviorlm_jax.data.log import sources
from behaviorlm_jax.errors import InputError

HEADER = 'user,time,behavior'


@pytest.fixture
def parts(tmp_path, history):
  """A folder of two parts, as Spark leaves it."""
  folder = tmp_path / 'log.csv'
  folder.mkdir()
  for i, user in enumerate('ab'):
    (folder / f'part-{i}.csv').write_text(
      '\n'.join([HEADER, *history('xyzx', user), f'{user},never,x']) + '\n'
    )
  for name in ('_SUCCESS', '.part-0.csv.crc', 'part-2.csv'):
    (folder / name).touch()
  return folder


@pytest.mark.parametrize(
  'place',
  [
    '{0}',
    '{0}/part-*.csv',
    '{0}/part-0.csv,{0}/part-1.csv',
    '{0}/part-0.csv, {0}/part-[1-9].csv',
  ],
)
def test_parts_are_one_log(parts, place, read):
  log, summary = read(place.format(parts), max_rejected=0.5)
  assert list(log.users) == ['a', 'b'] and len(log.user) == 8
  assert summary['rows'] == 10


def test_rejected_rows_of_several_files_name_theirs(parts, read, rejected):
  read(parts, max_rejected=0.5)
  found = [(row['file'], row['line']) for row in rejected()]
  assert found == [('part-0.csv', '6'), ('part-1.csv', '6')]
  with pytest.raises(InputError, match=r'part-0\.csv line 6: time'):
    read(parts)


def test_a_folder_of_parquet_parts_is_one_log(tmp_path, read, minute):
  folder = tmp_path / 'log.parquet'
  (folder / 'day=1').mkdir(parents=True)
  for name, user in (('day=1/part-0.snappy.parquet', 'a'), ('part-1', 'b')):
    times = [minute(i) for i in range(3)]
    table = pa.table({'user': [user] * 3, 'time': times, 'behavior': list('xyz')})
    pq.write_table(table, folder / name)
  (folder / '_SUCCESS').touch()
  log, summary = read(folder)
  assert (list(log.users), summary['rows']) == (['a', 'b'], 6)


def test_a_glob_takes_no_files_that_writers_leave_beside(tmp_path, read):
  for name, user in (('part-0', 'a'), ('part-1', 'b')):
    rows = [f'{user},2024-01-01 10:0{i},{b}' for i, b in enumerate('xyz')]
    (tmp_path / name).write_text('\n'.join([HEADER, *rows]) + '\n')
  (tmp_path / '_committed_1').write_text('{}')
  log, summary = read(tmp_path / '*')
  assert (list(log.users), summary['rows']) == (['a', 'b'], 6)


def test_places_that_hold_no_log_are_refused(tmp_path, parts, read, history):
  empty = tmp_path / 'empty'
  empty.mkdir()
  (empty / '_SUCCESS').touch()
  for place, match in (
    (empty, 'holds no files'),
    ('', 'data.events is empty'),
    (f'{parts}/*.json', 'does not exist'),
    (f'{parts}/part-0.csv,{parts}', 'twice'),
    (f'{parts}/part-0.csv,{tmp_path}/none.csv', 'none.csv'),
  ):
    with pytest.raises(InputError, match=match):
      read(place)


def test_parquet_and_text_are_not_one_log(parts, read):
  pq.write_table(pa.table({'user': ['u']}), parts / 'part-3.parquet')
  with pytest.raises(InputError, match='Parquet files and text files'):
    read(parts)


@pytest.mark.parametrize(
  'compress',
  [
    gzip.compress,
    bz2.compress,
    lzma.compress,
    lambda text: pa.compress(text, 'zstd', asbytes=True),
  ],
)
@pytest.mark.parametrize('name', ['log.csv', 'log.csv.gzip', 'log.gz', 'log'])
def test_compression_is_told_by_content(tmp_path, compress, name, history, read):
  text = '\n'.join([HEADER, *history('xyzzx' * 9)]).encode()
  (tmp_path / name).write_bytes(compress(text))
  assert len(read(tmp_path / name)[0].user) == 28
  (tmp_path / name).write_bytes(compress(text)[:-9])
  with pytest.raises(InputError, match='cannot be read to its end'):
    read(tmp_path / name)


@pytest.mark.parametrize(
  'encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be']
)
@pytest.mark.parametrize('kind', ['csv', 'tsv', 'jsonl'])
def test_encodings_are_told_by_content(tmp_path, encoding, kind, read):
  rows = [
    ('u', f'2024-01-01 10:0{i}', name)
    for i, name in enumerate(['Café', 'gym', 'Café', '睡眠'])
  ]
  if kind == 'jsonl':
    text = '\n'.join(
      f'{{"user": "{u}", "time": "{t}", "behavior": "{b}"}}' for u, t, b in rows
    )
  else:
    mark = {'csv': ',', 'tsv': '\t'}[kind]
    text = '\n'.join(map(mark.join, [HEADER.split(','), *rows]))
  (tmp_path / 'log').write_bytes(text.encode(encoding))
  log, summary = read(tmp_path / 'log')
  assert {item.name for item in log.behaviors} == {'Café', 'gym', '睡眠'}
  assert summary['layout'].endswith(encoding.upper()[:6].rstrip('-'))


@pytest.mark.parametrize(
  'content, match',
  [
    (b'PK\x03\x04rest', 'a zip archive or a spreadsheet'),
    (b'\0\1\2\3' * 99, 'is no text'),
    (b'ARROW1\0\0', 'an Arrow file'),
    ('user,time'.encode('utf-32'), 'UTF-32'),
  ],
)
def test_what_is_no_text_is_refused_by_its_name(tmp_path, content, match, read):
  (tmp_path / 'log.csv').write_bytes(content)
  with pytest.raises(InputError, match=match):
    read(tmp_path / 'log.csv')


def test_a_log_of_several_files_is_known_by_all_of_them(parts, log_config):
  digest = lambda place: sources.open_log(place, log_config()).sha256()
  whole, first = digest(parts), digest(f'{parts}/part-0.csv')
  assert whole == digest(f'{parts}/part-0.csv,{parts}/part-1.csv') != first
  (parts / 'part-1.csv').write_text('other')
  assert whole != digest(parts)
