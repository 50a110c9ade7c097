"""The arms of benchmarks/supervision.py: plan, state and clock of each.

All arms share base weights and the adapter they begin with; each has its own
plan, adapter and optimizer state. `Validation` asks all of them the same
questions.
"""

import collections
import itertools
import time

import common
import jax
import numpy as np
from absl import logging

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data import loader
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.evaluate import evaluation
from behaviorlm_jax.model import lora
from behaviorlm_jax.train import step as step_lib
from behaviorlm_jax.train.loss import Loss

CONTEXT = 8  # Events before a window's first target.
WARMUP = 5  # Steps of linear warm-up; then the learning rate is constant.
_ENDLESS = 1_000_000  # Steps.


def arm_config(config, arm):
  """The config of an arm, '24' or '24@16': targets, events of context."""
  targets, _, context = arm.partition('@')
  if not all(x.isdecimal() and int(x) for x in (targets, context or '1')):
    raise InputError(
      f'--arms: {arm!r} is no arm; give targets per row, like '
      '24, or with the events of context, like 24@16.'
    )
  targets, context = int(targets), int(context or CONTEXT)
  least, most = config.plan.min_context, config.data.history
  if not least <= context <= most:
    raise InputError(
      f'--arms: {arm} has {context} events of context, but plan.min_context '
      f'is {least} and data.history {most}; choose a number between them.'
    )
  config = config.copy_and_resolve_references()
  config.plan.update({'targets_per_row': targets, 'window': context + targets})
  return config


class Shared:
  """What the arms have in common: base weights, first state, the step."""

  def __init__(self, inputs):
    self.layout = inputs.layout
    config = inputs.config.copy_and_resolve_references()
    config.train.warmup, config.a.steps = WARMUP / _ENDLESS, _ENDLESS
    self.params = inputs.params(config.model.dtype)
    self.adapter = jax.tree.map(
      np.asarray,
      lora.init(
        inputs.base.config,
        config.lora.rank,
        config.lora.targets,
        jax.random.key(config.seed),
      ),
    )
    # Of endless cosine decay no run gets to see more than its flat top.
    self.tuner = step_lib.Tuner(
      config_lib.stage_of(config, 'a'),
      config.train,
      inputs.layout,
      jax.tree.map(np.shape, self.adapter),
    )
    self.attach = step_lib.attacher(
      inputs.base.config, inputs.layout, config.model, config.train, config.lora.alpha
    )
    self.train = config.train

  def step(self, plan):
    """The jitted step for the batches of a plan, as a run makes it."""
    answers = plan_lib.most_answers(
      plan, self.train.batch, self.train.accumulate, self.layout.row_parts
    )
    loss = Loss(self.attach, self.layout.row_parts, answers)
    return step_lib.make_step(loss, self.tuner, self.train.accumulate)

  def state(self):
    return self.tuner.begin(self.adapter)


class Arm:
  """One way to fill rows: its plan, its training state and its clock."""

  def __init__(self, inputs, shared, name, steps):
    """`name`: see arm_config. `steps`: of its plan, which then repeats."""
    self.name, self.shared, self.layout = name, shared, inputs.layout
    self.config = arm_config(inputs.config, name)
    rng = np.random.default_rng(self.config.seed)
    stream = plan_lib.tile(common.make_windows(inputs.prompts, self.config), rng)
    train = self.config.train
    self.plan = plan_lib.take(stream, steps * train.batch, train.length, '')
    self.assemble = loader.Assembler(
      inputs.prompts, [], self.config.train.length, self.plan.answers
    )
    self.step = shared.step(self.plan)
    self._warm()
    self.state, self.batches = shared.state(), self._batches()
    self.seconds, self.steps = 0.0, 0
    self.results = []  # Of each validation: seconds, steps, NLLs.

  def _batches(self):
    """Batches of the plan on the device; after its end, from its start."""
    while True:
      for batch in loader.batches(self.plan, self.assemble, self.config.train.batch):
        yield self.layout.put_rows(batch, self.config.train.batch)

  def _warm(self):
    """Compiles, and runs some steps on a state that is thrown away."""
    begin, state = time.perf_counter(), self.shared.state()
    for batch in itertools.islice(self._batches(), 2):
      state, _ = self.step(state, self.shared.params, batch)
    jax.block_until_ready(state)
    logging.info('arm %s: warm after %.0f s.', self.name, time.perf_counter() - begin)

  def train(self, until):
    """Trains to the end of a step, the one nearest to `until` on the clock."""
    while self.seconds + self._half_step() < until:
      begin = time.perf_counter()
      self.state, _ = self.step(self.state, self.shared.params, next(self.batches))
      jax.block_until_ready(self.state)
      self.seconds += time.perf_counter() - begin
      self.steps += 1

  def _half_step(self):
    return self.seconds / self.steps / 2 if self.steps else 0.0

  def note(self, losses):
    self.results.append((self.seconds, self.steps, losses))
    logging.info(
      'arm %s, %.1f s, step %d: NLL %.3f',
      self.name,
      self.seconds,
      self.steps,
      losses.mean(),
    )

  def work(self):
    """What the arm has done: {what: amount}, see `work`."""
    rows = itertools.islice(
      itertools.cycle(self.plan.rows), self.steps * self.config.train.batch
    )
    return work(itertools.chain.from_iterable(rows))

  def reached(self, nll):
    return first_time(
      [(seconds, losses.mean()) for seconds, _, losses in self.results], nll
    )


def work(segments):
  """Amounts in segments of a plan.

  `context` is summed over targets: the events of the window before each.
  `pairs` of tokens may look at each other, see costs.step_flops.
  """
  total = collections.Counter()
  for segment in segments:
    targets, length = segment.targets, segment.length
    total.update(
      targets=len(targets),
      tokens=length,
      answers=segment.answers,
      context=sum(targets) - len(targets) * segment.start,
      pairs=length * (length + 1) // 2,
    )
  return total


def first_time(curve, nll):
  """Seconds at which a curve [(seconds, NLL)] first is at `nll`; or inf."""
  for (begin, high), (end, low) in itertools.pairwise(curve):
    if low <= nll:
      share = (high - nll) / (high - low) if high > nll else 1.0
      return begin + share * (end - begin)
  return float('inf')


class Validation:
  """-log p of the true behavior's tokens, on questions with full history."""

  def __init__(self, inputs, params, count):
    config = inputs.config.copy_and_resolve_references()
    rows, config.train.length = questions(inputs, count)
    attach = step_lib.attacher(
      inputs.base.config, inputs.layout, config.model, config.train, config.lora.alpha
    )
    self.sums = step_lib.make_validation(
      Loss(attach, inputs.layout.row_parts), inputs.layout
    )
    self.params, self.questions = params, len(rows)
    most = max(row[0].answers for row in rows)
    assemble = loader.Assembler(inputs.prompts, [], config.train.length, most)
    self.batches = [
      inputs.layout.put_rows(batch, config.train.batch)
      for batch in loader.batches(
        plan_lib.Plan(rows, most, ''), assemble, config.train.batch
      )
    ]
    self.size = config.train.batch

  def __call__(self, adapter):
    """Mean NLL per question of every batch, float64 [batches]."""
    losses = [self.sums(adapter, self.params, batch)[0] for batch in self.batches]
    return np.array(losses, np.float64) / self.size


def questions(inputs, count):
  """Rows of one question each, whole batches of them, and their length."""
  config, prompts = inputs.config, inputs.prompts
  samples = evaluation.draw_samples(
    inputs.events, 'validation', count, config.plan.min_context, config.seed
  )
  whole = len(samples) // config.train.batch * config.train.batch
  if not whole:
    raise InputError(
      f'--questions={count}: the validation split gives {len(samples)} '
      f'questions, less than a batch of {config.train.batch}; ask for more '
      'or lower train.batch.'
    )
  # The draw is sorted: a batch is of neighbours in the log, and differences
  # between batches hold those between users.
  config = config.copy_and_resolve_references()
  samples = samples[:whole]
  starts = prompts.question_start(samples)
  longest = prompts.window_lengths(starts, samples + 1).max()
  config.train.length = -(-longest // 16) * 16
  windows = common.make_windows(prompts, config)
  rows = [
    [windows.make(start, [position], [1.0])]
    for start, position in zip(starts, samples, strict=True)
  ]
  return rows, config.train.length
