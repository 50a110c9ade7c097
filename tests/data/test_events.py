"""Events: what comes out of a log, how it is split, and what is refused."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest

from behaviorlm_jax.data import events
from behaviorlm_jax.data.log import columns, join, shards, splits
from behaviorlm_jax.errors import InputError

HEADER = 'user,time,behavior'


# What comes out.


def test_events_are_sorted_by_user_and_time_with_ties_in_file_order(
  tmp_path, prepare, names
):
  lines = [
    'b,2024-01-01 10:00,x',
    'a,2024-01-02 10:00,z',
    'a,2024-01-01 10:00,y',
    'a,2024-01-01 10:00,x',
    'b,2024-01-01 09:00,y',
  ]
  log, _, _ = prepare(tmp_path, lines, split=(1, 0, 0))
  assert list(log.users) == ['a', 'b']
  assert log.user.tolist() == [0, 0, 0, 1, 1]
  assert names(log) == ['y', 'x', 'z', 'y', 'x']
  assert log.first.tolist() == [0, 0, 0, 3, 3]
  assert log.place.tolist() == [-1] * 5
  assert {
    name: getattr(log, name).dtype.name
    for name in ('user', 'time', 'behavior', 'place', 'split', 'first')
  } == {
    'user': 'int32',
    'time': 'int64',
    'behavior': 'int32',
    'place': 'int32',
    'split': 'int8',
    'first': 'int64',
  }


def test_seconds_are_floored_before_1970(tmp_path, prepare):
  lines = ['u,1969-12-31 23:59:58.5,x', 'u,1969-12-31 23:59:59,y']
  log, _, _ = prepare(tmp_path, lines, split=(1, 0, 0), time_format='iso')
  assert log.time.tolist() == [-2, -1]


def test_duplicates_are_dropped_and_repeats_collapsed(tmp_path, prepare, names):
  lines = [
    'u,2024-01-01 10:00,x',
    'u,2024-01-01 10:00,y',
    'u,2024-01-01 10:00,x',
    'u,2024-01-01 10:05,y',
    'u,2024-01-01 10:06,z',
    'v,2024-01-01 10:07,z',
  ]
  log, summary, _ = prepare(tmp_path, lines, split=(1, 0, 0))
  assert names(log) == ['x', 'y', 'z', 'z']
  assert (summary['duplicates'], summary['repeats']) == (1, 1)
  # The first of the repeats is the one that stays.
  assert log.time[1] == log.time[0]


def test_repeats_stay_when_asked(tmp_path, history, prepare, names):
  log, summary, _ = prepare(
    tmp_path, history('xxyy'), split=(1, 0, 0), collapse_repeats=False
  )
  assert names(log) == list('xxyy')
  assert summary['repeats'] == 0


def test_places_are_indexed_and_may_be_missing(tmp_path, prepare):
  lines = [
    'u,2024-01-01 10:00,x,sea',
    'u,2024-01-01 10:01,y,',
    'u,2024-01-01 10:02,x,home',
  ]
  log, _, _ = prepare(
    tmp_path, lines, header=HEADER + ',where', place='where', split=(1, 0, 0)
  )
  assert list(log.places) == ['home', 'sea']
  assert log.place.tolist() == [1, -1, 0]


def test_blocks_change_neither_events_nor_fingerprint(
  tmp_path, monkeypatch, history, prepare
):
  lines = history('xyzzwxyzwxz') + history('zyyx', 'v') + history('xy', 'w')
  (tmp_path / 'a').mkdir()
  (tmp_path / 'b').mkdir()
  one, first, _ = prepare(tmp_path / 'a', lines)
  monkeypatch.setattr(shards, '_BATCH', 4)
  monkeypatch.setattr(join, '_BLOCK', 4)
  monkeypatch.setattr(columns, '_BATCH', 2)
  many, second, _ = prepare(tmp_path / 'b', lines)
  assert first == second
  for name in columns.DTYPES:
    np.testing.assert_array_equal(getattr(one, name), getattr(many, name))


def test_the_fingerprint_is_that_of_the_columns_and_names(tmp_path, history, prepare):
  lines = [*history('xyzw', 'ü'), 'v,2024-01-01 10:00,x']
  log, summary, _ = prepare(tmp_path, lines)
  digests = {
    name: hashlib.sha256(getattr(log, name)).hexdigest()
    for name in ('user', 'time', 'behavior', 'place', 'split')
  }
  text = json.dumps(
    [
      digests,
      list(log.users),
      list(log.places),
      [[b.name, b.group] for b in log.behaviors],
    ]
  )
  assert summary['fingerprint'] == hashlib.sha256(text.encode()).hexdigest()


def test_fingerprint_follows_the_log(tmp_path, history, prepare):
  prints = set()
  for i, text in enumerate(('xyzx', 'xyzy', 'xyzw')):
    (tmp_path / str(i)).mkdir()
    prints.add(prepare(tmp_path / str(i), history(text))[0].fingerprint)
  assert len(prints) == 3


def test_the_folder_holds_its_files_and_nothing_else(tmp_path, history, prepare):
  log, summary, folder = prepare(tmp_path, history('xyzwxyzwxz'))
  assert sorted(path.name for path in folder.iterdir()) == [
    'behavior.npy',
    'behaviors.json',
    'first.npy',
    'place.npy',
    'places.arrow',
    'rejected.csv',
    'split.npy',
    'summary.json',
    'time.npy',
    'user.npy',
    'users.arrow',
  ]
  assert [path.name for path in folder.parent.iterdir()] == ['events']
  assert json.loads((folder / 'summary.json').read_text()) == summary
  assert (folder / 'rejected.csv').read_text() == 'line,reason,text\n'
  assert not log.user.flags.owndata  # mapped, not copied


# Splits and groups.


def test_split_by_time_follows_the_rule(tmp_path, history, prepare):
  lines = history('abcdefghijk') + history('ab', 'v') + history('abc', 'w')
  log, summary, _ = prepare(tmp_path, lines)
  # n = 11: floor(8.8) train, up to floor(9.9); n = 2: 1, 1; n = 3: 2, 2.
  assert log.split.tolist() == [0] * 8 + [1] + [2] * 2 + [0, 2] + [0, 0, 2]
  assert summary['splits'] == {'train': 11, 'validation': 1, 'test': 4}


def test_a_cut_loses_nothing_to_rounding(tmp_path, history, prepare):
  assert 0.29 * 100 < 29
  log, _, _ = prepare(tmp_path, history('ab' * 50), split=(0.29, 0.3, 0.41))
  assert np.bincount(log.split).tolist() == [29, 30, 41]


def test_group_split_keeps_groups_whole(tmp_path, history, prepare):
  header = HEADER + ',home'
  lines = [line + f',h{u // 2}' for u in range(40) for line in history('xyz', f'u{u}')]
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
  one = splits.split_groups(groups, 0, (0.8, 0.9))
  assert splits.split_groups(groups[::-1], 0, (0.8, 0.9)) == one
  assert splits.split_groups(groups, 1, (0.8, 0.9)) != one


def test_groups_come_from_the_share_of_training_events(tmp_path, history, prepare):
  # 10 training events: a 4, b 3, c 2, d 1; anchors hold more than 20 %.
  log, summary, folder = prepare(
    tmp_path, history('abacabacdb'), split=(1, 0, 0), anchor_share=0.2
  )
  assert json.loads((folder / 'behaviors.json').read_text()) == [
    {'name': name, 'count': n, 'train_count': n, 'share': n / 10, 'group': group}
    for name, n, group in (
      ('a', 4, 'anchor'),
      ('b', 3, 'anchor'),
      ('c', 2, 'tail'),
      ('d', 1, 'tail'),
    )
  ]
  assert (summary['anchors'], summary['tails'], log.known) == (2, 2, 4)


def test_validation_only_behaviors_are_known_and_test_only_are_not(
  tmp_path, history, prepare, names
):
  log, summary, _ = prepare(tmp_path, history('babababa' + 'zx'))
  assert [(b.name, b.group) for b in log.behaviors] == [
    ('a', 'anchor'),
    ('b', 'anchor'),
    ('z', 'tail'),
    ('x', 'unseen'),
  ]
  assert log.known == 3
  assert names(log)[-1] == 'x'
  assert (summary['unseen'], summary['unseen_test_events']) == (1, 1)
  assert re.search('only in the test split: 1, ', summary['warnings'][-1])


def test_a_log_without_tail_behaviors_warns(tmp_path, history, prepare):
  _, summary, _ = prepare(tmp_path, history('xyxy'))
  assert summary['warnings'][0].startswith('no tail behavior')


def test_test_events_move_no_index_and_no_group(tmp_path, history, prepare):
  # The test split is the last two of each user's twenty events.
  train = 'abacadabacadabacaf'
  logs = []
  for i, ends in enumerate((('ca', 'ca'), ('AZ', 'dc'), ('dc', 'Z0'))):
    first, second = ends
    (tmp_path / str(i)).mkdir()
    lines = history(train + first, 'u') + history(train + second, 'v')
    logs.append(prepare(tmp_path / str(i), lines, anchor_share=0.2)[0])
  base = logs[0]
  for log in logs[1:]:
    assert log.known == base.known
    for ours, theirs in zip(log.behaviors, base.behaviors, strict=False):
      assert ours.name == theirs.name and ours.group == theirs.group
      assert ours.share == theirs.share
    np.testing.assert_array_equal(log.split, base.split)
    seen = base.split < 2
    np.testing.assert_array_equal(log.behavior[seen], base.behavior[seen])


# What is refused.


def test_too_many_malformed_rows_name_the_first(tmp_path, history, refuse):
  lines = [*history('xy' * 24), 'u,noon,x', 'u,night,x']
  refuse(
    tmp_path,
    lines,
    'log.csv line 50',
    "time 'noon'",
    '2 of 50',
    '4.00%',
    'data.max_rejected = 0.01',
  )


def test_a_missing_file_is_refused(tmp_path, log_config):
  path = tmp_path / 'none.csv'
  with pytest.raises(InputError, match=r"none\.csv' does not exist"):
    events.prepare(log_config(), path, tmp_path / 'work' / 'events', 0)
  assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize(
  'name, reason',
  [
    ('', 'no behavior'),
    ('  ', 'no behavior'),
    ('NaN', "behavior 'NaN' means none (data.nulls)"),
    ('x' * 257, 'behavior of 257 characters (at most 256)'),
  ],
)
def test_a_row_without_a_usable_behavior_is_malformed(
  tmp_path, name, reason, history, prepare, refuse
):
  lines = [*history('xyz'), f'u,2024-01-01 11:00,{name}']
  _, summary, folder = prepare(tmp_path, lines, max_rejected=0.9)
  assert (folder / 'rejected.csv').read_text().splitlines()[1] == (
    f'5,{reason},"u,2024-01-01 11:00,{name}"'.replace(
      reason, f'"{reason}"' if ',' in reason else reason
    )
  )
  assert summary['rejected'] == 1
  shutil.rmtree(tmp_path / 'work')
  refuse(tmp_path, lines, 'log.csv line 5', reason, '1 of 4 rows')


def test_the_longest_name_is_allowed(tmp_path, history, prepare, names):
  log, _, _ = prepare(tmp_path, history(['ä' * 256, 'y']), split=(1, 0, 0))
  assert 'ä' * 256 in names(log)


def test_fewer_than_two_behaviors_are_refused(tmp_path, history, refuse):
  refuse(
    tmp_path,
    history('xxxx'),
    "one behavior alone, 'x'",
    'at least 2',
    'of 4 rows 0 were malformed, 0 duplicates and 3 immediate repeats',
  )
  refuse(
    tmp_path, history('xxxxxxxxxy'), "holds 1 behavior, 'x'", collapse_repeats=False
  )


def test_a_log_without_training_events_is_refused(tmp_path, history, refuse):
  refuse(tmp_path, history('x') + history('y', 'v'), 'none of its 2 events', 'training')


def test_a_user_in_two_groups_is_refused(tmp_path, refuse):
  lines = ['u,2024-01-01 10:00,x,g', 'v,2024-01-01 10:00,x,g', 'u,2024-01-01 10:01,y,h']
  refuse(
    tmp_path,
    lines,
    'log.csv line 4',
    "user 'u'",
    "'g' and 'h'",
    header=HEADER + ',home',
    group='home',
  )


@pytest.mark.parametrize('split', [(0.8, 0.1), (0.8, 0.3, 0.1), (1.2, -0.1, -0.1)])
def test_a_split_that_is_none_is_refused(tmp_path, split, history, refuse):
  refuse(tmp_path, history('xy'), 'data.split', split=split)


def test_what_a_killed_run_left_is_replaced(tmp_path, history, prepare):
  old = tmp_path / 'work' / 'events.tmp'
  old.mkdir(parents=True)
  (old / 'place.npz').write_text('half')
  for name in ('events.whole', 'events.whole.tmp'):
    (tmp_path / 'work' / name).mkdir()
  _, _, folder = prepare(tmp_path, history('xyzx'))
  assert [path.name for path in folder.parent.iterdir()] == ['events']
  assert not (folder / 'place.npz').exists()
  assert not old.exists()
