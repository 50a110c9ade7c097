"""SASRec equals torch, sees the past alone, and learns what training shows."""

import types

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from behaviorlm_jax.evaluate import baselines, sasrec
from behaviorlm_jax.score import label_tree

pytestmark = pytest.mark.slow


def make_recipe(**fields):
  small = {'steps': 20, 'batch': 8, 'history': 6, 'width': 16, 'dropout': 0.0}
  told = {'weekday': True, 'min_context': 2, 'seed': 0}
  return sasrec.Recipe(**{'layers': 2, **small, **told, **fields})


def make_events(users=12, length=40, known=5, seed=0, follow=None):
  """follow: (last but one, last) -> next behavior; None: at random."""
  rng = np.random.default_rng(seed)
  rows = rng.integers(known, size=(users, length))
  if follow:
    for t in range(2, length):
      rows[:, t] = follow(rows[:, t - 2], rows[:, t - 1])
  place = np.tile(np.arange(length), users)
  return types.SimpleNamespace(
    behavior=rows.ravel(),
    known=known,
    first=np.repeat(np.arange(users) * length, length),
    user=np.repeat(np.arange(users), length),
    time=np.cumsum(rng.integers(600, 90000, users * length)),
    split=np.where(place < length - 10, 0, np.where(place < length - 5, 1, 2)).astype(
      np.int8
    ),
  )


def make_model(recipe, known=5):
  model = sasrec.SasRec(recipe, known, nnx.Rngs(0))
  rng = np.random.default_rng(1)  # Biases and norms would be zeros and ones.
  nnx.update(
    model,
    jax.tree.map(
      lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32),
      nnx.state(model, nnx.Param),
    ),
  )
  model.eval()
  return model


def as_torch(array):
  return torch.tensor(np.asarray(array))


def in_torch(model, batch, heads):
  """The same logits, by torch's own attention and norms."""
  weight = lambda embed: as_torch(embed.embedding[...])
  take = lambda embed, ids: weight(embed)[as_torch(ids).long()]

  def norm(layer, x):
    return torch.nn.functional.layer_norm(
      x, x.shape[-1:], as_torch(layer.scale[...]), as_torch(layer.bias[...]), 1e-6
    )

  dense = lambda layer, x: x @ as_torch(layer.kernel[...]) + as_torch(layer.bias[...])
  x = (
    take(model.behaviors, batch['behavior'])
    + weight(model.places)
    + take(model.hours, batch['hour'])
    + take(model.days, batch['day'])
  )
  length, width = x.shape[1:]
  hidden = torch.ones(length, length).triu(1).bool()
  hidden = hidden | ~as_torch(batch['real'])[:, None]
  for block in model.blocks:
    ours, theirs = (
      block.attention,
      torch.nn.MultiheadAttention(width, heads, batch_first=True),
    )
    parts = [getattr(ours, name) for name in ('query', 'key', 'value')]
    kernels, biases = (
      [as_torch(part.kernel[...]).reshape(width, width).T for part in parts],
      [as_torch(part.bias[...]).reshape(width) for part in parts],
    )
    theirs.load_state_dict(
      {
        'in_proj_weight': torch.cat(kernels),
        'in_proj_bias': torch.cat(biases),
        'out_proj.weight': as_torch(ours.out.kernel[...]).reshape(width, width).T,
        'out_proj.bias': as_torch(ours.out.bias[...]),
      }
    )
    y = norm(block.norms[0], x)
    x = (
      x
      + theirs(
        y, y, y, attn_mask=hidden.repeat_interleave(heads, 0), need_weights=False
      )[0]
    )
    y = torch.relu(dense(block.inner, norm(block.norms[1], x)))
    x = x + dense(block.outer, y)
  return norm(model.norm, x) @ weight(model.behaviors)[: model.known].T


def test_logits_equal_torch():
  recipe, events = make_recipe(), make_events()
  events.behavior[5::7] = events.known  # Not known in training.
  model = make_model(recipe)
  ends = np.array([39, 47, 100, 82])
  batch = sasrec.windows(events, ends, recipe)
  with torch.no_grad():
    want = in_torch(model, batch, recipe.heads).numpy()
  real = batch['real']
  assert not real.all()
  np.testing.assert_allclose(
    np.asarray(model(batch))[real], want[real], rtol=1e-4, atol=1e-4
  )


def test_attention_drops_other_weights_in_each_window():
  recipe = make_recipe(dropout=0.5)
  block = sasrec.Block(recipe, nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (1, 6, recipe.width))
  block.train()
  found = block.attention(jax.numpy.repeat(x, 2, axis=0))
  assert not np.allclose(found[0], found[1])
  block.eval()
  found = block.attention(jax.numpy.repeat(x, 2, axis=0))
  np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_windows_hold_the_past_of_one_user_and_the_time_to_come():
  recipe, events = make_recipe(), make_events()
  batch = sasrec.windows(events, np.array([43, 79]), recipe)
  np.testing.assert_array_equal(batch['real'].sum(1), [3, 6])
  np.testing.assert_array_equal(batch['behavior'][1], events.behavior[73:79])
  np.testing.assert_array_equal(batch['behavior'][0, 3:], events.behavior[40:43])
  np.testing.assert_array_equal(batch['hour'][1], events.time[74:80] // 3600 % 24)
  np.testing.assert_array_equal(batch['day'][1], events.time[74:80] // 86400 % 7)
  recipe = make_recipe(weekday=False)
  assert not sasrec.windows(events, np.array([43]), recipe)['day'].any()


def test_later_events_change_nothing_before_them():
  recipe, events = make_recipe(), make_events()
  model, ends = make_model(recipe), np.array([39, 100])
  batch = sasrec.windows(events, ends, recipe)
  before = np.asarray(model(batch))
  batch['behavior'][:, 4:] = (batch['behavior'][:, 4:] + 1) % events.known
  after = np.asarray(model(batch))
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-3


def test_the_loss_is_cross_entropy_over_targets_alone():
  recipe, events = make_recipe(), make_events()
  model = make_model(recipe)
  batch = sasrec.targets(
    events, sasrec.windows(events, np.array([32, 43, 71]), recipe), 'train'
  )
  logits = np.asarray(model(batch), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  place = np.argwhere(batch['weight'] > 0)
  assert 0 < len(place) < batch['weight'].size
  want = np.mean([-log_p[b, t, batch['target'][b, t]] for b, t in place])
  assert float(sasrec.loss(model, batch)) == pytest.approx(want, rel=1e-5)


def test_scores_are_those_of_the_last_place():
  recipe, events = make_recipe(), make_events()
  model, samples = make_model(recipe), np.array([39, 77, 118])
  found = sasrec.predict_log_p(model, events, samples, recipe)
  logits = np.asarray(model(sasrec.windows(events, samples, recipe)))[:, -1]
  np.testing.assert_allclose(found, label_tree.log_softmax(logits), atol=1e-5)


def test_it_learns_what_two_events_decide_and_markov_cannot():
  follow = lambda a, b: (a + 2 * b + 1) % 5
  events = make_events(users=60, follow=follow)
  recipe = make_recipe(steps=400, batch=32, learning_rate=5e-3)
  samples = np.flatnonzero(events.split == 2)
  model = sasrec.fit_model(events, recipe)
  hits = lambda scores: np.mean(scores.argmax(1) == events.behavior[samples])
  assert hits(sasrec.predict_log_p(model, events, samples, recipe)) > 0.9
  assert hits(baselines.Counts(events).scores('markov', samples)) < 0.6


def test_only_the_training_split_teaches_and_a_seed_repeats():
  recipe, events, other = make_recipe(), make_events(), make_events()
  late = other.split == 2
  other.behavior[late] = (other.behavior[late] + 1) % other.known
  one, two = (sasrec.fit_model(e, recipe) for e in (events, other))
  samples = np.flatnonzero(events.split == 1)
  first, second = (
    sasrec.predict_log_p(model, events, samples, recipe) for model in (one, two)
  )
  np.testing.assert_array_equal(first, second)
  model = sasrec.fit_model(events, make_recipe(seed=1))
  third = sasrec.predict_log_p(model, events, samples, recipe)
  assert np.abs(first - third).max() > 1e-3


def test_behaviors_that_training_does_not_know_share_one_id():
  recipe, events = make_recipe(), make_events()
  events.behavior[41:43] = events.known, events.known + 3
  window = sasrec.windows(events, np.array([44]), recipe)
  assert window['behavior'][0, -3:-1].tolist() == [events.known] * 2
  batch = sasrec.targets(events, window, 'train')
  np.testing.assert_array_equal(batch['weight'][0], [0, 0, 0, 0, 1, 1])


def test_targets_are_those_of_the_split_alone():
  recipe, events = make_recipe(), make_events()
  window = sasrec.windows(events, np.array([32]), recipe)  # Training: to 29.
  for split, want in (
    ('train', [1, 1, 1, 0, 0, 0]),
    ('validation', [0, 0, 0, 1, 1, 1]),
  ):
    weight = sasrec.targets(events, window, split)['weight'][0]
    np.testing.assert_array_equal(weight, want)


@pytest.mark.parametrize(
  'losses, best', [((3, 1, 2), 1), ((np.nan, np.nan, np.nan), None)]
)
def test_the_best_in_validation_is_kept(monkeypatch, losses, best):
  seen, recipe = [], make_recipe(steps=3)
  weights = lambda model: np.array(model.behaviors.embedding[...])

  def validate(model, *_):
    seen.append(weights(model))
    return losses[len(seen) - 1]

  monkeypatch.setattr(sasrec, '_validation', validate)
  untrained = sasrec.SasRec(recipe, 5, nnx.Rngs(recipe.seed))
  model = sasrec.fit_model(make_events(), recipe)
  want = weights(untrained) if best is None else seen[best]
  np.testing.assert_array_equal(weights(model), want)
