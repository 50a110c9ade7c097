"""Logs: formats, times, lines of malformed rows, and what is refused."""

import csv
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behaviorlm_jax.data.log import reader, text_rows
from behaviorlm_jax.errors import InputError

HEADER = 'user,time,behavior'


# What is read.


@pytest.mark.parametrize(
  'text',
  [
    '01/02/2024 10:00',
    '2024-02-30 10:00',
    '2024-01-01 24:00',
    '2024-01-01 10:00:61',
    'noon',
    '1704103200',
    '2024-01-01',
    '2024-01-01 10:00Z',
  ],
)
def test_times_of_another_form_are_malformed(
  tmp_path, text, history, prepare, rejected
):
  _, summary, _ = prepare(
    tmp_path, [*history('xy'), f'u,{text},x'], max_rejected=0.5, split=(1, 0, 0)
  )
  assert summary['rejected'] == 1
  assert summary['reasons'] == {'time is not of the form ISO 8601': 1}
  assert rejected() == [
    {
      'line': '4',
      'reason': f"time '{text}' is not of the form ISO 8601",
      'text': f'u,{text},x',
    }
  ]


def test_names_are_stripped_and_white_space_becomes_one_blank(tmp_path, prepare, names):
  lines = [
    'u,2024-01-01 10:00,"  at \n\t the\u00a0 sea "',
    'u,2024-01-01 10:01,at home',
    ' u ,2024-01-01 10:02,at the sea',
  ]
  log, _, _ = prepare(tmp_path, lines, split=(1, 0, 0))
  assert names(log) == ['at the sea', 'at home', 'at the sea']
  assert list(log.users) == ['u']


def test_quoted_commas_quotes_and_newlines_parse(tmp_path, prepare, names):
  lines = [
    'u,2024-01-01 10:00,"eat, drink"',
    'u,2024-01-01 10:01,"say ""hi"""',
    'u,2024-01-01 10:02,"two\nlines"',
    'u,2024-01-01 10:03,5" disk',
  ]
  log, summary, _ = prepare(tmp_path, lines, split=(1, 0, 0))
  assert names(log) == ['eat, drink', 'say "hi"', 'two lines', '5" disk']
  assert summary['rejected'] == 0


def test_all_formats_give_the_same_events(tmp_path, read, minute):
  rows = [
    (u, minute(i * 7 % 50), f'b, {i % 4}', f'p{i % 3}')
    for u in ('ann', 'bob')
    for i in range(40)
  ]
  write_all(tmp_path, rows, ('user', 'time', 'behavior', 'place'))
  found = [read(path, place='place')[1] for path in sorted(tmp_path.glob('log.*'))]
  assert [summary['rows'] for summary in found] == [80] * 8
  assert len({summary['fingerprint'] for summary in found}) == 1


def write_all(folder, rows, columns):
  """The same rows as CSV, TSV, JSON lines (all also zipped) and Parquet."""
  for suffix, delimiter in (('csv', ','), ('tsv', '\t')):
    with open(folder / f'log.{suffix}', 'w', newline='') as file:
      csv.writer(file, delimiter=delimiter).writerows([columns, *rows])
  lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
  for suffix in ('jsonl', 'ndjson'):
    (folder / f'log.{suffix}').write_text('\n'.join(lines))
  for suffix in ('csv', 'tsv', 'jsonl'):
    text = (folder / f'log.{suffix}').read_bytes()
    (folder / f'log.{suffix}.gz').write_bytes(gzip.compress(text))
  table = pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True)))
  times = table['time'].to_numpy().astype('M8[us]')
  pq.write_table(table.set_column(1, 'time', pa.array(times)), folder / 'log.parquet')


@pytest.mark.parametrize(
  'zone, hours', [(None, 0), ('UTC', 0), ('America/New_York', -5), ('+05:30', 5.5)]
)
def test_parquet_times_keep_the_clock_of_their_zone(zone, hours, read, write_parquet):
  seconds = np.array([1704103200, 1704103260])
  times = pa.array(seconds).cast(pa.timestamp('s')).cast(pa.timestamp('us', tz=zone))
  path = write_parquet("it's [1].parquet", user=[7, 7], behavior=['x', 'y'], time=times)
  log, _ = read(path)
  assert log.time.tolist() == (seconds + int(hours * 3600)).tolist()
  assert list(log.users) == ['7']


# What is set aside.


def test_malformed_rows_are_set_aside_with_their_line(
  tmp_path, prepare, names, rejected
):
  lines = [
    'u,2024-01-01 10:00,x',  # 2
    'u,2024-01-01 10:01',  # 3
    '',  # 4
    'u,2024-01-01 10:02,"two\nlines"',  # 5, 6
    ',2024-01-01 10:03,x',  # 7
    'u,,x',  # 8
    'u,2024-01-01 10:04,x,extra',  # 9
    'u,"2024-01-01 10:05,x',  # 10: the quote never ends
    'u,later,x',  # 11
    'u,2024-01-01 10:06,y',
  ]  # 12
  log, summary, _ = prepare(tmp_path, lines, max_rejected=0.8, split=(1, 0, 0))
  found = rejected()
  assert [(int(row['line']), row['reason'].split(':')[0]) for row in found] == [
    (3, '2 fields instead of 3'),
    (7, 'no user'),
    (8, 'no time'),
    (9, '4 fields instead of 3'),
    (10, 'broken row'),
    (11, "time 'later' is not of the form ISO 8601"),
  ]
  assert found[4]['text'] == 'u,"2024-01-01 10:05,x'
  assert (summary['rows'], summary['rejected']) == (9, 6)
  assert names(log) == ['x', 'two lines', 'y']


def test_lines_stay_right_across_chunks(
  tmp_path, monkeypatch, minute, prepare, rejected
):
  monkeypatch.setattr(text_rows, 'LINES', 3)
  monkeypatch.setattr(reader, '_CHUNKS', 2)
  lines, expected, number = [], [], 2
  for i in range(60):
    name = f'"b\n{i}"' if i % 5 == 0 else f'b{i}'
    if i % 7 == 3:
      expected.append(number)
      lines.append(f'u,never,{name}')
    else:
      lines.append(f'u,{minute(i)},{name}')
    number += 1 + name.count('\n')
  log, _, _ = prepare(tmp_path, lines, max_rejected=1)
  assert [int(row['line']) for row in rejected()] == expected
  assert len(log.user) == 60 - len(expected)


def test_broken_json_lines_are_set_aside(tmp_path, read, rejected):
  good = [
    json.dumps({'user': 3, 'time': 1704103200 + i, 'behavior': b})
    for i, b in enumerate('xyx')
  ]
  lines = [
    good[0],
    '{"user": 3, ',
    '',
    '[1]',
    good[1],
    '{"user": "\\ud800"}',
    '{"behavior": "x", "time": 5}',
    good[2],
  ]
  (tmp_path / 'log.jsonl').write_text('\n'.join(lines))
  log, _ = read(tmp_path / 'log.jsonl', max_rejected=0.9)
  assert [(int(row['line']), row['reason'].split(':')[0]) for row in rejected()] == [
    (2, 'broken JSON'),
    (4, 'not a JSON object'),
    (6, 'not UTF-8 text'),
    (7, 'no user'),
  ]
  assert list(log.users) == ['3']


@pytest.mark.parametrize(
  'name, match',
  [
    ('User', "has columns 'user' and 'User', which differ in case alone"),
    ('file_row_number', "has a column 'file_row_number', which is what rows"),
  ],
)
def test_parquet_columns_that_would_be_mixed_up_are_refused(
  read, write_parquet, name, match
):
  columns = {
    'user': ['u'],
    'time': ['2024-01-01 10:00'],
    'behavior': ['x'],
    name: ['v'],
  }
  with pytest.raises(InputError, match=match):
    read(write_parquet(**columns))


def test_parquet_rows_are_counted_from_one(read, write_parquet, minute, rejected):
  times = [minute(i) for i in range(3)]
  path = write_parquet(user=['u', None, 'u'], behavior=['x', 'x', 'y'], time=times)
  read(path, max_rejected=0.9)
  assert [(row['line'], row['reason']) for row in rejected()] == [('2', 'no user')]


def test_bytes_that_are_no_text_are_set_aside(tmp_path, read, rejected, history):
  path = tmp_path / 'log.csv'
  path.write_bytes(
    '\n'.join([HEADER, *history('xyx')]).encode() + b'\nu,2024-01-01 11:00,caf\xe9\n'
  )
  read(path, max_rejected=0.9)
  assert [(row['line'], row['reason']) for row in rejected()] == [
    ('5', 'not UTF-8 text')
  ]


# What is refused.


@pytest.mark.parametrize(
  'name, text',
  [
    ('log.csv', ''),
    ('log.csv', HEADER + '\n'),
    ('log.csv', '\n\n'),
    ('log.jsonl', ''),
    ('log.jsonl', '\n\n'),
  ],
)
def test_an_empty_log_is_refused(tmp_path, name, text, read):
  (tmp_path / name).write_text(text)
  with pytest.raises(InputError, match=f'{name} (is empty|holds no rows)'):
    read(tmp_path / name)
  assert not list((tmp_path / 'work').glob('*'))


@pytest.mark.parametrize('name', ['log.xlsx', 'log.csv.gz', 'log', 'log.txt'])
def test_what_a_text_is_told_by_content_and_not_by_name(
  tmp_path, name, history, prepare
):
  log, _, _ = prepare(tmp_path, history('xyzx'), name=name)
  assert len(log.user) == 4


def test_text_that_is_named_parquet_is_refused(tmp_path, history, refuse):
  refuse(tmp_path, history('xy'), "does not begin with 'PAR1'", name='log.parquet')


def test_a_torn_zip_is_refused(tmp_path, read, history):
  path = tmp_path / 'log.csv.gz'
  text = '\n'.join([HEADER, *history('xyzzy' * 50)])
  path.write_bytes(gzip.compress(text.encode())[:-20])
  with pytest.raises(InputError, match='cannot be read to its end'):
    read(path)
  assert not list((tmp_path / 'work').glob('*'))


def test_a_parquet_file_with_broken_pages_is_refused(
  tmp_path, read, write_parquet, minute
):
  times, names = zip(*((minute(i), f'name {i}') for i in range(200)), strict=True)
  path = write_parquet(user=['u'] * 200, time=times, behavior=names)
  content = bytearray(path.read_bytes())
  content[4:1500] = bytes(1496)  # the footer stays whole
  path.write_bytes(content)
  with pytest.raises(InputError, match='cannot be read to its end') as error:
    read(path)
  assert '\n' not in str(error.value)
  assert not list((tmp_path / 'work').glob('*'))


@pytest.mark.parametrize('suffix', ['csv', 'jsonl', 'parquet'])
def test_a_missing_column_names_the_nearest(tmp_path, suffix, read, minute):
  write_all(tmp_path, [('u', minute(0), 'x')], ('user', 'time', 'behaviour'))
  with pytest.raises(InputError) as error:
    read(tmp_path / f'log.{suffix}')
  assert "no column 'behavior'" in str(error.value)
  assert 'data.columns.behavior' in str(error.value)
  assert "nearest: 'behaviour'" in str(error.value)
