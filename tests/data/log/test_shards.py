"""A log prepared in parts, one task each, is the log prepared at once."""

import numpy as np
import pyarrow as pa
import pytest

from behaviorlm_jax.data import events
from behaviorlm_jax.data.log import columns, join, shards, sources
from behaviorlm_jax.errors import InputError

HEADER = 'user,time,behavior,where,home'


def write_log(tmp_path, minute, users=23):
  """Users that come in turns, with repeats, duplicates, and one bad row."""
  rng = np.random.default_rng(0)
  lines = [HEADER]
  for i in range(600):
    user = int(rng.integers(users) * rng.random())
    lines.append(
      f'u{user},{minute(i // 2)},{rng.choice(list("abcxyzüß"))},'
      f'{rng.choice(["", "sea", "home", f"p{user}"])},h{user // 3}'
    )
    if rng.random() < 0.05:
      lines.append(lines[-1])
  lines.insert(7, 'u1,noon,a,,h0')
  path = tmp_path / 'log.csv'
  path.write_text('\n'.join(lines) + '\n')
  return path


def prepare_in_parts(data, path, folder, count):
  log = sources.open_log(path, data)
  folders = [folder / f'{i}-of-{count}' for i in range(count)]
  for i in reversed(range(count)):
    shards.write_shard(log, folders[i], (i, count))
  return join.join(log, folders, folder / 'events', 0)


@pytest.mark.slow
@pytest.mark.parametrize(
  'fields', [{'place': 'where'}, {'group': 'home'}, {'collapse_repeats': False}]
)
@pytest.mark.parametrize('count', [1, 2, 5, 40])
def test_parts_joined_are_the_whole(
  tmp_path, monkeypatch, log_config, minute, fields, count
):
  data, path = log_config(**fields), write_log(tmp_path, minute)
  summary = events.prepare(data, path, tmp_path / 'whole', 0)
  monkeypatch.setattr(join, '_BLOCK', 50)
  joined = prepare_in_parts(data, path, tmp_path / 'parts', count)
  assert joined == summary and summary['rejected'] == 1
  assert summary['duplicates'] > 10
  whole, parts = map(
    events.open_events, (tmp_path / 'whole', tmp_path / 'parts' / 'events')
  )
  for name in columns.DTYPES:
    np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
  assert list(whole.users) == list(parts.users)
  assert list(whole.places) == list(parts.places)
  for name in ('behaviors.json', 'summary.json', 'rejected.csv'):
    assert (tmp_path / 'whole' / name).read_bytes() == (
      tmp_path / 'parts' / 'events' / name
    ).read_bytes()


@pytest.mark.parametrize('size', [1, 2, 5, 1000])
def test_of_equal_rows_the_first_stays_whatever_the_batches(size):
  rng = np.random.default_rng(0)
  rows = sorted(zip(*rng.integers(0, 3, (2, 200)).tolist(), strict=True))
  rows = [(*row, 0, *rng.integers(0, 2, 2).tolist()) for row in rows]
  batches = [
    pa.RecordBatch.from_arrays(
      [pa.array(column) for column in zip(*rows[i : i + size], strict=True)],
      names=['user', 'instant', 'shift', 'behavior', 'place'],
    )
    for i in range(0, len(rows), size)
  ]
  found = [
    row
    for columns in shards._without_duplicates(batches)
    for row in zip(*(c.tolist() for c in columns), strict=True)
  ]
  assert found == list(dict.fromkeys(rows))


def test_every_user_is_in_one_shard(tmp_path, log_config, minute):
  log = sources.open_log(write_log(tmp_path, minute), log_config())
  users = []
  for i in range(5):
    shards.write_shard(log, tmp_path / str(i), (i, 5))
    users += columns.MappedNames(tmp_path / str(i) / 'users.arrow')
  assert len(users) == len(set(users)) > 15


def test_shards_that_lack_rows_are_refused(tmp_path, log_config, minute):
  log = sources.open_log(write_log(tmp_path, minute), log_config())
  for i in range(2):
    shards.write_shard(log, tmp_path / str(i), (i, 3))
  with pytest.raises(InputError, match=r'hold \d+ of the 6\d\d rows'):
    join.join(log, [tmp_path / '0', tmp_path / '1'], tmp_path / 'x', 0)
  assert not (tmp_path / 'x').exists()


def test_malformed_rows_of_all_parts_count(tmp_path, log_config, minute):
  path = write_log(tmp_path, minute)
  bad = [f'u{i},noon,a,,h{i // 3}' for i in range(12)]
  path.write_text(path.read_text() + '\n'.join(bad) + '\n')
  data = log_config(max_rejected=0.015)  # 13 of 6xx are 2 %.
  with pytest.raises(InputError) as whole:
    events.prepare(data, path, tmp_path / 'whole', 0)
  assert 'log.csv line 8: ' in str(whole.value) and '13 of ' in str(whole.value)
  with pytest.raises(InputError) as parts:
    prepare_in_parts(data, path, tmp_path / 'parts', 3)
  assert str(parts.value) == str(whole.value)
  # One that is above the share by itself is refused at once.
  with pytest.raises(InputError, match=r'line 8: .* 13 of 6\d\d rows'):
    shards.write_shard(
      sources.open_log(path, log_config(max_rejected=0.001)), tmp_path / 'x'
    )
  assert not list(tmp_path.glob('x*'))
