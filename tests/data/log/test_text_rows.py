"""Dialects of CSV, shapes of JSON, and nested columns."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behaviorlm_jax.data.log import json_rows, text_rows
from behaviorlm_jax.errors import InputError

ROWS = [
  ('u', f'2024-01-01 10:0{i}', name)
  for i, name in enumerate(
    ['read "news"', 'eat, drink', 'gym', "it's late; sleep", 'read "news"']
  )
]
NAMES = {name for _, _, name in ROWS}


@pytest.fixture
def read_text(tmp_path, read):
  def read_text(text, name='log', **fields):
    """Names of the behaviors and summary of a log of this text."""
    (tmp_path / name).write_text(text, newline='')
    log, summary = read(tmp_path / name, **fields)
    return {item.name for item in log.behaviors}, summary

  return read_text


def dialect_of(**given):
  """The section data.csv."""
  return {'delimiter': '', 'quote': '', 'escape': '', **given}


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
def test_dialects_are_found(mark, quote, escape, read_text):
  assert read_text(dialect(mark, quote, escape))[0] == NAMES


def test_blanks_before_quotes_are_passed_over(read_text):
  text = dialect(',', '"', '').replace(',"', ', "').replace('eat, "', 'eat, ')
  assert 'eat, drink' in read_text(text)[0]


def bare(names):
  """Rows of one minute each under a bare header."""
  rows = (f'u,2024-01-01 {i // 60:02}:{i % 60:02},{n}' for i, n in enumerate(names))
  return '\n'.join(['user,time,behavior', *rows]) + '\n'


@pytest.mark.parametrize('quote', ['"', "'"])
@pytest.mark.parametrize('at', [0, 100, 200])
@pytest.mark.parametrize('stray', ['{0}Joe {0}Diner{0}', '{0}Joe', '{0}a{0} b'])
def test_a_stray_quote_is_one_malformed_row(quote, at, stray, read_text):
  names = [quote + name + quote for name in ['gym', 'eat'] * 100]
  names.insert(at, stray.format(quote))
  found, summary = read_text(bare(names))
  assert (found, summary['rejected']) == ({'gym', 'eat'}, 1)


@pytest.mark.parametrize('wrap', ['"', "'", ' "', " '"])
def test_what_wraps_fields_is_the_quote(wrap, read_text):
  names = ['gym', "it's", 'eat', "Joe's"] if '"' in wrap else ['gym', 'say "hi"', 'eat']
  assert read_text(bare(f'{wrap}{name}{wrap[-1]}' for name in names))[0] == set(names)


def test_a_name_may_begin_or_end_with_an_apostrophe(read_text):
  names = ["'t Hooft", 'eat', "Joe's", "Gyms'"]
  assert read_text(bare(names))[0] == set(names)
  assert read_text(bare([*names, '"eat, drink"']))[0] == {*names, 'eat, drink'}


@pytest.mark.parametrize('lines', [150, 151, 152, 153])
def test_a_field_that_goes_on_is_no_malformed_row(lines, monkeypatch, read_text):
  monkeypatch.setattr(text_rows, 'LINES', lines)
  names = [*['gym', 'eat'] * 74, '"one\ntwo, ""2""\nthree"', *['gym', '"a, b"'] * 9]
  found, summary = read_text(bare(names))
  assert found == {'gym', 'eat', 'one two, "2" three', 'a, b'}
  assert summary['rejected'] == 0


@pytest.mark.parametrize('null', [r'\N', r'"\N"'])
def test_backslash_n_stays_a_null(null, read_text):
  text = bare([r'"read \"news\""', null, 'eat', r'"C:\\N"'])
  names, summary = read_text(text, max_rejected=0.5)
  assert names == {'read "news"', 'eat', r'C:\N'}
  assert summary['reasons'] == {'behavior means none (data.nulls)': 1}


@pytest.mark.parametrize(
  'field, given, match',
  [
    ('delimiter', '||', "'\\|\\|'; give a character or tab"),
    ('delimiter', 'none', "'none'; give a character or tab"),
    ('delimiter', '"', 'give different characters'),
    ('quote', 'abc', "'abc'; give a character, tab, or none"),
    ('escape', 'é\u0301', 'give a character, tab, or none'),
  ],
)
def test_what_is_no_character_is_refused(field, given, match, read_text):
  given = {'quote': '"', 'escape': 'none', field: given}
  with pytest.raises(InputError, match=f'data.csv.{field} is .*{match}'):
    read_text(bare(['x', 'y']), csv=dialect_of(**given))


def test_a_quote_may_be_said_to_escape_itself(read_text):
  assert read_text(bare(['x', '"a ""b"""']), csv=dialect_of(escape='"'))[0] == {
    'x',
    'a "b"',
  }


def test_columns_are_shown_in_one_short_line(read_text):
  with pytest.raises(InputError, match='which are: ') as error:
    read_text('\x01' + 'é\x02' * 999 + '\n')
  shown = str(error.value).split('which are: ')[1]
  assert len(shown) <= 200 and shown.isprintable()


def test_a_dialect_that_is_given_is_used(read_text):
  text = 'user:time:behavior\n' + '\n'.join(
    f'u:2024-01-01T1{i}:"{name}' for i, name in enumerate('xyx')
  )
  names, summary = read_text(
    text.replace('T1', ' 1').replace(' 10:', ' 10h:'),
    csv=dialect_of(delimiter=':', quote='none'),
    time_format='%Y-%m-%d %H',
    max_rejected=0.9,
  )
  assert names == {'"x', '"y'}
  assert summary['rejected'] == 1
  assert summary['layout'].startswith("CSV, divided by ':'")


def test_a_column_that_stands_twice_is_refused_if_it_is_used(read_text):
  row = ',2024-01-01 10:00,2025-01-01 10:00,'
  with pytest.raises(InputError, match="2 columns named 'time'"):
    read_text(f'user,time,time,behavior\nu{row}x\n')
  row = ',2024-01-01 10:00,y,'
  names, _ = read_text(f'user,behavior,time,more,more\nu,a{row}\nu,b{row}\n')
  assert names == {'a', 'b'}


def test_a_parquet_column_that_stands_twice_is_refused(tmp_path, read):
  names = ['user', 'behavior', 'time', 'time']
  columns = [pa.array(['u']), pa.array(['x']), pa.array(['t']), pa.array(['t'])]
  pq.write_table(pa.table(columns, names=names), tmp_path / 'log.parquet')
  with pytest.raises(InputError, match="2 columns named 'time'"):
    read(tmp_path / 'log.parquet')


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
def test_json_need_not_be_lines(write, block, monkeypatch, read_text):
  monkeypatch.setattr(json_rows, '_BLOCK', block)
  names, summary = read_text(write(objects()), 'log.json')
  assert (names, summary['rows']) == (NAMES, 5)


def test_a_torn_array_is_refused(read_text):
  with pytest.raises(InputError, match=r'breaks off .* after 4 objects'):
    read_text(json.dumps(objects())[:-20], 'log.json')
  with pytest.raises(InputError, match='is empty'):
    read_text('[]', 'log.json')


@pytest.mark.parametrize('block', [3, 1 << 20])
def test_arrays_and_objects_may_follow_each_other(block, monkeypatch, read_text):
  monkeypatch.setattr(json_rows, '_BLOCK', block)
  rows = objects()
  some = json.dumps(rows[:2])
  text = some + json.dumps(rows[2], indent=1) + '[]\n' + json.dumps(rows[3:])
  names, summary = read_text(text, 'log.json')
  assert (names, summary['rows']) == (NAMES, 5)
  for end in ('and more {', ']', some[:-1], '7', '[', '"x"', '{"user"'):
    with pytest.raises(InputError, match=r'breaks off or is no JSON after \d objects'):
      read_text(text + end, 'log.json')
  with pytest.raises(InputError, match='after 2 objects: its array does not end'):
    read_text(some[:-1], 'log.json')


LAYOUTS = [
  '\n'.join,
  lambda rows: '[' + ','.join(rows) + ']',
  lambda rows: '\n'.join(row.replace('{', '{\n') for row in rows),
]


@pytest.mark.parametrize('write', LAYOUTS)
def test_doubled_keys_are_malformed_in_every_layout(write, read_text):
  row = '{"account": {"id": 1%s}, "time": "2024-01-01 10:0%d", "behavior": "x%d"%s}'
  rows = [
    row % ('', 0, 0, ''),
    row % (', "id": 1', 1, 1, ''),
    row % ('', 2, 2, ', "account": {}'),
    row % ('', 3, 3, ', "b\\u0065havior": "y"'),
    row % (', "x": 1, "x": 2', 4, 4, ', "id": 3, "more": 1, "more": 2'),
  ]
  names, summary = read_text(write(rows), user='account.id', max_rejected=0.9)
  assert (names, summary['reasons']) == ({'x0', 'x4'}, {'two keys': 3})


@pytest.mark.parametrize('write', LAYOUTS)
def test_a_path_that_is_also_a_key_is_refused(write, read_text):
  rows = [row | {'account': {'id': 1}} for row in objects()]
  rows[1]['account.id'] = 2
  with pytest.raises(InputError, match=r"2 columns named 'account\.id'"):
    read_text(write(list(map(json.dumps, rows))), user='account.id')


@pytest.mark.parametrize('write', LAYOUTS)
def test_any_of_the_first_objects_may_hold_a_column(write, read_text):
  rows = [row | {'a.b': {'c': {'d': {'e': {'f': {'g': 7}}}}}} for row in objects()]
  rows[-1]['room'] = 'kitchen'
  text = write(list(map(json.dumps, rows)))
  assert read_text(text, user='a.b.c.d.e.f.g', place='room')[0] == NAMES
  with pytest.raises(InputError, match=r"no column 'rooms'.*'room'"):
    read_text(text, place='rooms')


def test_paths_with_dots_lead_into_objects(read_text):
  rows = [
    {'user': {'id': 3}, 'at': {'time': f'2024-01-01 10:0{i}'}, 'behavior.name': name}
    for i, name in enumerate('xyx')
  ]
  fields = {'user': 'user.id', 'time': 'at.time', 'behavior': 'behavior.name'}
  assert read_text('\n'.join(map(json.dumps, rows)), **fields)[0] == {'x', 'y'}
  with pytest.raises(InputError, match=r"no column 'user.it'.*'user.id'"):
    read_text('\n'.join(map(json.dumps, rows)), **fields | {'user': 'user.it'})


def test_objects_are_no_labels(read_text):
  rows = [
    *objects(),
    {**objects()[0], 'behavior': {'name': 'x'}},
    {**objects()[0], 'user': [1, 2]},
  ]
  text = '\n'.join(map(json.dumps, rows))
  with pytest.raises(InputError, match='behavior is an object, not a text'):
    read_text(text)
  _, summary = read_text(text, max_rejected=0.5)
  assert summary['reasons'] == {
    'behavior is an object, not a text or a number': 1,
    'user is an array, not a text or a number': 1,
  }


def test_a_key_that_stands_twice_is_malformed(read_text):
  lines = list(map(json.dumps, objects()))
  lines.append(lines[0][:-1] + ', "time": "2025-01-01 10:00"}')
  lines.append(lines[1][:-1] + ', "more": {"time": "x"}}')  # Another's key.
  _, summary = read_text('\n'.join(lines), max_rejected=0.5)
  assert summary['reasons'] == {'two keys': 1}


# What is packed.


@pytest.mark.parametrize(
  'content, match',
  [
    (b'\x04"M\x18d@\xa7', 'is compressed with lz4; decompress it'),
    (b'\xff\x06\0\0sNaPpY', 'is compressed with snappy; decompress it'),
    (gzip.compress(b'PAR1\x15\x04'), 'is a compressed Parquet file; decompress it'),
    (gzip.compress(gzip.compress(b'user')), 'is compressed twice; decompress it'),
    (b'log.csv'.ljust(257, b'\0') + b'ustar' + b'x,' * 20_000, 'is a tar archive'),
  ],
  # gzip writes the time: workers would name their tests differently.
  ids=['lz4', 'snappy', 'parquet', 'twice', 'tar'],
)
def test_what_is_packed_is_named(content, match, tmp_path, read):
  (tmp_path / 'log.csv').write_bytes(content)
  with pytest.raises(InputError, match=match):
    read(tmp_path / 'log.csv')


# Parquet.


def test_nested_and_binary_columns_of_parquet(read, write_parquet):
  path = write_parquet(
    who=[{'id': 'ü', 'a.b': 'ö'}] * 3,
    time=['2024-01-01', '2024-01-02', '2024-01-03'],
    behavior=pa.array([b'caf\xc3\xa9', b'gym', b'\xff'], pa.binary()),
  )
  for user, found in (('who.id', 'ü'), ('who.a.b', 'ö')):
    log, _ = read(path, user=user, max_rejected=0.5)
    assert list(log.users) == [found]
    assert [item.name for item in log.behaviors] == ['café', 'gym']
  with pytest.raises(InputError, match="column 'who' holds objects"):
    read(path, user='who')
  with pytest.raises(InputError, match=r"no column 'who\.name'"):
    read(path, user='who.name')
