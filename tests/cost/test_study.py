"""What is compiled ahead of time is what runs, and what is said of it."""

import re
import types

import jax
import pytest

from behaviorlm_jax import measure, setup
from behaviorlm_jax import run as run_lib
from behaviorlm_jax.cluster import workspace
from behaviorlm_jax.cost import programs, study
from behaviorlm_jax.data import questions
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.train import loop, sharding, trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compile_once')]


class Caught(Exception):
  """Training was about to take its first step."""


def text(lowered):
  """The compiled module, without where in the source its parts come from."""
  return re.sub(
    r'(, )?metadata=\{[^}]*\}|stack_frame_id=\d+|FileNames.*',
    '',
    lowered.compile().as_text(),
    flags=re.DOTALL,
  )


@pytest.fixture
def open_run(make_run_config, tmp_path):

  def make(fields, shapes_only):
    config = study.settle(make_run_config({'stages': ('a',), **fields}))
    return setup.open_setup(
      config,
      workspace.local(tmp_path),
      sharding.make_layout(config.mesh, config.train),
      shapes_only,
    )

  return make


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'train.batch': 4, 'train.accumulate': 2, 'a.prior': 'natural'},
    {'model.remat': 'full'},
  ],
)
def test_the_step_compiled_ahead_is_the_one_that_trains(
  open_run, fields, monkeypatch, make_run_config, tmp_path
):
  seen = types.SimpleNamespace()

  make = trainer.Trainer.step

  def noted(self, lesson):
    seen.make, seen.params = make(self, lesson), self.model.params
    return seen.make

  def caught(task, state, advance, batches, *_):
    seen.step = seen.make.lower(state, seen.params, next(batches))
    raise Caught

  monkeypatch.setattr(trainer.Trainer, 'step', noted)
  monkeypatch.setattr(loop, 'run', caught)
  config = make_run_config({'stages': ('a',), **fields})
  with pytest.raises(Caught):
    run_lib.run(config, tmp_path)
  this = open_run(fields, shapes_only=True)
  plan = programs.first_plan(this)
  assert text(programs.training(this, plan)) == text(seen.step)


def test_the_programs_compiled_ahead_are_those_that_score(open_run, monkeypatch):
  ahead = open_run({}, shapes_only=True)
  this = open_run({}, shapes_only=False)
  seen, scorer = [], this.scorer

  def note(program):
    def noted(*arguments):
      seen.append(text(program.lower(*arguments)))
      return program(*arguments)

    return noted

  for name in ('_read', '_ask'):
    monkeypatch.setattr(scorer, name, note(getattr(scorer, name)))
  length, windows = measure.packed(this, this.samples.test)
  rows = [questions.row_of(this.prompts, row, length) for row in windows[:2]]
  scorer(setup.first_adapter(this, 'a'), rows)
  assert list(map(text, programs.scoring(ahead).values())) == seen[:2]


def test_no_weight_is_read(open_run, monkeypatch):
  monkeypatch.setattr(sharding.Layout, 'place', None)
  this = open_run(
    {'model.address': 'random://llama-3.1-70b', 'train.length': 1024}, shapes_only=True
  )
  size = sum(x.size for x in jax.tree.leaves(this.model.params))
  assert round(size / 1e9, 1) == 70.6


def test_products_needed_leave_out_what_is_computed_twice(open_run):
  fields = {'train.length': 256}
  counts = {}
  for remat in ('none', 'products', 'full'):
    this = open_run(fields | {'model.remat': remat}, shapes_only=True)
    counts[remat] = programs.training_flops(this, programs.first_plan(this))
  assert counts['none'][0] == counts['none'][1]
  assert counts['none'][0] <= counts['products'][0] < counts['full'][0]
  assert len({needed for _, needed in counts.values()}) == 1


def test_stage_b_is_planned_without_difficulty(make_run_config):
  config = make_run_config({'stages': ('b',), 'difficulty.score': 'nll'})
  assert study.settle(config).difficulty.score == 'random'


def test_a_topology_without_libtpu_is_one_sentence():
  sentence = r"--topology=v5e:4x4 cannot be compiled for \(.*\); install '.\[tpu\]'"
  with pytest.raises(InputError, match=sentence):
    study.devices_of('v5e:4x4', 1)


def test_a_search_lists_the_largest_micro_batches_that_fit_best_first(
  open_run, monkeypatch
):
  config = open_run({'train.batch': 8}, shapes_only=True).config
  # (seconds of a step, the fewest micro-batches that fit).
  known = {
    (8, 1, 1): (3.0, 1),
    (1, 8, 1): (1.0, 1),
    (1, 1, 8): (0.5, 16),
    (4, 2, 1): (2.0, 4),
  }

  def costs(other, devices, folder, scoring):
    assert not scoring
    mesh = tuple(other.mesh[axis] for axis in sharding.AXES)
    if mesh not in known:
      raise InputError('this mesh divides no batch.')
    seconds, fewest = known[mesh]
    yield (
      'training step',
      types.SimpleNamespace(
        fits=other.train.accumulate >= fewest,
        seconds=seconds,
        peak=2**30,
        binds='memory',
        mfu=lambda seconds: 0.5,
      ),
    )

  monkeypatch.setattr(study, 'costs', costs)
  lines = study.search(config, range(8), '').splitlines()
  assert [line.split(' | ')[0] for line in lines[2:8]] == [
    f'| {setting}, {remat}'
    for setting in ('1 x 8 x 1, 1', '4 x 2 x 1, 4', '8 x 1 x 1, 1')
    for remat in ('full', 'products')
  ]
  # Four micro-batches of one mesh, two of another, for each policy.
  assert lines[-1] == '12 more do not fit.'
