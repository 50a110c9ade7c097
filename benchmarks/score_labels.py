"""Scoring a closed list of names: the label tree beside torch.

  python benchmarks/score_labels.py

The peer gets the log-probability of every name in its two usual ways, one
forward pass per name and one pass over the prompt whose keys and values a
batch of names then reads, and in an unusual one: all names in one row behind
the prompt, under a mask made by hand. Both sides normalise every token over the
vocabulary; ours is also timed as it is by default, within the names.
Prompts are questions of the log's test split. The last lines
are the ratios of the median prompts per second, ours over the peer's.

First, events of the log's own test and validation splits are scored many to a row,
as a run scores them, beside one question a row: `ratio dense`.
"""

import itertools
from pathlib import Path

import command
import common
import jax
import numpy as np
import peer_scores
from absl import flags

from behaviorlm_jax import measure
from behaviorlm_jax.data.questions import QuestionRow, row_of
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.evaluate import evaluation
from behaviorlm_jax.score import scorer as scorer_lib
from behaviorlm_jax.train import step as step_lib

NAMES = flags.DEFINE_list('names', ['80', '192'], 'Lengths of the name lists.')
NAMES_FILE = flags.DEFINE_string(
  'names_file', '', 'One name per line, instead of the names of the log.'
)
DENSE = flags.DEFINE_bool('dense', False, 'Only rows of many questions against one.')
PROMPTS = flags.DEFINE_integer('prompts', 8, 'Prompts of a timed call of ours')
_DTYPES = ('bfloat16', 'float32')
_NAIVE_ROWS, _CACHED_ROWS = (2, 8), (8, 16, 64)
_TRIED = 8  # Names on which the peer's setting is chosen.


def real_names(inputs):
  if not NAMES_FILE.value:
    events = inputs.events
    return [b.name for b in events.behaviors[: events.known]]
  path = Path(NAMES_FILE.value)
  if not path.is_file():
    raise InputError(
      f'--names_file: {path} is no file; give a file with one name per line.'
    )
  return list(dict.fromkeys(filter(None, path.read_text().splitlines())))


def make_names(names, count, seed):
  """`count` distinct names: real ones first, then joined ones, by seed."""
  rng = np.random.default_rng(seed)
  result = []
  for size in itertools.count(1):
    left = count - len(result)
    whole = len(names) ** size
    drawn = rng.choice(whole, min(left, whole), replace=False)
    for number in drawn:
      digits = [number // len(names) ** i % len(names) for i in range(size)]
      result.append(' and '.join(names[digit] for digit in digits))
    if len(result) == count:
      return result


def answers(inputs, count):
  """Answer tokens of a list of `count` names, and how many are real."""
  names = real_names(inputs)
  chosen = make_names(names, count, inputs.config.seed)
  return list(map(inputs.prompts.answer, chosen)), min(count, len(names))


def questions(inputs, count):
  """Questions of the test split whose lengths are closest to the median."""
  config = inputs.config
  positions = evaluation.draw_samples(
    inputs.events, 'test', config.eval.max_samples, config.plan.min_context, config.seed
  )
  found = sorted(map(inputs.prompts.question, positions), key=len)
  begin = max(0, (len(found) - count) // 2)
  return found[begin : begin + count]


class Ours:
  """The project's Scorer with the adapter, in one type of weights."""

  def __init__(self, inputs, names, dtype, softmax='vocabulary'):
    config = inputs.config.copy_and_resolve_references()
    config.score.update(dtype=dtype, softmax=softmax)
    attach = step_lib.attacher(
      inputs.base.config,
      inputs.layout,
      {**config.model, 'dtype': dtype},
      config.train,
      config.lora.alpha,
    )
    self.adapter = jax.device_put(inputs.adapter)
    self.scorer = scorer_lib.Scorer(
      attach, inputs.params(dtype), names, config.score, inputs.layout
    )

  def __call__(self, prompts):
    """Of prompts, each in a row of its own: [n, Y]."""
    self.scorer.asked = 1
    width = scorer_lib.round_up(max(map(len, prompts)), 32)
    return np.concatenate(
      self.scorer(self.adapter, [alone(prompt, width) for prompt in prompts])
    )


def alone(prompt, width):
  """A QuestionRow of one prompt, padded."""
  fill = lambda values: np.pad(values, (0, width - len(prompt)))
  root = np.array([len(prompt) - 1])
  segment = np.ones(len(prompt), np.int32)
  return QuestionRow(
    fill(prompt), fill(np.arange(len(prompt))), fill(segment), root, root, root
  )


def fastest_rows(name, score, choices):
  """(name, rows, seconds) of the fastest choice of rows in a batch."""
  score(choices[0])
  seconds = {rows: common.once(lambda rows=rows: score(rows)) for rows in choices}
  best = min(seconds, key=seconds.get)
  return (name, best, float(seconds[best]))


def choose(way, choices, scorers, prompt, names):
  """(type, rows of a batch): the peer's fastest on one prompt."""
  dtypes = _DTYPES[:1] if command.QUICK.value else _DTYPES
  tried = [
    fastest_rows(
      dtype,
      lambda rows, s=scorers[dtype]: getattr(s, way)(prompt, names, rows),
      choices,
    )
    for dtype in dtypes
  ]
  common.show(
    f'The peer on one prompt and {len(names)} names, {way}, to choose its setting',
    ['type', 'rows of a batch', 'seconds'],
    tried,
  )
  return min(tried, key=lambda row: row[2])[:2]


def check(inputs, scorer, prompt, names):
  """Ours and all ways of the peer give one prompt the same scores."""
  mine = Ours(inputs, names, 'float32')([prompt])[0]
  for way, few in (('naive', names[:_TRIED]), ('cached', names), ('row', names)):
    theirs = getattr(scorer, way)(prompt, few, _TRIED)
    common.check_equal(
      f'scores in float32, {way}, {len(few)} names',
      mine[: len(few)],
      theirs,
      1e-3,
      relative=False,
    )


def compare(inputs, scorers, prompts, count, repeats, naive):
  """{way: ratio of prompts/s} of a list of `count` names.

  `naive`: the peer's setting for one forward pass per name.
  """
  names, real = answers(inputs, count)
  middle = prompts[len(prompts) // 2]
  ours = {f'ours {dtype}': Ours(inputs, names, dtype) for dtype in _DTYPES}
  check(inputs, scorers['float32'], middle, names)
  for one in ours.values():
    one(prompts)
  best = {'naive': naive}
  for way, rows in (('cached', _CACHED_ROWS), ('row', (0,))):
    best[way] = choose(way, rows, scorers, middle, names)
  within = {
    f'within names {dtype}': Ours(inputs, names, dtype, 'names') for dtype in _DTYPES
  }
  for one in within.values():
    one(prompts)
  sides = {name: lambda i, s=one: s(prompts) for name, one in (ours | within).items()}
  work = dict.fromkeys(sides, len(prompts))
  for way, (dtype, rows) in best.items():
    sides[f'{way} {dtype}'] = lambda i, w=way, d=dtype, r=rows: getattr(scorers[d], w)(
      prompts[i % len(prompts)], names, r
    )
    work[f'{way} {dtype}'] = 1
  seconds = common.interleave(sides, repeats)
  lengths = list(map(len, prompts))
  rates = common.show_rates(
    f'{count} names ({real} of them real, the others joined), prompts of '
    f'{min(lengths)} to {max(lengths)} tokens',
    'prompts',
    work,
    seconds,
  )
  mine = max(rates[name] for name in ours)
  return {way: mine / rates[f'{way} {dtype}'] for way, (dtype, _) in best.items()}


def long_prompts(inputs, length, count):
  """Lines of the log, cut into `count` prompts of `length` tokens."""
  stop, tokens = 0, np.zeros(0, np.int32)
  while len(tokens) < length * count:
    start, stop = stop, min(stop + 64, len(inputs.events.time))
    tokens = np.concatenate([tokens, inputs.prompts.window(start, stop)[0]])
  return list(tokens[: length * count].reshape(count, length))


def grow_cell(inputs, prompts, count):
  """(seconds per prompt, peak memory in GB) in the config's type."""
  names, _ = answers(inputs, count)
  common.forget_peak()
  score = inputs.config.score
  ours = Ours(inputs, names, score.dtype, score.softmax)
  ours(prompts)
  seconds = min(common.once(lambda: ours(prompts)) for _ in range(2))
  return float(seconds / len(prompts)), common.peak_memory()


def grow(inputs):
  """Time and memory of ours against names and against prompt length."""
  counts, lengths = (20, 80, 192, 500, 2000), (64, 128, 256, 512, 1024)
  if command.QUICK.value:
    counts, lengths = counts[:3], lengths[:3]
  headers = ['s a prompt', 'peak resident GB']
  count = inputs.config.score.batch
  prompts = questions(inputs, count)
  real = len(real_names(inputs))
  common.show(
    f'Ours as the list grows ({count} prompts of {len(prompts[-1])} tokens, '
    f'{inputs.config.score.dtype}; {real} names are real)',
    ['names', *headers],
    [(n, *grow_cell(inputs, prompts, n)) for n in counts],
  )
  common.show(
    'Ours as prompts grow (192 names)',
    ['tokens', *headers],
    [(n, *grow_cell(inputs, long_prompts(inputs, n, count), 192)) for n in lengths],
  )


def dense(inputs, repeats):
  """Test and validation events, many to a row, and as questions of one each."""
  config = inputs.config
  draw = lambda split: evaluation.draw_samples(
    inputs.events, split, 0, config.plan.min_context, config.seed
  )
  events = np.sort(np.concatenate([draw('validation'), draw('test')]))
  length, packed = measure.packed(inputs, events)
  rng = np.random.default_rng(config.seed)
  chosen = rng.choice(len(packed), 2 if command.QUICK.value else 16, replace=False)
  rows = [row_of(inputs.prompts, packed[i], length) for i in chosen]
  targets = rng.choice(np.concatenate([row.targets for row in rows]), PROMPTS.value)
  prompts = [inputs.prompts.question(target) for target in targets]
  names = list(inputs.prompts.labels)
  dtype = config.score.dtype
  many, one = (Ours(inputs, names, dtype, config.score.softmax) for _ in range(2))
  sides = {
    'dense': lambda i: many.scorer(many.adapter, rows),
    'one question a row': lambda i: one(prompts),
  }
  work = {
    'dense': sum(len(row.targets) for row in rows),
    'one question a row': len(prompts),
  }
  for side in sides.values():
    side(0)
  rates = common.show_rates(
    f'{len(events)} events of {len(names)} names, {len(many.scorer.trees[0].tokens)} '
    f'inner nodes; {len(packed)} rows of {length} tokens, of which {len(rows)}',
    'events',
    work,
    common.interleave(sides, repeats),
  )
  print(f'all of them: about {len(events) / rates["dense"] / 60:.0f} minutes')
  print(f'ratio dense: {rates["dense"] / rates["one question a row"]:.2f}')


def benchmark(inputs, folder):
  repeats = command.REPEATS.value or (1 if command.QUICK.value else 3)
  dense(inputs, repeats)
  if DENSE.value:
    return
  if command.GROW.value:
    grow(inputs)
    return
  adapter = inputs.export(folder / 'adapter')
  scorers = {
    dtype: peer_scores.Scorer(inputs.base.folder, adapter, dtype) for dtype in _DTYPES
  }
  prompts = questions(inputs, PROMPTS.value)
  few, _ = answers(inputs, _TRIED)
  naive = choose('naive', _NAIVE_ROWS, scorers, prompts[len(prompts) // 2], few)
  ratios = {}
  for count in map(int, NAMES.value):
    found = compare(inputs, scorers, prompts, count, repeats, naive)
    ratios |= {f'score_{way}_{count}': x for way, x in found.items()}
    last = {f'score_{way}': x for way, x in found.items()}
  for name, ratio in (ratios | last).items():
    print(f'ratio {name}: {ratio:.2f}')


if __name__ == '__main__':
  command.run(benchmark)
