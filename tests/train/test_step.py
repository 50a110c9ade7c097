"""The step: its loss and gradient by torch, its update, its independence of
micro-batches and packing (test_sharding has devices)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.model import lora
from behaviorlm_jax.score import label_tree
from behaviorlm_jax.train import loss as loss_lib
from behaviorlm_jax.train import sharding
from behaviorlm_jax.train import step as step_lib

# (tokens, answers) of each row's segments: no two rows weigh the same.
ROWS = (
  [(24, 1)],
  [(9, 2), (15, 7)],
  [(5, 1), (8, 1), (6, 3)],
  [(12, 10)],
  [(3, 2)],
  [(20, 5)],
  [(10, 1), (10, 8)],
  [(23, 4)],
)


def make_config(**fields):
  """`fields`: of the train section, or of stage a."""
  config = config_lib.default()
  for name, value in fields.items():
    config['train' if name in config.train else 'a'][name] = value
  return config


# One function and one `attach`, so that the tests share compilations.
_gradient = jax.jit(step_lib.gradient, static_argnums=(0, 4))
_losses = functools.cache(loss_lib.Loss)


def gradient(adapter, params, batch, attach, accumulate, *options):
  return _gradient(_losses(attach, *options), adapter, params, batch, accumulate)


@pytest.fixture(scope='module')
def attach(llama):
  config = make_config()
  config.model.dtype = 'float32'
  layout = sharding.make_layout(config.mesh, config.train)
  return step_lib.attacher(
    llama.config, layout, config.model, config.train, config.lora.alpha
  )


def torch_loss(model, batch, tree=None, bonus=None):
  """The loss by its definition: full logits of every segment by itself.

  A token at a node is normalised within the node's edges, one by one.
  """
  total = torch.zeros(())
  answers = [
    batch[f'answer_{name}'] for name in ('positions', 'tokens', 'weights', 'nodes')
  ]
  for row, segments in enumerate(batch['segments']):
    for number in range(1, segments.max() + 1):
      where = np.flatnonzero(segments == number)
      tokens = torch.tensor(batch['tokens'][row, where], dtype=torch.long)
      logits = model(tokens[None]).logits[0]
      for position, token, weight, node in zip(*(x[row] for x in answers), strict=True):
        if not weight or position not in where:
          continue
        own, place = logits[position - where[0]], token
        if node >= 0:
          edges = np.flatnonzero(tree.edge_nodes == node)
          options = tree.edge_tokens[edges].tolist()
          own = own[options] + torch.tensor(bonus[edges])
          place = options.index(token)
        total = total - weight * torch.log_softmax(own, -1)[place]
  return total / batch['answer_weights'].sum()


def torch_model(llama, adapter, folder, **options):
  """The base with the exported adapter, as peft reads it."""
  lora.export(folder, adapter, make_config().lora.alpha, llama.folder)
  base = transformers.AutoModelForCausalLM.from_pretrained(
    llama.folder, dtype=torch.float32
  )
  return peft.PeftModel.from_pretrained(base, folder, **options)


def torch_gradient(model, batch, names):
  """Loss and gradient of an adapter by autograd."""
  loss = torch_loss(model, batch)
  loss.backward()
  found = {name: {'a': [], 'b': []} for name in names}
  for path, parameter in model.named_parameters():  # in the order of layers
    for side, part in (('a', '.lora_A.'), ('b', '.lora_B.')):
      if part in path:
        name = path.split(part)[0].split('.')[-1]
        found[name][side].append(parameter.grad.numpy())
  stacked = jax.tree.map(np.stack, found, is_leaf=lambda x: isinstance(x, list))
  return loss.item(), stacked


def assert_close(found, expected, share):
  """Every leaf differs by at most `share` of its largest expected value."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    most = np.abs(other).max()
    assert most > 0
    np.testing.assert_allclose(one, other, rtol=0, atol=share * most)


def test_loss_and_gradient_equal_those_of_torch_and_peft(
  tmp_path, llama, params, adapter, attach, make_batch
):
  batch = make_batch(ROWS)
  model = torch_model(llama, adapter, tmp_path, is_trainable=True)
  expected, theirs = torch_gradient(model, batch, adapter)
  loss, ours, weight = gradient(adapter, params, batch, attach, 1)
  assert float(weight) == pytest.approx(batch['answer_weights'].sum())
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  assert_close(ours, theirs, 1e-4)


def test_accumulation_changes_neither_loss_nor_gradient(
  params, adapter, attach, make_batch
):
  batch = make_batch(ROWS)
  shares = batch['answer_weights'].reshape(2, 4, -1).sum((0, 2))
  assert shares.max() > 1.5 * shares.min()  # else means would do as well
  loss, whole, weight = gradient(adapter, params, batch, attach, 1)
  other_loss, parts, other_weight = gradient(adapter, params, batch, attach, 4)
  assert float(other_loss) == pytest.approx(float(loss), rel=1e-5)
  assert float(other_weight) == pytest.approx(float(weight), rel=1e-6)
  assert_close(parts, whole, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('groups, accumulate', [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_room_for_the_fullest_group_changes_neither_loss_nor_gradient(
  params, adapter, attach, make_batch, groups, accumulate
):
  batch = make_batch(ROWS)
  answers = (batch['answer_weights'] > 0).sum(axis=1)
  # Row i goes to micro-batch i % accumulate, whose rows go to groups in order.
  most = max(
    part.sum()
    for i in range(accumulate)
    for part in np.split(answers[i::accumulate], groups)
  )
  assert groups * accumulate * most < batch['answer_weights'].size
  loss, expected, weight = gradient(adapter, params, batch, attach, 1)
  other_loss, found, other_weight = gradient(
    adapter, params, batch, attach, accumulate, groups, int(most)
  )
  assert float(other_loss) == pytest.approx(float(loss), rel=1e-5)
  assert float(other_weight) == pytest.approx(float(weight), rel=1e-6)
  assert_close(found, expected, 1e-5)


def test_padded_answers_and_tokens_count_for_nothing(
  params, adapter, attach, make_batch
):
  batch = make_batch(ROWS)
  loss, whole, _ = gradient(adapter, params, batch, attach, 1)
  changed = {name: value.copy() for name, value in batch.items()}
  changed['tokens'][batch['segments'] == 0] = 7
  changed['answer_tokens'][batch['answer_weights'] == 0] = 9
  other_loss, other, _ = gradient(adapter, params, changed, attach, 1)
  assert float(other_loss) == float(loss)
  jax.tree.map(np.testing.assert_array_equal, other, whole)


NAMES = [[5, 6, 1], [5, 7, 1], [5, 7, 8, 1], [9, 1], [10, 11, 1], [12, 1]]
COUNTS = [40, 3, 2, 100, 7, 1]
KEPT = [3, 1, 4, 1, 5, 9]


def taught(batch, tree, generator):
  """The batch with half of the answers nodes of a tree."""
  edges = generator.integers(0, len(tree.edge_tokens), batch['answer_tokens'].shape)
  own = np.arange(edges.shape[1]) % 2 == 0
  return batch | {
    'answer_tokens': np.where(own, tree.edge_tokens[edges], batch['answer_tokens']),
    'answer_nodes': np.where(own, tree.edge_nodes[edges], -1).astype('i4'),
  }


@pytest.mark.slow
@pytest.mark.parametrize('drawn', [None, COUNTS])
@pytest.mark.parametrize('accumulate, most', [(1, None), (2, 40)])
def test_names_are_taught_within_their_list(
  tmp_path, llama, params, adapter, attach, make_batch, drawn, accumulate, most
):
  tree = label_tree.build(NAMES)
  batch = taught(make_batch(ROWS), tree, np.random.default_rng(1))
  assert (batch['answer_nodes'] >= 0).any()
  assert (batch['answer_weights'][batch['answer_nodes'] < 0] > 0).any()
  # Names below each edge, by their beginnings.
  below = [
    [i for i in range(len(NAMES)) if edge in tree.paths[i]]
    for edge in range(len(tree.edge_tokens))
  ]
  bonus = np.zeros(len(below), 'f4')
  if drawn:
    bonus = np.log(
      [sum(drawn[i] for i in names) / sum(KEPT[i] for i in names) for names in below]
    ).astype('f4')
  with torch.no_grad():
    model = torch_model(llama, adapter, tmp_path)
    expected = torch_loss(model, batch, tree, bonus).item()
  names = loss_lib.names_of(tree, drawn, KEPT)
  loss, _, _ = gradient(adapter, params, batch, attach, accumulate, 1, most, names)
  assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_the_balanced_loss_is_that_of_the_balanced_softmax():
  """log n_y + s(y) against all of them (Ren et al., eq. 3)."""
  flat = label_tree.build([[y] for y in range(len(COUNTS))])  # Every name a token.
  names = loss_lib.names_of(flat, COUNTS, np.ones(len(COUNTS)))
  scores = np.random.default_rng(0).normal(0, 3, len(COUNTS))
  found = [names.losses(scores, np.int32(y), 0) for y in range(len(COUNTS))]
  joint = np.log(COUNTS) + scores
  np.testing.assert_allclose(found, np.logaddexp.reduce(joint) - joint, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('kept', [KEPT, [1] * len(NAMES)])
def test_whatever_is_drawn_the_best_scores_are_those_of_what_is_kept(kept):
  """Where the loss of what is drawn has no gradient, p(y) is kept's share."""
  tree = label_tree.build(NAMES)
  nodes, drawn = 1 + len(tree.tokens), np.array(COUNTS) / sum(COUNTS)
  names = loss_lib.names_of(tree, COUNTS, kept)
  plain = loss_lib.names_of(tree)

  def loss_of(names, name, logits):
    path = tree.path(name)
    at = tree.edge_nodes[path]
    return names.losses(logits[at], tree.edge_tokens[path], at).sum()

  def loss(logits):
    return sum(share * loss_of(names, name, logits) for name, share in enumerate(drawn))

  below = [
    sum(k for name, k in enumerate(kept) if edge in tree.path(name))
    for edge in range(len(tree.edge_tokens))
  ]
  best = np.zeros((nodes, 20), 'f4')
  best[tree.edge_nodes, tree.edge_tokens] = np.log(below)
  slope = jax.grad(loss)
  assert np.abs(slope(jnp.array(best))).max() < 1e-6
  assert np.abs(slope(jnp.zeros((nodes, 20)))).max() > 1e-2
  found = np.exp([-loss_of(plain, name, best) for name in range(len(NAMES))])
  np.testing.assert_allclose(found, np.array(kept) / sum(kept), rtol=1e-5)


class Trainer:
  """make_step and its state on the devices of this process."""

  def __init__(self, attach, params, adapter, **fields):
    config = make_config(**fields)
    stage, train = config_lib.stage_of(config, 'a'), config.train
    self.layout, self.params = sharding.make_layout(config.mesh, train), params
    shapes = jax.tree.map(np.shape, adapter)
    tuner = step_lib.Tuner(stage, train, self.layout, shapes)
    self.state = tuner.begin(adapter)
    self.run = step_lib.make_step(loss_lib.Loss(attach), tuner, train.accumulate)

  def __call__(self, batch):
    placed = self.layout.put_rows(batch, len(batch['tokens']))
    self.state, metrics = self.run(self.state, self.params, placed)
    return metrics


def test_only_the_adapter_has_optimizer_state(params, adapter, attach, make_batch):
  trainer = Trainer(attach, params, adapter)
  size = sum(x.size for x in jax.tree.leaves(adapter))
  moments = [x for x in jax.tree.leaves(trainer.state['optimizer']) if x.ndim]
  assert sum(x.size for x in moments) == 2 * size
  assert all(x.dtype == np.float32 for x in moments)


def test_equal_row_shapes_compile_once(params, adapter, attach, make_batch):
  trainer = Trainer(attach, params, adapter)
  for seed in range(3):
    trainer(make_batch(ROWS, seed=seed))
  assert trainer.run._cache_size() == 1
  trainer(make_batch(ROWS, length=32))
  assert trainer.run._cache_size() == 2


def test_metrics_say_what_the_step_saw(params, adapter, attach, make_batch):
  batch = make_batch(ROWS)
  metrics = Trainer(attach, params, adapter, steps=10, warmup=0.2)(batch)
  loss, grads, weight = gradient(adapter, params, batch, attach, 1)
  squares = sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads))
  assert int(metrics['tokens']) == sum(n for row in ROWS for n, _ in row)
  assert float(metrics['answer_weight']) == pytest.approx(float(weight))
  assert float(metrics['loss']) == pytest.approx(float(loss), rel=1e-5)
  assert float(metrics['grad_norm']) == pytest.approx(squares**0.5, rel=1e-4)
  assert float(metrics['learning_rate']) == pytest.approx(0.5e-3)


@pytest.mark.parametrize('clip', [0.0, 0.5])
def test_update_equals_that_of_torch_adamw(clip):
  """Linear warm-up from rate / warmup, cosine to zero, clipping, decay."""
  steps, warmup, rate = 5, 2, 0.03
  config = make_config(
    steps=steps, warmup=warmup / steps, learning_rate=rate, weight_decay=0.1, clip=clip
  )
  stage = config_lib.stage_of(config, 'a')
  optimizer, _ = step_lib.make_optimizer(stage, config.train)
  generator = np.random.default_rng(0)
  ours = {name: generator.normal(size=(4, 3)).astype('f4') for name in 'ab'}
  theirs = {
    name: torch.nn.Parameter(torch.tensor(value)) for name, value in ours.items()
  }
  adam = torch.optim.AdamW(theirs.values(), lr=rate, weight_decay=0.1)
  rates = torch.optim.lr_scheduler
  schedule = rates.SequentialLR(
    adam,
    [
      rates.LinearLR(adam, 1 / warmup, total_iters=warmup),
      rates.CosineAnnealingLR(adam, steps - warmup),
    ],
    [warmup],
  )
  state, update = optimizer.init(ours), jax.jit(optimizer.update)
  for _ in range(steps):
    grads = {name: generator.normal(size=(4, 3)).astype('f4') for name in 'ab'}
    updates, state = update(grads, state, ours)
    ours = {name: ours[name] + updates[name] for name in ours}
    for name, parameter in theirs.items():
      parameter.grad = torch.tensor(grads[name])
    if clip:
      torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
    adam.step()
    schedule.step()
    for name, parameter in theirs.items():
      np.testing.assert_allclose(
        ours[name], parameter.detach().numpy(), rtol=1e-5, atol=1e-6
      )
