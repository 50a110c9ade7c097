"""What targets per row are worth: validation NLL against training time.

  python benchmarks/supervision.py --seconds=120 --out=supervision

Arms differ in plan.targets_per_row and plan.window alone. All begin with one
adapter, learn from windows over all training samples in batches of the same
shape, under one learning rate (the config's, constant after 5 steps of linear
warm-up, so that arms can be compared at every moment), and are asked the same
validation questions, each with its full history. They train in slices in turn,
so whatever else the machine does hits all alike. An arm's clock runs while it
loads batches and trains; compilation and validation do not count. A mark is
validated after the step that ends nearest to it.

T targets per row with C events of context: windows of C + T events, and the
k-th target of a window sees the C + k - 1 events before it; fewer where a
user's log begins or a row's length ends. Short windows share rows.
"""

import csv
import itertools
import math
from pathlib import Path, PurePosixPath

import arms as arms_lib
import command
import common
import costs
import numpy as np
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from behaviorlm_jax.report import plots

ARMS = flags.DEFINE_list(
  'arms',
  ['1', '4', '8', '24', '40'],
  'Targets per row; 24@16: with 16 events of context instead of 8.',
)
SECONDS = flags.DEFINE_float('seconds', 120, 'Training time of an arm.', 1)
SLICE = flags.DEFINE_float('slice', 15, "Seconds of an arm's turn.", 0.1)
QUESTIONS = flags.DEFINE_integer('questions', 96, 'For validation.', 1)
OUT = flags.DEFINE_string('out', 'supervision', 'Folder of CSV and plot.')
_MARKS = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # Of the time, for validation.
_LEAST_STEP = 0.1  # Seconds; faster machines see the plan more than once.
# Okabe and Ito's, without their yellow, which is too light for lines.
_STYLES = (
  ('#0072B2', 'o'),
  ('#D55E00', '^'),
  ('#009E73', 's'),
  ('#CC79A7', 'D'),
  ('#000000', 'v'),
  ('#56B4E9', 'P'),
  ('#E69F00', 'X'),
)


def race(arms, validation, adapter, seconds):
  """Trains all arms, slice by slice in turn, and validates at the marks."""
  marks = [share * seconds for share in _MARKS]
  slices = np.arange(SLICE.value, seconds, SLICE.value).tolist()
  untuned = validation(adapter)
  for arm in arms:
    arm.note(untuned)
  for turn, until in enumerate(sorted({*marks[1:], *slices})):
    for arm in arms[::-1] if turn % 2 else arms:
      arm.train(until)
      if until in marks:
        arm.note(validation(arm.state['adapter']))


def measure(inputs, arm):
  """{measure: value} of an arm that has trained."""
  config, total = arm.config, arm.work()
  flops = sum(
    costs.step_flops(
      inputs.base.config,
      config.lora.rank,
      total['tokens'],
      total['answers'],
      total['pairs'],
      config.lora.targets,
    ).values()
  )
  cells = arm.steps * config.train.batch * config.train.length
  return {
    'steps': arm.steps,
    's a step': arm.seconds / arm.steps,
    'targets/s': total['targets'] / arm.seconds,
    'tokens/s': total['tokens'] / arm.seconds,
    'wasted positions': f'{1 - total["tokens"] / cells:.1%}',
    'events before a target': total['context'] / total['targets'],
    'GFLOP per target': flops / total['targets'] / 1e9,
  }


def show(arms, measures, seconds):
  """The tables: what each arm did, and what it learned by when."""
  common.show(
    'What the arms did',
    ['targets per row', *measures[0]],
    [(arm.name, *m.values()) for arm, m in zip(arms, measures, strict=True)],
  )
  best = min(arms, key=lambda arm: arm.results[-1][2].mean()).results[-1][2]
  rows = []
  for arm in arms:
    behind = arm.results[-1][2] - best
    error = behind.std(ddof=1) / len(behind) ** 0.5 if len(behind) > 1 else 0.0
    rows.append(
      (
        arm.name,
        *(f'{losses.mean():.3f}' for _, _, losses in arm.results),
        f'{behind.mean():.3f} ({error:.3f})',
      )
    )
  common.show(
    'Validation NLL (nats per question) after seconds of training; last, '
    'how far behind the best, with its standard error',
    ['targets per row', *(f'{share * seconds:g} s' for share in _MARKS), 'behind'],
    rows,
  )


def write_csv(path, arms, measures):
  with path.open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(
      [
        'targets_per_row',
        'window',
        'seconds',
        'steps',
        'nll',
        'targets_per_second',
        'tokens_per_second',
        'gflop_per_target',
      ]
    )
    for arm, m in zip(arms, measures, strict=True):
      for seconds, steps, losses in arm.results:
        writer.writerow(
          [
            arm.config.plan.targets_per_row,
            arm.config.plan.window,
            round(seconds, 3),
            steps,
            round(float(losses.mean()), 5),
            *(
              round(m[name], 3)
              for name in ('targets/s', 'tokens/s', 'GFLOP per target')
            ),
          ]
        )


def draw(path, arms, title):
  """NLL against seconds of training, a line per arm."""
  figure = Figure(figsize=(plots.WIDTH, 4.4), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for arm, (colour, marker) in zip(arms, itertools.cycle(_STYLES)):
    seconds, _, losses = zip(*arm.results, strict=True)
    axes.plot(
      seconds,
      [x.mean() for x in losses],
      color=colour,
      marker=marker,
      markersize=5,
      linewidth=1.6,
      label=arm.name,
    )
  axes.set_xlabel('training time (seconds)')
  axes.set_ylabel('validation NLL (nats per question)')
  axes.set_title(title, fontsize=9, loc='left', parse_math=False)
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', color='#dddddd', linewidth=0.6)
  axes.legend(title='targets per row', frameon=False, fontsize=9, title_fontsize=9)
  figure.savefig(path, dpi=plots.DPI)


def title(inputs, validation):
  config = inputs.config
  log = PurePosixPath(config.data.events).name
  model = PurePosixPath(config.model.address).name
  return (
    f'{log}, {model}: {validation.questions} validation questions\n'
    f'with up to {config.data.history} events of history; batches of '
    f'{config.train.batch} x {config.train.length} tokens'
  )


def ratios(arms, measures):
  """{name: ratio} of every arm over the first; more than 1 is better."""
  result, (first, *others) = {}, arms
  (base, *more) = measures
  for arm, m in zip(others, more, strict=True):
    over = f'{arm.name}_over_{first.name}'
    result[f'targets_per_second_{over}'] = m['targets/s'] / base['targets/s']
    result[f'targets_per_flop_{over}'] = (
      base['GFLOP per target'] / m['GFLOP per target']
    )
    # How much sooner it is as good as the first arm at its end.
    seconds, _, losses = first.results[-1]
    result[f'same_nll_sooner_{over}'] = seconds / arm.reached(losses.mean())
  return result


def benchmark(inputs, folder):
  del folder
  seconds, names, count = SECONDS.value, ARMS.value, QUESTIONS.value
  if command.QUICK.value:
    seconds, names, count = min(seconds, 4), names[:2], min(count, 16)
  for name in names:  # Refuses what is no arm before anything is compiled.
    arms_lib.arm_config(inputs.config, name)
  shared = arms_lib.Shared(inputs)
  validation = arms_lib.Validation(inputs, shared.params, count)
  arms = [
    arms_lib.Arm(inputs, shared, name, math.ceil(seconds / _LEAST_STEP))
    for name in names
  ]
  race(arms, validation, shared.adapter, seconds)
  measures = [measure(inputs, arm) for arm in arms]
  show(arms, measures, seconds)
  out = Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  write_csv(out / 'supervision.csv', arms, measures)
  draw(out / 'supervision.png', arms, title(inputs, validation))
  print(f'{out / "supervision.csv"}, {out / "supervision.png"}')
  for name, ratio in ratios(arms, measures).items():
    print(f'ratio {name}: {ratio:.2f}')


if __name__ == '__main__':
  command.run(benchmark)
