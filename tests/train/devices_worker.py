"""Trains random://tiny for three steps on one batch, mesh after mesh.

As a program: a task as JSON in, one JSON line of results out, on as many
devices as JAX_NUM_CPU_DEVICES asks for. Tests run it so, because the number of
devices of a process is fixed at its start. The task: `meshes`; `whole`, whether
to try more than the step; `orders`, of the devices in each mesh; `distributed`,
fields of that section, for one of several processes.
"""

import json
import re
import sys
import types
from unittest import mock

import jax
import numpy as np

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.cluster import processes
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data.questions import QuestionRow
from behaviorlm_jax.model import decoder, lora, weights
from behaviorlm_jax.score import label_tree
from behaviorlm_jax.score import scorer as scorer_lib
from behaviorlm_jax.train import loss as loss_lib
from behaviorlm_jax.train import sharding
from behaviorlm_jax.train import step as step_lib

ROWS, LENGTH, ANSWERS, STEPS, PARTS = 16, 16, 5, 3, 2
NAMES = [np.array([a, b, 1]) for a in range(10, 15) for b in range(20, 24)]
TREE = label_tree.build(NAMES)


def draw_batch(generator):
  """Rows of two segments and unequal weights; two answers of each are those of
  a conversation, the others of names."""
  draw = lambda high, n: generator.integers(0, high, (ROWS, n), np.int32)
  own = np.tile(np.arange(ANSWERS) >= 2, (ROWS, 1))
  edges = generator.integers(0, len(TREE.edge_tokens), (ROWS, ANSWERS))
  segments = np.repeat([[1, 2]], LENGTH // 2, axis=1).repeat(ROWS, axis=0)
  positions = np.tile(np.arange(LENGTH // 2), 2)[None].repeat(ROWS, axis=0)
  return {
    'tokens': draw(256, LENGTH),
    'segments': segments.astype(np.int32),
    'positions': positions.astype(np.int32),
    'answer_positions': draw(LENGTH, ANSWERS),
    'answer_tokens': np.where(own, TREE.edge_tokens[edges], draw(256, ANSWERS)).astype(
      'i4'
    ),
    'answer_nodes': np.where(own, TREE.edge_nodes[edges], -1).astype('i4'),
    # Some are none: rows differ in how many answers they have.
    'answer_weights': generator.uniform(-1, 2, (ROWS, ANSWERS)).astype('f4').clip(0),
    'samples': np.ones(ROWS, 'i4'),
  }


def make_plan(batch):
  """A plan whose rows have as many answers as the batch's."""
  counts = (batch['answer_weights'] > 0).sum(axis=1)
  rows = [[types.SimpleNamespace(answers=int(n))] for n in counts]
  return plan_lib.Plan(rows, ANSWERS, '')


def collectives(text):
  """[kind, shape] of everything that an HLO text sends between devices."""
  text, found = re.sub(r'/\*.*?\*/', '', text), set()
  for shapes, kind in re.findall(
    r'= (\([^=]*?\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|'
    r'collective-permute|collective-broadcast)(?:-start)?\(',
    text,
  ):
    for shape in re.findall(r'\w+\[([\d,]*)\]', shapes):
      found.add((kind, tuple(int(n) for n in shape.split(',') if n)))
  return sorted(found)


def local_bytes(tree):
  """Of the first device of this process."""
  return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


class Reader:
  """Places weights and counts the bytes that are read for that."""

  def __init__(self, layout):
    self.layout, self.bytes = layout, 0

  def __call__(self, name, shape, dtype, read):
    def counted(index):
      values = read(index)
      self.bytes += values.nbytes
      return values

    return self.layout.place(name, shape, dtype, counted)


def train(sizes, whole, order):
  """Of a mesh: losses of three steps, bytes on a device, what is sent between
  devices; if `whole`, scores, too.
  `order`: of the devices in the mesh, or None."""
  config = config_lib.default()
  config.train.update({'batch': ROWS, 'accumulate': PARTS})
  config.a.update({'steps': STEPS, 'learning_rate': 1e-2})
  config.mesh.update(sizes)
  config.model.dtype = 'float32'
  base = weights.open_base('random://tiny')
  devices = jax.devices()
  with mock.patch(
    'jax.devices', lambda: [devices[i] for i in order or range(len(devices))]
  ):
    layout = sharding.make_layout(config.mesh, config.train).of(base.config)
  reader = Reader(layout)
  params = weights.read_params(base, np.float32, reader)
  adapter = jax.device_get(
    lora.init(base.config, 4, decoder.PROJECTIONS, jax.random.key(0))
  )
  stage, shapes = config_lib.stage_of(config, 'a'), jax.tree.map(np.shape, adapter)
  tuner = step_lib.Tuner(stage, config.train, layout, shapes)
  attach = step_lib.attacher(
    base.config, layout, config.model, config.train, config.lora.alpha
  )
  batch, own = draw_batch(np.random.default_rng(0)), layout.host_rows(ROWS)
  plan = make_plan(batch)
  batch = layout.put_rows({name: x[own] for name, x in batch.items()}, ROWS)
  state, losses = tuner.begin(adapter), []
  answers = plan_lib.most_answers(plan, ROWS, PARTS, layout.row_parts)
  loss = loss_lib.Loss(attach, layout.row_parts, answers, loss_lib.names_of(TREE))
  run = step_lib.make_step(loss, tuner, PARTS)
  compiled = run.lower(state, params, batch).compile()
  for _ in range(STEPS):
    state, metrics = compiled(state, params, batch)
    losses.append(float(metrics['loss']))
  result = {
    'losses': losses,
    'sent': collectives(compiled.as_text()),
    'devices': jax.device_count(),
    'read': reader.bytes,
    'bytes': {
      'params': local_bytes(params),
      'adapter': local_bytes(state['adapter']),
      'optimizer': local_bytes(state['optimizer']),
    },
  }
  if not whole:
    return result
  tokens = np.arange(60, dtype=np.int32).reshape(5, 12)
  # Two windows a row, of which the first is asked twice.
  positions, segments = np.tile(np.arange(6), 2), np.repeat([1, 2], 6)
  roots = np.array([2, 5, 11])
  rows = [QuestionRow(row, positions, segments, roots, roots, roots) for row in tokens]

  def scores(softmax):
    config.score.softmax = softmax
    scorer = scorer_lib.Scorer(attach, params, NAMES, config.score, layout)
    return np.concatenate(scorer(state['adapter'], rows)).tolist()

  return result | {'scores': scores('vocabulary'), 'named': scores('names')}


def main(task):
  config = config_lib.default()
  config.distributed.update(task.get('distributed', {}))
  processes.start(config.distributed)
  orders = task.get('orders', [None] * len(task['meshes']))
  print(
    json.dumps(
      [
        train(sizes, task.get('whole', False), order)
        for sizes, order in zip(task['meshes'], orders, strict=True)
      ]
    )
  )


if __name__ == '__main__':
  main(json.loads(sys.argv[1]))
