"""Dialects of CSV, shapes of JSON, and nested columns."""

import json

import ml_collections
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behaviorlm_jax.data import events
from behaviorlm_jax.data.log import text_rows
from behaviorlm_jax.errors import InputError

ROWS = [
  ('u', f'2024-01-01 10:0{i}', name)
  for i, name in enumerate(
    ['read "news"', 'eat, drink', 'gym', "it's late; sleep", 'read "news"']
  )
]
NAMES = {name for _, _, name in ROWS}


@pytest.fixture
def read(tmp_path, log_config):
  def read(text, name='log', csv=None, **fields):
    """Names of the behaviors and summary of a log of this text."""
    path = tmp_path / name
    path.write_text(text, newline='')
    data = log_config(split=(1, 0, 0), **fields)
    if csv:
      data.csv = ml_collections.ConfigDict(
        {'delimiter': '', 'quote': '', 'escape': '', **csv}
      )
    folder = tmp_path / 'events'
    summary = events.prepare(data, path, folder, 0)
    return {item.name for item in events.open_events(folder).behaviors}, summary

  return read


def dialect(mark, quote, escape):
  """The rows in a dialect; quotes inside are doubled or escaped."""
  wrap = lambda text: (
    quote + text.replace(quote, escape + quote if escape else 2 * quote) + quote
  )
  return '\n'.join(
    mark.join(map(wrap, row)) for row in [('user', 'time', 'behavior'), *ROWS]
  )


@pytest.mark.parametrize('mark', [',', ';', '\t', '|', '\x01'])
@pytest.mark.parametrize(
  'quote, escape', [('"', ''), ('"', '\\'), ("'", ''), ("'", '\\')]
)
def test_dialects_are_found(mark, quote, escape, read):
  assert read(dialect(mark, quote, escape))[0] == NAMES


def test_blanks_before_quotes_are_passed_over(read):
  text = dialect(',', '"', '').replace(',"', ', "').replace('eat, "', 'eat, ')
  assert 'eat, drink' in read(text)[0]


def test_a_dialect_that_is_given_is_used(read):
  text = 'user:time:behavior\n' + '\n'.join(
    f'u:2024-01-01T1{i}:"{name}' for i, name in enumerate('xyx')
  )
  names, summary = read(
    text.replace('T1', ' 1').replace(' 10:', ' 10h:'),
    csv={'delimiter': ':', 'quote': 'none'},
    time_format='%Y-%m-%d %H',
    max_rejected=0.9,
  )
  assert names == {'"x', '"y'}
  assert summary['rejected'] == 1
  assert summary['layout'].startswith("CSV, divided by ':'")


def test_a_column_that_stands_twice_is_refused_if_it_is_used(read):
  row = ',2024-01-01 10:00,2025-01-01 10:00,'
  with pytest.raises(InputError, match="2 columns named 'time'"):
    read(f'user,time,time,behavior\nu{row}x\n')
  row = ',2024-01-01 10:00,y,'
  names, _ = read(f'user,behavior,time,more,more\nu,a{row}\nu,b{row}\n')
  assert names == {'a', 'b'}


def test_a_parquet_column_that_stands_twice_is_refused(tmp_path, log_config):
  path = tmp_path / 'log.parquet'
  pq.write_table(
    pa.table(
      [pa.array(['u']), pa.array(['x']), pa.array(['t']), pa.array(['t'])],
      names=['user', 'behavior', 'time', 'time'],
    ),
    path,
  )
  with pytest.raises(InputError, match="2 columns named 'time'"):
    events.prepare(log_config(), path, tmp_path / 'events', 0)


# JSON.


def objects(rows=ROWS):
  return [dict(zip(('user', 'time', 'behavior'), row, strict=True)) for row in rows]


@pytest.mark.parametrize('block', [3, 1 << 20])
@pytest.mark.parametrize(
  'write',
  [
    json.dumps,
    lambda rows: json.dumps(rows, indent=2),
    lambda rows: '\n'.join(json.dumps(row, indent=2) for row in rows),
    lambda rows: '[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n',
  ],
)
def test_json_need_not_be_lines(write, block, monkeypatch, read):
  monkeypatch.setattr(text_rows, '_BLOCK', block)
  names, summary = read(write(objects()), 'log.json')
  assert (names, summary['rows']) == (NAMES, 5)


def test_a_torn_array_is_refused(read):
  with pytest.raises(InputError, match=r'breaks off .* after 4 objects'):
    read(json.dumps(objects())[:-20], 'log.json')
  with pytest.raises(InputError, match='is empty'):
    read('[]', 'log.json')


def test_paths_with_dots_lead_into_objects(read):
  rows = [
    {'user': {'id': 3}, 'at': {'time': f'2024-01-01 10:0{i}'}, 'behavior.name': name}
    for i, name in enumerate('xyx')
  ]
  fields = {'user': 'user.id', 'time': 'at.time', 'behavior': 'behavior.name'}
  assert read('\n'.join(map(json.dumps, rows)), **fields)[0] == {'x', 'y'}
  with pytest.raises(InputError, match=r"no column 'user.it'.*'user.id'"):
    read('\n'.join(map(json.dumps, rows)), **fields | {'user': 'user.it'})


def test_objects_are_no_labels(read):
  rows = [
    *objects(),
    {**objects()[0], 'behavior': {'name': 'x'}},
    {**objects()[0], 'user': [1, 2]},
  ]
  text = '\n'.join(map(json.dumps, rows))
  with pytest.raises(InputError, match='behavior is an object, not a text'):
    read(text)
  _, summary = read(text, max_rejected=0.5)
  assert summary['reasons'] == {
    'behavior is an object, not a text or a number': 1,
    'user is an array, not a text or a number': 1,
  }


def test_a_key_that_stands_twice_is_malformed(read):
  lines = list(map(json.dumps, objects()))
  lines.append(lines[0][:-1] + ', "time": "2025-01-01 10:00"}')
  lines.append(lines[1][:-1] + ', "more": {"time": "x"}}')  # Another's key.
  _, summary = read('\n'.join(lines), max_rejected=0.5)
  assert summary['reasons'] == {'two keys': 1}


# Parquet.


def test_nested_and_binary_columns_of_parquet(tmp_path, log_config):
  path = tmp_path / 'log.parquet'
  pq.write_table(
    pa.table(
      {
        'who': [{'id': 'ü'}] * 3,
        'time': ['2024-01-01', '2024-01-02', '2024-01-03'],
        'behavior': pa.array([b'caf\xc3\xa9', b'gym', b'\xff'], pa.binary()),
      }
    ),
    path,
  )
  fields = {'split': (1, 0, 0), 'max_rejected': 0.5}
  events.prepare(log_config(user='who.id', **fields), path, tmp_path / 'events', 0)
  log = events.open_events(tmp_path / 'events')
  assert list(log.users) == ['ü']
  assert [item.name for item in log.behaviors] == ['café', 'gym']
  with pytest.raises(InputError, match="column 'who' holds objects"):
    events.prepare(log_config(user='who', **fields), path, tmp_path / 'b', 0)
  with pytest.raises(InputError, match=r"no column 'who\.name'"):
    events.prepare(log_config(user='who.name'), path, tmp_path / 'c', 0)
