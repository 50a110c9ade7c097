"""Our training step beside transformers + PEFT on the same real samples.

  python benchmarks/train_step.py

`train`: both sides learn from the same sequences, step by step in turn.
`targets`: the same step of ours, every row dense with targets, against the
peer trained the usual way, one question per prompt. The last lines are the
ratios of the medians, ours over the peer's.
"""

import command
import common
import costs
import jax
import numpy as np
import peers
from absl import flags

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.train import step as step_lib
from behaviorlm_jax.train.loss import Loss

PARTS = flags.DEFINE_list('parts', ['train', 'targets'], 'What is compared.')
PROFILE = flags.DEFINE_bool('profile', False, 'Print where a step goes.')
_DTYPES = (
  ('bfloat16', 'bfloat16'),
  ('bfloat16', 'autocast'),
  ('bfloat16', 'float32'),
  ('float32', 'float32'),
)
_LAYOUTS = ('sorted', 'padded', 'packed')
_PROMPTS = 8  # One-question prompts in a batch of the peer's.
_CONTEXT = 8  # Events before such a question, at least.


class Ours:
  """The project's own step, compiled ahead of time as a run compiles it."""

  def __init__(self, inputs, plan, example):
    """`plan`: of all batches to come; `example`: one of them."""
    config, self.layout = inputs.config, inputs.layout
    self.params = inputs.params(config.model.dtype)
    shapes = jax.tree.map(np.shape, inputs.adapter)
    tuner = step_lib.Tuner(
      config_lib.stage_of(config, 'a'), config.train, self.layout, shapes
    )
    self.state = tuner.begin(inputs.adapter)
    attach = step_lib.attacher(
      inputs.base.config, self.layout, config.model, config.train, config.lora.alpha
    )
    parts, rows = self.layout.row_parts, config.train
    answers = plan_lib.most_answers(plan, rows.batch, rows.accumulate, parts)
    step = step_lib.make_step(Loss(attach, parts, answers), tuner, rows.accumulate)
    self.compiled = step.lower(self.state, self.params, self.put(example)).compile()

  def put(self, batch):
    return self.layout.put_rows(batch, len(batch['tokens']))

  def step(self, batch):
    """One update, with the batch's way to the device; mean loss and norm."""
    self.state, metrics = self.compiled(self.state, self.params, self.put(batch))
    jax.block_until_ready(self.state)
    return float(metrics['loss']), float(metrics['grad_norm'])


def real_tokens(batch):
  return int((batch['segments'] > 0).sum())


def check_float32(inputs, folder, batch):
  """Both sides' losses on one batch agree in float32."""
  config = inputs.config
  attach = step_lib.attacher(
    inputs.base.config,
    inputs.layout,
    {**config.model, 'dtype': 'float32'},
    config.train,
    config.lora.alpha,
  )
  sums = step_lib.make_validation(Loss(attach, inputs.layout.row_parts), inputs.layout)
  loss, weight = sums(
    inputs.adapter,
    inputs.params('float32'),
    inputs.layout.put_rows(batch, len(batch['tokens'])),
  )
  peer = trainer(inputs, folder, peers.Setting('float32', 'float32', ''))
  with peers.torch.no_grad():
    theirs = sum(peer.loss(part).item() for part in peers.parts(batch, 'sorted'))
  common.check_equal(
    'losses in float32', float(loss) / float(weight), theirs / float(weight), 1e-4
  )


def trainer(inputs, folder, setting):
  return peers.Trainer(
    inputs.base.folder, folder / 'adapter', setting, inputs.config.a.learning_rate
  )


def fastest_setting(inputs, folder, batch):
  """The peer's fastest Setting: types first, then the layout."""
  some = {name: x[: max(1, len(x) // 2)] for name, x in batch.items()}
  settings = [peers.Setting(*dtypes, _LAYOUTS[0]) for dtypes in _DTYPES]
  if command.QUICK.value:
    settings = settings[:1]
  seconds = {s: step_time(inputs, folder, s, some) for s in settings}
  best = min(seconds, key=seconds.get)
  for layout in _LAYOUTS[1:]:
    setting = peers.Setting(best.dtype, best.adapter, layout)
    seconds[setting] = step_time(inputs, folder, setting, some)
  common.show(
    'The peer on half a batch, to choose its setting',
    ['setting', 'seconds'],
    [(str(s), float(t)) for s, t in seconds.items()],
  )
  return min(seconds, key=seconds.get)


def step_time(inputs, folder, setting, batch):
  """Least seconds of two warm steps."""
  peer = trainer(inputs, folder, setting)
  tensors = peers.parts(batch, setting.layout)
  peer.step(tensors)
  return min(common.once(lambda: peer.step(tensors)) for _ in range(2))


def compare_train(inputs, folder, repeats, limits):
  """Tokens/s of both sides on the same samples; returns the ratio."""
  plan, batches = common.batches(
    inputs, repeats + 1, inputs.config.a.conversation_share
  )
  first, timed = batches[0], batches[1:]
  check_float32(inputs, folder, first)
  setting = fastest_setting(inputs, folder, first)
  ours = Ours(inputs, plan, first)
  peer = trainer(inputs, folder, setting)
  mine = ours.step(first)
  theirs = peer.step(peers.parts(first, setting.layout))
  what = f'losses, {inputs.config.model.dtype} against {setting}'
  common.check_equal(what, mine[0], theirs[0], 2e-2)
  print(f'gradient norms: {mine[1]:.4f} and {theirs[1]:.4f}')
  seconds = common.interleave(
    {
      'ours': lambda i: ours.step(timed[i]),
      str(setting): lambda i: peer.step(peers.parts(timed[i], setting.layout)),
    },
    repeats,
  )
  tokens = np.array([real_tokens(batch) for batch in timed])
  rates = common.show_rates(
    f'train: {shape_text(inputs, timed)}',
    'tokens',
    dict.fromkeys(seconds, tokens),
    seconds,
  )
  show_flops(inputs, ours, timed, float(np.median(seconds['ours'])), limits)
  if PROFILE.value:
    costs.show_profile(ours.compiled.as_text(), lambda: ours.step(timed[0]))
  return rates['ours'] / rates[str(setting)], setting


def shape_text(inputs, batches):
  train = inputs.config.train
  cells = train.batch * train.length
  wasted = 1 - np.mean([real_tokens(batch) for batch in batches]) / cells
  targets = np.mean([batch['samples'].sum() for batch in batches])
  return (
    f'{train.batch} rows of {train.length}, {wasted:.0%} padding, '
    f'{targets:.0f} targets a step'
  )


def show_flops(inputs, ours, batches, seconds, limits):
  """What a step needs, what it multiplies, and the share of the limit."""
  config = inputs.config
  parts = [
    costs.step_flops(
      inputs.base.config,
      config.lora.rank,
      real_tokens(batch),
      int((batch['answer_weights'] > 0).sum()),
      costs.causal_pairs(batch['segments']),
      config.lora.targets,
    )
    for batch in batches
  ]
  needed = {name: np.mean([p[name] for p in parts]) / 1e9 for name in parts[0]}
  done = costs.product_flops(ours.compiled.as_text()) / 1e9
  limit = limits[config.model.dtype]
  rows = [
    *needed.items(),
    ('needed in all', sum(needed.values())),
    ('multiplied by the compiled step', done),
  ]
  common.show(
    f'FLOPs of our step ({seconds:.2f} s, limit of {config.model.dtype} '
    f'{limit:,.0f} GFLOP/s)',
    ['part', 'GFLOP', 'GFLOP/s', '% of limit'],
    [
      (name, float(x), float(x / seconds), f'{x / seconds / limit:.1%}')
      for name, x in rows
    ],
  )


def questions(inputs, count):
  """One-question prompts with their answers, batches of similar lengths."""
  prompts, config = inputs.prompts, inputs.config
  rng = np.random.default_rng(config.seed)
  positions = samples_lib.of_split(
    inputs.events, 'train', config.plan.min_context
  ).all()
  past = positions - inputs.events.first[positions]
  positions = positions[past >= _CONTEXT]
  samples = []
  for position in np.resize(rng.permutation(positions), count * _PROMPTS):
    question = prompts.question(position)
    answer = prompts.names[inputs.events.behavior[position]]
    tokens = np.concatenate([question, answer[:-1]])
    where = len(question) - 1 + np.arange(len(answer))
    samples.append(peers.Sample(tokens, where, answer))
  samples.sort(key=lambda sample: len(sample.tokens))
  groups = [samples[i : i + _PROMPTS] for i in range(0, len(samples), _PROMPTS)]
  return [[peers.pad(groups[i])] for i in rng.permutation(count)]


def compare_targets(inputs, folder, repeats, setting):
  """Targets/s: dense rows against one question per prompt; the ratio."""
  plan, batches = common.batches(inputs, repeats + 1, 0.0)
  asked = questions(inputs, repeats + 1)
  ours = Ours(inputs, plan, batches[0])
  peer = trainer(inputs, folder, setting)
  ours.step(batches[0])
  peer.step(asked[0])
  seconds = common.interleave(
    {
      'ours': lambda i: ours.step(batches[i + 1]),
      'one question per prompt': lambda i: peer.step(asked[i + 1]),
    },
    repeats,
  )
  ours_targets = np.array([b['samples'].sum() for b in batches[1:]])
  lengths = [batch[0].tokens.shape[1] for batch in asked[1:]]
  rates = common.show_rates(
    f'targets: {shape_text(inputs, batches[1:])}; the peer '
    f'({setting.dtype}, adapter {setting.adapter}) {_PROMPTS} prompts of up '
    f'to {min(lengths)} to {max(lengths)} tokens',
    'targets',
    {'ours': ours_targets, 'one question per prompt': np.full(repeats, _PROMPTS)},
    seconds,
  )
  return rates['ours'] / rates['one question per prompt']


def grow_cell(inputs, length, size):
  """One row of the table below."""
  inputs.config.train.update({'length': length, 'batch': size, 'accumulate': 1})
  plan, batches = common.batches(inputs, 3, 0.0)
  common.forget_peak()
  ours = Ours(inputs, plan, batches[0])
  ours.step(batches[0])
  seconds = float(
    min(common.once(lambda b=batch: ours.step(b)) for batch in batches[1:])
  )
  memory = ours.compiled.memory_analysis()
  return (
    length,
    size,
    seconds,
    length * size / seconds,
    memory.argument_size_in_bytes / 1e9,
    memory.temp_size_in_bytes / 1e9,
    common.peak_memory(),
  )


def grow(inputs):
  """Time and memory of our step against length and batch."""
  lengths, sizes = (128, 256, 512, 1024), (1, 4, 16)
  if command.QUICK.value:
    lengths, sizes = lengths[:2], sizes[:2]
  common.show(
    'Our step as rows grow (least of 2; positions with padding)',
    [
      'length',
      'batch',
      's',
      'positions/s',
      'arguments GB',
      'temporary GB',
      'peak resident GB',
    ],
    [grow_cell(inputs, length, size) for length in lengths for size in sizes],
  )


def benchmark(inputs, folder):
  if command.GROW.value:
    grow(inputs)
    return
  inputs.export(folder / 'adapter')
  dtypes = ('float32', 'bfloat16')
  limits = {dtype: common.xla_limit(dtype) for dtype in dtypes}
  common.show(
    'Limit: GFLOP/s of a 3072 x 3072 x 3072 product',
    ['type', 'XLA', 'torch'],
    [(d, limits[d], peers.limit(d)) for d in dtypes],
  )
  repeats = command.REPEATS.value or (2 if command.QUICK.value else 5)
  setting, ratios = peers.Setting('bfloat16', 'bfloat16', 'sorted'), {}
  if 'train' in PARTS.value:
    ratios['train'], setting = compare_train(inputs, folder, repeats, limits)
  if 'targets' in PARTS.value:
    ratios['targets'] = compare_targets(inputs, folder, repeats, setting)
  for name, ratio in ratios.items():
    print(f'ratio {name}: {ratio:.2f}')


if __name__ == '__main__':
  command.run(benchmark)
