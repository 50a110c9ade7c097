"""Events: what a log may look like, what is refused, and what comes out."""

import csv
import datetime
import gzip
import json
import re

import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behaviorlm_jax.data import events
from behaviorlm_jax.data import splits
from behaviorlm_jax.errors import InputError

HEADER = 'user,time,behavior'


def config(**fields):
  data = ml_collections.ConfigDict({
      'columns': {'user': 'user', 'time': 'time', 'behavior': 'behavior',
                  'place': '', 'group': ''},
      'collapse_repeats': True, 'max_rejected': .01, 'split': (.8, .1, .1),
      'anchor_share': .01})
  for name, value in fields.items():
    section = data.columns if name in data.columns else data
    section[name] = value
  return data


def minute(i: int) -> str:
  start = datetime.datetime(2024, 1, 1)
  return str(start + datetime.timedelta(minutes=i))[:16]


def history(behaviors, user='u'):
  """CSV lines of one user, a minute apart."""
  return [f'{user},{minute(i)},{name}' for i, name in enumerate(behaviors)]


def prepare(tmp_path, lines, name='log.csv', seed=0, header=HEADER, **fields):
  path = tmp_path / name
  path.write_text('\n'.join([header, *lines]) + '\n')
  folder = tmp_path / 'work' / 'events'
  summary = events.prepare(config(**fields), str(path), folder, seed)
  return events.open_events(folder), summary, folder


def refuse(tmp_path, lines, *parts, **fields):
  """The log is refused in one line that has the parts; nothing is left."""
  with pytest.raises(InputError) as error:
    prepare(tmp_path, lines, **fields)
  sentence = str(error.value)
  for part in parts:
    assert part in sentence
  assert '\n' not in sentence
  assert not list((tmp_path / 'work').glob('*'))


def names(log):
  return [log.behaviors[i].name for i in log.behavior]


def rejected(folder):
  with open(folder / 'rejected.csv', newline='') as file:
    return list(csv.DictReader(file))


# What comes out.


def test_events_are_sorted_by_user_and_time_with_ties_in_file_order(tmp_path):
  lines = ['b,2024-01-01 10:00,x', 'a,2024-01-02 10:00,z',
           'a,2024-01-01 10:00,y', 'a,2024-01-01 10:00,x',
           'b,2024-01-01 09:00,y']
  log, _, _ = prepare(tmp_path, lines, split=(1, 0, 0))
  assert log.users == ['a', 'b']
  assert log.user.tolist() == [0, 0, 0, 1, 1]
  assert names(log) == ['y', 'x', 'z', 'y', 'x']
  assert log.first.tolist() == [0, 0, 0, 3, 3]
  assert log.place.tolist() == [-1] * 5
  assert {name: getattr(log, name).dtype.name for name in (
      'user', 'time', 'behavior', 'place', 'split', 'first')} == {
          'user': 'int32', 'time': 'int64', 'behavior': 'int32',
          'place': 'int32', 'split': 'int8', 'first': 'int64'}


@pytest.mark.parametrize('text', [
    '2024-01-01 10:00', '2024-01-01T10:00:00', '2024-01-01 10:00:00.999',
    '2024-01-01T10:00:00Z', '2024-01-01 10:00:00+05:30', '2024-01-01T10:00-08',
    '1704103200', '1704103200999'])
def test_times_keep_the_wall_clock_in_seconds(tmp_path, text):
  log, _, _ = prepare(tmp_path, [f'u,{text},x', 'u,2024-01-02 00:00,y'],
                      split=(1, 0, 0))
  assert log.time[0] == 1704103200


@pytest.mark.parametrize('text', [
    '2024-01-01', '01/02/2024 10:00', '2024-02-30 10:00', '2024-01-01 24:00',
    '2024-01-01 10:00:61', 'noon', '1704103200.5', '170410320099'])
def test_other_times_are_malformed(tmp_path, text):
  _, summary, folder = prepare(
      tmp_path, [*history('xy'), f'u,{text},x'], max_rejected=.5,
      split=(1, 0, 0))
  assert summary['rejected'] == 1
  assert rejected(folder) == [{
      'line': '4', 'reason': f"time '{text}' is not a date-time",
      'text': f'u,{text},x'}]


def test_seconds_are_floored_before_1970(tmp_path):
  lines = ['u,1969-12-31 23:59:58.5,x', 'u,1969-12-31 23:59:59,y']
  log, _, _ = prepare(tmp_path, lines, split=(1, 0, 0))
  assert log.time.tolist() == [-2, -1]


def test_duplicates_are_dropped_and_repeats_collapsed(tmp_path):
  lines = ['u,2024-01-01 10:00,x', 'u,2024-01-01 10:00,y',
           'u,2024-01-01 10:00,x', 'u,2024-01-01 10:05,y',
           'u,2024-01-01 10:06,z', 'v,2024-01-01 10:07,z']
  log, summary, _ = prepare(tmp_path, lines, split=(1, 0, 0))
  assert names(log) == ['x', 'y', 'z', 'z']
  assert (summary['duplicates'], summary['repeats']) == (1, 1)
  # The first of the repeats is the one that stays.
  assert log.time[1] == log.time[0]


def test_repeats_stay_when_asked(tmp_path):
  log, summary, _ = prepare(tmp_path, history('xxyy'), split=(1, 0, 0),
                            collapse_repeats=False)
  assert names(log) == list('xxyy')
  assert summary['repeats'] == 0


def test_names_are_stripped_and_white_space_becomes_one_blank(tmp_path):
  lines = ['u,2024-01-01 10:00,"  at \n\t the\u00a0 sea "',
           'u,2024-01-01 10:01,at home', ' u ,2024-01-01 10:02,at the sea']
  log, _, _ = prepare(tmp_path, lines, split=(1, 0, 0))
  assert names(log) == ['at the sea', 'at home', 'at the sea']
  assert log.users == ['u']


def test_quoted_commas_quotes_and_newlines_parse(tmp_path):
  lines = ['u,2024-01-01 10:00,"eat, drink"', 'u,2024-01-01 10:01,"say ""hi"""',
           'u,2024-01-01 10:02,"two\nlines"', 'u,2024-01-01 10:03,5" disk']
  log, summary, _ = prepare(tmp_path, lines, split=(1, 0, 0))
  assert names(log) == ['eat, drink', 'say "hi"', 'two lines', '5" disk']
  assert summary['rejected'] == 0


def test_places_are_indexed_and_may_be_missing(tmp_path):
  lines = ['u,2024-01-01 10:00,x,sea', 'u,2024-01-01 10:01,y,',
           'u,2024-01-01 10:02,x,home']
  log, _, _ = prepare(tmp_path, lines, header=HEADER + ',where',
                      place='where', split=(1, 0, 0))
  assert log.places == ['home', 'sea']
  assert log.place.tolist() == [1, -1, 0]


def test_all_formats_give_the_same_events(tmp_path):
  rows = [(u, minute(i * 7 % 50), f'b, {i % 4}', f'p{i % 3}')
          for u in ('ann', 'bob') for i in range(40)]
  columns = ('user', 'time', 'behavior', 'place')
  write_all(tmp_path, rows, columns)
  prints = {}
  for path in sorted(tmp_path.glob('log.*')):
    folder = tmp_path / 'out' / path.name
    summary = events.prepare(config(place='place'), path, folder, 0)
    prints[path.name] = summary['fingerprint']
    assert summary['rows'] == 80
  assert len(prints) == 8
  assert len(set(prints.values())) == 1, prints


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
  pq.write_table(table.set_column(1, 'time', pa.array(times)),
                 folder / 'log.parquet')


@pytest.mark.parametrize('zone, hours', [
    (None, 0), ('UTC', 0), ('America/New_York', -5), ('+05:30', 5.5)])
def test_parquet_times_keep_the_clock_of_their_zone(tmp_path, zone, hours):
  path = tmp_path / "it's [1].parquet"
  seconds = np.array([1704103200, 1704103260])
  pq.write_table(pa.table({
      'user': [7, 7], 'behavior': ['x', 'y'],
      'time': pa.array(seconds).cast(pa.timestamp('s')).cast(
          pa.timestamp('us', tz=zone))}), path)
  events.prepare(config(split=(1, 0, 0)), path, tmp_path / 'events', 0)
  log = events.open_events(tmp_path / 'events')
  assert log.time.tolist() == (seconds + int(hours * 3600)).tolist()
  assert log.users == ['7']


def test_shards_change_neither_events_nor_fingerprint(tmp_path, monkeypatch):
  lines = history('xyzwxyzwxz') + history('zyx', 'v')
  (tmp_path / 'a').mkdir()
  (tmp_path / 'b').mkdir()
  one, first, _ = prepare(tmp_path / 'a', lines)
  monkeypatch.setattr(events, '_SHARD', 4)
  many, second, folder = prepare(tmp_path / 'b', lines)
  assert len(list(folder.glob('part-*.arrow'))) == 4
  assert first == second
  for name in ('user', 'time', 'behavior', 'split', 'first'):
    np.testing.assert_array_equal(getattr(one, name), getattr(many, name))


def test_fingerprint_follows_the_log(tmp_path):
  prints = set()
  for i, text in enumerate(('xyzx', 'xyzy', 'xyzw')):
    (tmp_path / str(i)).mkdir()
    prints.add(prepare(tmp_path / str(i), history(text))[0].fingerprint)
  assert len(prints) == 3


def test_the_folder_holds_its_files_and_nothing_else(tmp_path):
  log, summary, folder = prepare(tmp_path, history('xyzwxyzwxz'))
  assert sorted(path.name for path in folder.iterdir()) == [
      'behaviors.json', 'part-00000.arrow', 'places.arrow', 'rejected.csv',
      'summary.json', 'users.arrow']
  assert [path.name for path in folder.parent.iterdir()] == ['events']
  assert json.loads((folder / 'summary.json').read_text()) == summary
  assert (folder / 'rejected.csv').read_text() == 'line,reason,text\n'
  assert not log.user.flags.owndata  # mapped, not copied


# Splits and groups.


def test_split_by_time_follows_the_rule(tmp_path):
  lines = history('abcdefghijk') + history('ab', 'v') + history('abc', 'w')
  log, summary, _ = prepare(tmp_path, lines)
  # n = 11: floor(8.8) train, up to floor(9.9); n = 2: 1, 1; n = 3: 2, 2.
  assert log.split.tolist() == [0] * 8 + [1] + [2] * 2 + [0, 2] + [0, 0, 2]
  assert summary['splits'] == {'train': 11, 'validation': 1, 'test': 4}


def test_a_cut_loses_nothing_to_rounding(tmp_path):
  assert .29 * 100 < 29
  log, _, _ = prepare(tmp_path, history('ab' * 50), split=(.29, .3, .41))
  assert np.bincount(log.split).tolist() == [29, 30, 41]


def test_group_split_keeps_groups_whole(tmp_path):
  header = HEADER + ',home'
  lines = [line + f',h{u // 2}' for u in range(40)
           for line in history('xyz', f'u{u}')]
  log, _, _ = prepare(tmp_path, lines, header=header, group='home')
  groups = {}
  for user, split in zip(log.user, log.split, strict=True):
    groups.setdefault(int(log.users[user][1:]) // 2, set()).add(int(split))
  assert len(groups) == 20
  assert all(len(found) == 1 for found in groups.values())
  chosen = [found.pop() for found in groups.values()]
  assert np.bincount(chosen).tolist() == [16, 2, 2]


def test_group_split_depends_on_the_seed_alone():
  groups = [f'h{i}' for i in range(50)]
  one = splits.split_groups(groups, 0, (.8, .9))
  assert splits.split_groups(groups[::-1], 0, (.8, .9)) == one
  assert splits.split_groups(groups, 1, (.8, .9)) != one


def test_groups_come_from_the_share_of_training_events(tmp_path):
  # 10 training events: a 4, b 3, c 2, d 1; anchors hold more than 20 %.
  log, summary, folder = prepare(
      tmp_path, history('abacabacdb'), split=(1, 0, 0), anchor_share=.2)
  assert json.loads((folder / 'behaviors.json').read_text()) == [
      {'name': name, 'count': n, 'train_count': n, 'share': n / 10,
       'group': group} for name, n, group in (
           ('a', 4, 'anchor'), ('b', 3, 'anchor'), ('c', 2, 'tail'),
           ('d', 1, 'tail'))]
  assert (summary['anchors'], summary['tails'], log.known) == (2, 2, 4)


def test_validation_only_behaviors_are_known_and_test_only_are_not(tmp_path):
  log, summary, _ = prepare(tmp_path, history('babababa' + 'zx'))
  assert [(b.name, b.group) for b in log.behaviors] == [
      ('a', 'anchor'), ('b', 'anchor'), ('z', 'tail'), ('x', 'unseen')]
  assert log.known == 3
  assert names(log)[-1] == 'x'
  assert (summary['unseen'], summary['unseen_test_events']) == (1, 1)
  assert re.search('only in the test split: 1, ', summary['warnings'][-1])


def test_a_log_without_tail_behaviors_warns(tmp_path):
  _, summary, _ = prepare(tmp_path, history('xyxy'))
  assert summary['warnings'][0].startswith('no tail behavior')


def test_test_events_move_no_index_and_no_group(tmp_path):
  # The test split is the last two of each user's twenty events.
  train = 'abacadabacadabacaf'
  logs = []
  for i, ends in enumerate((('ca', 'ca'), ('AZ', 'dc'), ('dc', 'Z0'))):
    first, second = ends
    (tmp_path / str(i)).mkdir()
    lines = history(train + first, 'u') + history(train + second, 'v')
    logs.append(prepare(tmp_path / str(i), lines, anchor_share=.2)[0])
  base = logs[0]
  for log in logs[1:]:
    assert log.known == base.known
    for ours, theirs in zip(log.behaviors, base.behaviors, strict=False):
      assert ours.name == theirs.name and ours.group == theirs.group
      assert ours.share == theirs.share
    np.testing.assert_array_equal(log.split, base.split)
    seen = base.split < 2
    np.testing.assert_array_equal(log.behavior[seen], base.behavior[seen])


# What is set aside.


def test_malformed_rows_are_set_aside_with_their_line(tmp_path):
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
      'u,2024-01-01 10:06,y']  # 12
  log, summary, folder = prepare(tmp_path, lines, max_rejected=.8,
                                 split=(1, 0, 0))
  found = rejected(folder)
  assert [(int(row['line']), row['reason'].split(':')[0]) for row in found] == [
      (3, '2 fields instead of 3'), (7, 'no user'), (8, 'no time'),
      (9, '4 fields instead of 3'), (10, 'broken row'),
      (11, "time 'later' is not a date-time")]
  assert found[4]['text'] == 'u,"2024-01-01 10:05,x'
  assert (summary['rows'], summary['rejected']) == (9, 6)
  assert names(log) == ['x', 'two lines', 'y']


def test_lines_stay_right_across_chunks(tmp_path, monkeypatch):
  monkeypatch.setattr(events, '_LINES', 3)
  monkeypatch.setattr(events, '_CHUNKS', 2)
  lines, expected, number = [], [], 2
  for i in range(60):
    name = f'"b\n{i}"' if i % 5 == 0 else f'b{i}'
    if i % 7 == 3:
      expected.append(number)
      lines.append(f'u,never,{name}')
    else:
      lines.append(f'u,{minute(i)},{name}')
    number += 1 + name.count('\n')
  log, _, folder = prepare(tmp_path, lines, max_rejected=1)
  assert [int(row['line']) for row in rejected(folder)] == expected
  assert len(log.user) == 60 - len(expected)


def test_broken_json_lines_are_set_aside(tmp_path):
  path = tmp_path / 'log.jsonl'
  good = [json.dumps({'user': 3, 'time': 1704103200 + i, 'behavior': b})
          for i, b in enumerate('xyx')]
  path.write_text('\n'.join([
      good[0], '{"user": 3, ', '', '[1]', good[1], '{"user": "\\ud800"}',
      '{"behavior": "x", "time": 5}', good[2]]))
  folder = tmp_path / 'events'
  events.prepare(config(max_rejected=.9, split=(1, 0, 0)), path, folder, 0)
  assert [(int(row['line']), row['reason'].split(':')[0])
          for row in rejected(folder)] == [
              (2, 'broken JSON'), (4, 'not a JSON object'),
              (6, 'not UTF-8 text'), (7, 'no user')]
  assert events.open_events(folder).users == ['3']


def test_parquet_rows_are_counted_from_one(tmp_path):
  path = tmp_path / 'log.parquet'
  pq.write_table(pa.table({
      'user': ['u', None, 'u'], 'behavior': ['x', 'x', 'y'],
      'time': [minute(0), minute(1), minute(2)]}), path)
  folder = tmp_path / 'events'
  events.prepare(config(max_rejected=.9, split=(1, 0, 0)), path, folder, 0)
  assert [(row['line'], row['reason']) for row in rejected(folder)] == [
      ('2', 'no user')]


def test_bytes_that_are_no_text_are_set_aside(tmp_path):
  path = tmp_path / 'log.csv'
  path.write_bytes('\n'.join([HEADER, *history('xyx')]).encode()
                   + b'\nu,2024-01-01 11:00,caf\xe9\n')
  folder = tmp_path / 'events'
  events.prepare(config(max_rejected=.9, split=(1, 0, 0)), path, folder, 0)
  assert [(row['line'], row['reason']) for row in rejected(folder)] == [
      ('5', 'not UTF-8 text')]


# What is refused.


def test_too_many_malformed_rows_name_the_first(tmp_path):
  lines = [*history('xy' * 24), 'u,noon,x', 'u,night,x']
  refuse(tmp_path, lines, 'log.csv line 50', "time 'noon'", '2 of 50', '4.00%',
         'data.max_rejected = 0.01')


def test_a_missing_file_is_refused(tmp_path):
  path = tmp_path / 'none.csv'
  with pytest.raises(InputError, match=r'none\.csv does not exist'):
    events.prepare(config(), path, tmp_path / 'work' / 'events', 0)
  assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize('name, text', [
    ('log.csv', ''), ('log.csv', HEADER + '\n'), ('log.csv', '\n\n'),
    ('log.jsonl', ''), ('log.jsonl', '\n\n')])
def test_an_empty_log_is_refused(tmp_path, name, text):
  (tmp_path / name).write_text(text)
  with pytest.raises(InputError, match=f'{name} (is empty|holds no rows)'):
    events.prepare(config(), tmp_path / name, tmp_path / 'events', 0)
  assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_unknown_format_is_refused(tmp_path):
  refuse(tmp_path, history('xy'), 'log.xlsx', '.parquet', name='log.xlsx')


@pytest.mark.parametrize('name', ['log.csv.gz', 'log.parquet'])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, name):
  refuse(tmp_path, history('xy'), name, name=name)


def test_a_torn_zip_is_refused(tmp_path):
  path = tmp_path / 'log.csv.gz'
  text = '\n'.join([HEADER, *history('xyzzy' * 50)])
  path.write_bytes(gzip.compress(text.encode())[:-20])
  with pytest.raises(InputError, match='cannot be read to its end'):
    events.prepare(config(), path, tmp_path / 'events', 0)
  assert [entry.name for entry in tmp_path.iterdir()] == ['log.csv.gz']


def test_a_parquet_file_with_broken_pages_is_refused(tmp_path):
  path = tmp_path / 'log.parquet'
  rows = [('u', minute(i), f'name {i}') for i in range(200)]
  pq.write_table(pa.table(dict(zip(
      ('user', 'time', 'behavior'), zip(*rows, strict=True), strict=True))),
                 path)
  content = bytearray(path.read_bytes())
  content[4:1500] = bytes(1496)  # the footer stays whole
  path.write_bytes(content)
  with pytest.raises(InputError, match='cannot be read to its end') as error:
    events.prepare(config(), path, tmp_path / 'events', 0)
  assert '\n' not in str(error.value)
  assert [entry.name for entry in tmp_path.iterdir()] == ['log.parquet']


@pytest.mark.parametrize('suffix', ['csv', 'jsonl', 'parquet'])
def test_a_missing_column_names_the_nearest(tmp_path, suffix):
  write_all(tmp_path, [('u', minute(0), 'x')], ('user', 'time', 'behaviour'))
  with pytest.raises(InputError) as error:
    events.prepare(config(), tmp_path / f'log.{suffix}', tmp_path / 'out', 0)
  assert "no column 'behavior'" in str(error.value)
  assert 'data.columns.behavior' in str(error.value)
  assert "nearest: 'behaviour'" in str(error.value)


@pytest.mark.parametrize('name, part', [
    ('', 'is empty'), ('  ', 'is empty'), ('x' * 257, 'has 257 characters')])
def test_an_unusable_behavior_name_is_refused(tmp_path, name, part):
  lines = [*history('xyz'), f'u,2024-01-01 11:00,{name}', 'u,,']
  refuse(tmp_path, lines, 'log.csv line 5', part, max_rejected=.9)


def test_the_longest_name_is_allowed(tmp_path):
  log, _, _ = prepare(tmp_path, history(['ä' * 256, 'y']), split=(1, 0, 0))
  assert 'ä' * 256 in names(log)


def test_a_null_behavior_in_json_is_refused(tmp_path):
  path = tmp_path / 'log.jsonl'
  path.write_text('{"user": 1, "time": 5, "behavior": "x"}\n'
                  '{"user": 1, "time": 6, "behavior": null}\n')
  with pytest.raises(InputError, match='line 2: the behavior name is empty'):
    events.prepare(config(), path, tmp_path / 'events', 0)


def test_fewer_than_two_behaviors_are_refused(tmp_path):
  refuse(tmp_path, history('xxxx'), "1 behavior, 'x'", 'at least 2',
         collapse_repeats=False)


def test_a_log_without_training_events_is_refused(tmp_path):
  refuse(tmp_path, history('x') + history('y', 'v'), 'none of its 2 events',
         'training')


def test_a_user_in_two_groups_is_refused(tmp_path):
  lines = ['u,2024-01-01 10:00,x,g', 'v,2024-01-01 10:00,x,g',
           'u,2024-01-01 10:01,y,h']
  refuse(tmp_path, lines, 'log.csv line 4', "user 'u'", "'g' and 'h'",
         header=HEADER + ',home', group='home')


@pytest.mark.parametrize('split', [(.8, .1), (.8, .3, .1), (1.2, -.1, -.1)])
def test_a_split_that_is_none_is_refused(tmp_path, split):
  refuse(tmp_path, history('xy'), 'data.split', split=split)


def test_what_a_killed_run_left_is_replaced(tmp_path):
  old = tmp_path / 'work' / 'events.tmp'
  old.mkdir(parents=True)
  (old / 'part-00007.arrow').write_text('half')
  _, _, folder = prepare(tmp_path, history('xyzx'))
  assert not (folder / 'part-00007.arrow').exists()
  assert not old.exists()
