"""Names of a log: composed, trimmed, and none where they spell nothing."""

import json

import pyarrow as pa
import pytest


def one_user(texts):
  return [f'u,2024-01-01 10:{i:02d},"{text}"' for i, text in enumerate(texts)]


def test_lookalikes_are_one_name_but_for_their_case(tmp_path, prepare, names):
  texts = [
    'Caf\u00e9',
    'x',
    'Cafe\u0301',
    'x',
    'Caf\u00e9\u200b',
    'x',
    '\u2060 Caf\u00e9\u00ad',
    'x',
    '\u0007Caf\u00e9',
    'x',
    'caf\u00e9',
    'CAF\u00c9',
  ]
  log, summary, _ = prepare(tmp_path, one_user(texts), split=(1, 0, 0))
  assert set(names(log)) == {'Café', 'x', 'café', 'CAFÉ'}
  assert any("'CAFÉ' and 'Café' and 'café'" in text for text in summary['warnings'])


def test_flags_and_letters_that_need_hidden_marks_stay_apart(tmp_path, prepare, names):
  flags = [
    '\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f',
    '\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f',
  ]
  log, _, _ = prepare(tmp_path, one_user(flags), split=(1, 0, 0))
  assert len(set(names(log))) == 2


def test_hidden_characters_do_not_join_or_part_words(tmp_path, prepare, names):
  texts = ['at\u200b the\tsea', 'y', 'at \u200b the sea', 'y', 'at\nthe  sea']
  log, _, _ = prepare(tmp_path, one_user(texts), split=(1, 0, 0))
  assert set(names(log)) == {'at the sea', 'y'}


def test_equal_numbers_are_one_name_and_codes_are_not(tmp_path, prepare, names):
  texts = ['7', 'x', '7.0', 'x', '7.00', '007', '7.5', '-7.0', '1.10', '1.1']
  log, _, _ = prepare(tmp_path, one_user(texts), split=(1, 0, 0))
  assert set(names(log)) == {'7', 'x', '007', '7.5', '-7', '1.10', '1.1'}


@pytest.mark.parametrize('kind', ['json', 'parquet'])
def test_ids_that_are_numbers_are_one_whatever_their_type(
  tmp_path, kind, read, write_parquet
):
  users, behaviors = [7, 7.0, 8.0, 8], [1.0, 2, 1, 2.0]
  times = [f'2024-01-01 10:0{i}' for i in range(4)]
  if kind == 'json':
    rows = zip(users, times, behaviors, strict=True)
    path = tmp_path / 'log.jsonl'
    path.write_text(
      '\n'.join(json.dumps({'user': u, 'time': t, 'behavior': b}) for u, t, b in rows)
    )
  else:
    ids, names = pa.array(users, pa.float64()), pa.array(behaviors, pa.float32())
    path = write_parquet(user=ids, time=times, behavior=names)
  log, _ = read(path)
  assert list(log.users) == ['7', '8']
  assert [item.name for item in log.behaviors] == ['1', '2']


def test_what_spells_nothing_is_no_user_and_no_behavior(
  tmp_path, history, prepare, names
):
  spelled = ['NULL', 'nan', 'None', '\\N', '"  "']
  rows = [
    *history('xyzx'),
    *(f'{user},2024-01-01 11:00,x' for user in spelled),
    *(f'v,2024-01-01 12:{i:02d},{name}' for i, name in enumerate(spelled)),
    'v,NaN,x',
  ]
  log, summary, _ = prepare(
    tmp_path,
    rows,
    max_rejected=0.9,
    split=(1, 0, 0),
    nulls=('null', 'nan', 'none', '\\n'),
  )
  assert list(log.users) == ['u'] and set(names(log)) == set('xyz')
  assert summary['reasons'] == {
    'behavior means none (data.nulls)': 4,
    'user means none (data.nulls)': 4,
    'no behavior': 1,
    'no time': 1,
    'no user': 1,
  }
  assert summary['rows'] == summary['events'] + summary['rejected']


def test_what_spells_nothing_can_be_a_name(tmp_path, history, prepare):
  log, _, _ = prepare(
    tmp_path, history(['None', 'x', 'None', 'y'], 'NULL'), nulls=(), split=(1, 0, 0)
  )
  assert list(log.users) == ['NULL']
  assert 'None' in {item.name for item in log.behaviors}


@pytest.mark.parametrize('nulls', [(0, 'guest'), ('0,Guest',)])
def test_nulls_are_read_as_a_command_line_gives_them(tmp_path, history, prepare, nulls):
  rows = [*history('xyz'), *history('x', '0'), *history('y', 'GUEST')]
  log, summary, _ = prepare(
    tmp_path, rows, max_rejected=0.9, split=(1, 0, 0), nulls=nulls
  )
  assert list(log.users) == ['u'] and summary['rejected'] == 2


def test_many_null_users_stop_the_run_by_name(tmp_path, history, refuse):
  refuse(
    tmp_path,
    [*history('xyzx'), *history('xy', 'NULL')],
    "user 'NULL' means none",
    '2 of 6',
    'data.nulls',
  )
