"""Thinned logs: what goes, and what stays as it was."""

import pytest

from behaviorlm_jax.cluster import workspace
from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.data import prepared
from behaviorlm_jax.report import run_files
from behaviorlm_jax.sweep import few_shot

TAILS = ('airport', 'hotel')


@pytest.fixture
def config(make_run_config, make_log, tmp_path, monkeypatch):
  """Of 40 users with 40 events each; a tail is frequent from 2 events on."""
  monkeypatch.setattr(few_shot, 'FROM', 2)
  log = make_log(tmp_path / 'log.csv')
  return make_run_config({'data.events': str(log), 'data.anchor_share': 0.05})


@pytest.fixture
def thinned(config, tmp_path):
  def thin(shots, **fields):
    folder = tmp_path / f'{len(list(tmp_path.iterdir()))}'
    other = config.copy_and_resolve_references()
    other.update(fields)
    few_shot.thin(other, folder, shots)
    return folder

  return thin


def rows(events):
  """[(user, time, behavior, split)]."""
  return [
    (events.users[user], int(time), events.behaviors[behavior].name, int(split))
    for user, time, behavior, split in zip(
      events.user, events.time, events.behavior, events.split, strict=True
    )
  ]


def test_tails_keep_some_training_events_and_the_rest_stays(config, thinned, tmp_path):
  whole = prepared.load_events(config, workspace.local(tmp_path / 'whole'))
  every, earlier = rows(whole), set()
  some = {row[:2] for row in every if row[2] in TAILS and row[3] == 0}
  assert len(some) == 8 and len(set(every)) == len(every)
  for shots in (0, 1, 3, 100):
    folder = thinned(shots)
    events = prepared.load_events(
      config, workspace.local(folder)
    )  # A run takes them as its own.
    left = rows(events)
    assert [row for row in every if row in set(left)] == left
    gone = set(every) - set(left)
    assert {row[:2] for row in gone} <= some  # So other splits are whole.
    kept = {row for row in left if row[2] in TAILS and row[3] == 0}
    assert earlier <= kept and len(kept) == 2 * min(shots, 4)
    earlier = kept
    first = [events.user.tolist().index(user) for user in events.user]
    assert events.first.tolist() == first
    assert [(b.name, b.group) for b in events.behaviors] == (
      [(b.name, b.group) for b in whole.behaviors]
    )
    for b in events.behaviors:
      mine = [row for row in left if row[2] == b.name]
      assert b.count == len(mine)
      assert b.train_count == sum(row[3] == 0 for row in mine)
    run = run_files.read_run(folder)
    assert run.summary['events'] == sum(run.summary['splits'].values()) == len(left)
    assert sorted(few_shot.thinned_names(run)) == list(TAILS)
    assert events.fingerprint != whole.fingerprint
    assert [path.name for path in folder.iterdir()] == ['events']


def test_another_seed_keeps_others(thinned):
  kept = [
    rows(events_lib.open_events(thinned(1, seed=seed) / 'events')) for seed in range(5)
  ]
  assert len({tuple(one) for one in kept}) > 1
  assert rows(events_lib.open_events(thinned(1, seed=0) / 'events')) == kept[0]
