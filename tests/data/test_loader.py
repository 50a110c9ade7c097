"""The loader: exact arrays, exact resume, hosts, threads and errors."""

import dataclasses
import itertools

import numpy as np
import pytest

from behaviorlm_jax.data import conversations, loader
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.score import label_tree

BATCH, STEPS = 4, 6
HEADER = b'User: Go on.\nAssistant:\n'  # Of the tokenizer without template.


def make_talks():
  """Conversations of 12 to 16 tokens, the last 3 of them answers."""
  return [
    conversations.Conversation(
      np.arange(200, 212 + i, dtype=np.int32), np.arange(12 + i) >= 9 + i
    )
    for i in range(5)
  ]


@pytest.fixture
def prompts(make_events, make_tokenizer, prompts_of):
  """Byte tokens; lines such as '00:00 a'."""
  generator = np.random.default_rng(0)
  histories = ['abcab'] + [''.join(generator.choice(list('abc'), 30)) for _ in range(3)]
  return prompts_of(make_events(histories), make_tokenizer(None), weekday=False)


@pytest.fixture
def windows(prompts):
  """Of at most 8 events and 3 targets, in rows of 160 tokens."""
  samples = samples_lib.of_split(prompts.events, 'train', 4)
  return plan_lib.Windows(prompts, samples, 8, 3, 160)


@pytest.fixture
def plan(windows):
  """A plan with packed windows and conversations."""
  rng = np.random.default_rng(0)
  stream = plan_lib.mix(plan_lib.tile(windows, rng), make_talks(), 0.2, rng)
  return plan_lib.take(stream, STEPS * BATCH, 160, '')


@pytest.fixture
def assemble(prompts, plan):
  return loader.Assembler(prompts, make_talks(), 160, plan.answers)


def check_same(found, expected):
  assert len(found) == len(expected)
  for one, other in zip(found, expected, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
      assert one[name].dtype == other[name].dtype


# Arrays.


def test_a_row_of_packed_segments_becomes_these_arrays(prompts):
  talk = conversations.Conversation(
    np.array([70, 71, 72, 73], np.int32), np.array([0, 1, 1, 0], bool)
  )
  row = [
    plan_lib.Segment('window', 0, 2, [1], [0.5], 40, 3),
    plan_lib.Segment('conversation', 0, 0, [], [], 4, 2),
    plan_lib.Segment('window', 2, 5, [2, 4], [0.25, 1.0], 48, 6),
  ]
  arrays = loader.Assembler(prompts, [talk], 110, 16)(row)
  first = HEADER + b'00:00 a\n01:00 b\n'
  third = HEADER + b'02:00 c\n03:00 a\n04:00 b\n'
  assert (len(HEADER), len(first), len(third)) == (24, 40, 48)
  expected = {
    'tokens': [*first, 70, 71, 72, 73, *third] + [0] * 18,
    'segments': [1] * 40 + [2] * 4 + [3] * 48 + [0] * 18,
    'positions': [*range(40), *range(4), *range(48)] + [0] * 18,
    # Where the token before each answer token stands.
    'answer_positions': [36, 37, 38, 40, 41, 72, 73, 74, 88, 89, 90] + [0] * 5,
    'answer_tokens': [*b' b\n', 71, 72, *b' c\n', *b' b\n'] + [0] * 5,
    'answer_nodes': [-1] * 16,
    'answer_weights': [0.5] * 3 + [1.0] * 2 + [0.25] * 3 + [1.0] * 3 + [0] * 5,
    'samples': 3,
  }
  assert {name: array.tolist() for name, array in arrays.items()} == expected
  assert {name: array.dtype.name for name, array in arrays.items()} == {
    **dict.fromkeys(expected, 'int32'),
    'answer_weights': 'float32',
  }
  predicted = arrays['answer_positions'][:11] + 1
  assert arrays['tokens'][predicted].tolist() == expected['answer_tokens'][:11]


def test_within_names_only_what_tells_them_apart_is_taught(prompts, windows):
  """Of the answers ' a', ' b' and ' c' all begin alike."""
  talk = conversations.Conversation(
    np.array([70, 71, 72], np.int32), np.array([0, 1, 1], bool)
  )
  row = [
    plan_lib.Segment('conversation', 0, 0, [], [], 3, 2),
    plan_lib.Segment('window', 2, 5, [2, 4], [0.25, 1.0], 48, 2),
  ]
  tree = label_tree.build(label_tree.shortest(prompts.labels))
  arrays = loader.Assembler(prompts, [talk], 60, 8, tree)(row)
  assert tree.tokens.tolist() == [*b' ']
  taught = arrays['answer_positions'][:4] + 1
  assert arrays['answer_tokens'].tolist() == [71, 72, *b'cb', 0, 0, 0, 0]
  assert arrays['tokens'][taught].tolist() == [71, 72, *b'cb']
  assert arrays['answer_nodes'].tolist() == [-1, -1, 1, 1, -1, -1, -1, -1]
  assert arrays['answer_weights'].tolist() == [1, 1, 0.25, 1, 0, 0, 0, 0]
  windows = dataclasses.replace(windows, tree=tree)
  assert windows.make(0, [4], [1.0]).answers == 1


def test_a_planned_row_has_the_tokens_and_answers_of_its_plan(plan, assemble):
  assert any(len(row) > 1 for row in plan.rows)
  for row in plan.rows:
    arrays = assemble(row)
    used = sum(segment.length for segment in row)
    assert (arrays['segments'] > 0).sum() == used
    for number, segment in enumerate(row, start=1):
      inside = arrays['segments'] == number
      assert inside.sum() == segment.length
      where = arrays['answer_positions'][arrays['answer_weights'] > 0]
      assert inside[where].sum() == segment.answers


# Order.


def test_batches_are_the_plan_in_its_order_and_end_with_it(plan, assemble):
  found = list(loader.batches(plan, assemble, BATCH))
  assert len(found) == STEPS
  rows = [assemble(row) for row in plan.rows]
  check_same(
    found,
    [
      {name: np.stack([row[name] for row in rows[i : i + BATCH]]) for name in rows[0]}
      for i in range(0, len(rows), BATCH)
    ],
  )


def test_a_resume_at_any_step_gives_the_remaining_batches(plan, assemble):
  whole = list(loader.batches(plan, assemble, BATCH))
  for step in range(STEPS + 1):
    check_same(list(loader.batches(plan, assemble, BATCH, step)), whole[step:])


@pytest.mark.parametrize('step', [0, 3])
def test_the_rows_of_two_hosts_are_the_global_batch(plan, assemble, step):
  whole = list(loader.batches(plan, assemble, BATCH, step))
  hosts = [
    loader.batches(plan, assemble, BATCH, step, own)
    for own in ([0], list(range(1, BATCH)))
  ]
  check_same(
    [
      {name: np.concatenate([one[name], other[name]]) for name in one}
      for one, other in zip(*hosts, strict=True)
    ],
    whole,
  )


@pytest.mark.parametrize('threads', [0, 2, 5])
def test_the_number_of_threads_changes_nothing(plan, assemble, threads):
  whole = list(loader.batches(plan, assemble, BATCH))
  found = loader.batches(plan, assemble, BATCH, 1, threads=threads)
  check_same(list(found), whole[1:])


# Errors.


@pytest.mark.parametrize('threads', [0, 1, 4])
def test_a_poisoned_record_raises_and_is_not_the_end(plan, assemble, threads):
  def poisoned(row):
    if row is plan.rows[2 * BATCH + 1]:
      raise RuntimeError('poisoned')
    return assemble(row)

  batches = loader.batches(plan, poisoned, BATCH, threads=threads)
  assert len(list(itertools.islice(batches, 2))) == 2
  with pytest.raises(RuntimeError, match='poisoned'):
    next(batches)


@pytest.mark.parametrize('fault', [IndexError, KeyError])
def test_an_error_that_looks_like_an_end_is_none(plan, assemble, fault):
  def poisoned(row):
    if row is plan.rows[BATCH]:
      raise fault('poisoned')
    return assemble(row)

  with pytest.raises(fault, match='poisoned'):
    list(loader.batches(plan, poisoned, BATCH))
