"""Whole plans: mixing, packing, the file, seeds, and what may not matter."""

import dataclasses
import itertools

import numpy as np
import pytest

from behaviorlm_jax.data import conversations
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.data import subset as subset_lib
from behaviorlm_jax.errors import InputError


def make_talks():
  """20 conversations of 10 to 29 tokens, 1 to 20 of them answers."""
  return [
    conversations.Conversation(np.full(10 + i, i, np.int32), np.arange(10 + i) >= 9)
    for i in range(20)
  ]


def make_segment(length, answers=1):
  return plan_lib.Segment('window', 0, 5, [4], [1.0], length, answers)


@pytest.fixture
def make_plan(make_windows):
  def make(log, seed=0, stage='a', made_from='me'):
    """A plan as a stage makes it, with conversations and uniform scores."""
    rng = np.random.default_rng(seed)
    windows = make_windows(log, anchors_only=stage == 'a', train__length=300)
    if stage == 'a':
      stream = plan_lib.tile(windows, rng)
    else:
      budget = subset_lib.Budget(windows.samples, 'balanced', 3, 0.5)
      subset = budget.choose(budget.candidates(64, rng), None, 1.0, rng)
      rates = {b: len(s) for b, s in subset.items()}
      weight_of = budget.neighbour_weights(1e4)
      stream = plan_lib.spread(windows, subset, rates, rng, weight_of)
    stream = plan_lib.mix(stream, make_talks(), 0.2, rng)
    return plan_lib.take(stream, 20, 300, made_from)

  return make


@pytest.fixture
def log(make_events):
  generator = np.random.default_rng(3)
  return make_events(
    [''.join(generator.choice(list('abcx'), 40)) for _ in range(4)],
    train=0.8,
    tails='x',
  )


# Mixing and packing.


@pytest.mark.parametrize('share', [0.05, 0.2, 0.6])
def test_conversations_keep_their_share_on_every_prefix(share):
  talks = make_talks()
  sizes = np.random.default_rng(0).integers(1, 60, 10_000)
  windows = (make_segment(9, int(size)) for size in sizes)
  stream = plan_lib.mix(windows, talks, share, np.random.default_rng(0))
  auxiliary, total, order = 0, 0, []
  for segment in itertools.islice(stream, 2000):
    total += segment.answers
    if segment.kind == plan_lib.CONVERSATION:
      talk = talks[segment.start]
      assert segment.length == len(talk.tokens)
      assert segment.answers == talk.answers.sum()
      auxiliary += segment.answers
      order.append(segment.start)
    # Never further off than the one segment that comes next.
    assert -60 * share < auxiliary - share * total < 20
  assert abs(auxiliary / total - share) < 0.01
  for i in range(0, len(order) - 20, 20):  # Shuffled epochs of all of them.
    assert sorted(order[i : i + 20]) == list(range(20))


def test_without_a_share_nothing_is_mixed_in():
  segments = [make_segment(n) for n in (5, 6)]
  assert list(plan_lib.mix(iter(segments), [], 0.0, None)) == segments


def test_packing_fills_rows_to_the_length_and_never_beyond():
  sizes = np.random.default_rng(0).integers(1, 101, 5000).tolist()
  rows = plan_lib.pack(map(make_segment, sizes), 500, 100)
  assert len(rows) == 500
  used = [sum(segment.length for segment in row) for row in rows]
  assert max(used) <= 100
  assert sum(used) / (500 * 100) > 0.9
  packed = sorted(s.length for row in rows for s in row)
  assert packed == sorted(sizes[: len(packed)])  # None skipped, none twice.


def test_packing_moves_a_segment_by_few_rows_alone():
  order = itertools.count()
  segments = (
    dataclasses.replace(make_segment(40), start=next(order)) for _ in range(1000)
  )
  rows = plan_lib.pack(segments, 400, 100)
  for i, row in enumerate(rows):
    assert [s.start for s in row] == [2 * i, 2 * i + 1]
  sizes = [60, 30] + [90] * 80 + [10]  # The first row is no longer open.
  rows = plan_lib.pack(
    map(make_segment, itertools.chain(sizes, itertools.repeat(100))), 90, 100
  )
  assert [s.length for s in rows[0]] == [60, 30]
  assert [s.length for s in rows[17]] == [90, 10]


def test_a_segment_as_long_as_the_row_fills_it_alone():
  rows = plan_lib.pack(map(make_segment, itertools.repeat(100)), 3, 100)
  assert [[s.length for s in row] for row in rows] == [[100]] * 3


# The file.


@pytest.mark.parametrize('stage', ['a', 'b'])
def test_a_plan_is_read_as_it_was_written(tmp_path, make_plan, log, stage):
  plan = make_plan(log, stage=stage)
  assert len(plan.rows) == 20
  answers = [sum(s.answers for s in row) for row in plan.rows]
  assert max(answers) <= plan.answers < max(answers) + 16
  assert plan.answers % 16 == 0
  path = tmp_path / 'plan.parquet'
  plan_lib.save(path, plan, 4)
  assert plan_lib.load(path, 'me') == plan
  kinds = {segment.kind for segment in plan.segments()}
  assert kinds == {'window', 'conversation'}


def test_a_plan_made_from_something_else_is_refused(tmp_path, make_plan, log):
  path = tmp_path / 'plan.parquet'
  plan_lib.save(path, make_plan(log, made_from='1' * 64), 4)
  with pytest.raises(
    InputError, match=(r'plan\.parquet was made from other events.*1{12}, now 2{12}\)')
  ):
    plan_lib.load(path, '2' * 64)


@pytest.mark.parametrize('stage', ['a', 'b'])
def test_the_seed_decides_the_plan(make_plan, log, stage):
  one, same, other = (
    plan_lib.content_hash(make_plan(log, seed, stage)) for seed in (0, 0, 1)
  )
  assert one == same != other


# No leak.


def write_log(tmp_path, prepare, name, test_behaviors):
  """Six users with 60 events each; the last 6 of each are the test split."""
  generator, lines = np.random.default_rng(0), []
  rare = [0.5, 0.25, 0.15, 0.06, 0.04]
  for user in range(6):
    names = []  # Turn about, because immediate repeats would be collapsed.
    for _ in range(27):
      names += [generator.choice([*'cdefg'], p=rare), generator.choice([*'ab'])]
    lines += [
      f'u{user},2024-01-{i // 24 + 1:02d} {i % 24:02d}:00,{name}'
      for i, name in enumerate([*names, *test_behaviors])
    ]
  folder = tmp_path / name
  folder.mkdir()
  return prepare(folder, lines, anchor_share=0.1)[0]


def test_test_events_change_nothing_that_training_sees(tmp_path, prepare, make_plan):
  one = write_log(tmp_path, prepare, 'one', 'pqabcd')
  other = write_log(tmp_path, prepare, 'other', 'rgagsg')
  assert one.known == other.known == 7
  assert one.behavior.tolist() != other.behavior.tolist()
  groups = [
    [(b.name, b.group, b.share, b.train_count) for b in log.behaviors[:7]]
    for log in (one, other)
  ]
  assert groups[0] == groups[1]
  assert {group for _, group, _, _ in groups[0]} == {'anchor', 'tail'}
  pools = [
    subset_lib.Budget(
      samples_lib.of_split(log, 'train', 4), 'balanced', 9, 0.5
    ).candidates(9, np.random.default_rng(0))
    for log in (one, other)
  ]
  assert all((pools[0][b] == pools[1][b]).all() for b in range(7))
  for stage in ('a', 'b'):
    plans = [make_plan(log, stage=stage) for log in (one, other)]
    assert plans[0] == plans[1]
