"""The decoder computes what transformers computes, and nothing leaks in it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data import chat
from behaviorlm_jax.io import addresses
from behaviorlm_jax.model import (
  attention,
  blocked_attention,
  decoder,
  families,
  lora,
  weights,
)

LONG = 120  # tokens; rope scaling starts to matter beyond 64
PLAIN = {'rope_type': 'default', 'rope_theta': 1e4}


def draw(shape, seed=0):
  tokens = np.random.default_rng(seed).integers(0, 300, shape)
  return tokens.astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def logits_of(config, params, tokens, remat='none'):
  """Logits float32 [B, L, V] of whole rows, each one segment."""
  model = decoder.Decoder(config, params, how=decoder.Execution(remat=remat))
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  segments = jnp.ones_like(tokens)
  return model.logits(model.packed_hidden(tokens, positions, segments)[0])


@functools.partial(jax.jit, static_argnums=0)
def packed_logits(config, params, tokens, segments, positions):
  """Logits float32 [L, V] of one packed row."""
  model = decoder.Decoder(config, params)
  row = tokens[None], positions[None], segments[None]
  return model.logits(model.packed_hidden(*row)[0][0])


def reference(model, tokens):
  with torch.no_grad():
    return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.fixture
def untied(tmp_path, save_soft_llama, read_folder):
  """Config and parameters; the embedding takes part as input alone."""
  save_soft_llama(tmp_path, tied=False)
  return read_folder(tmp_path)


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize(
  'fields',
  [
    pytest.param({}, id='grouped heads, llama3 rope'),
    pytest.param(
      {'rope_parameters': PLAIN, 'num_key_value_heads': 4}, id='all heads, plain rope'
    ),
    pytest.param(
      {
        'rope_parameters': PLAIN,
        'num_key_value_heads': 1,
        'head_dim': 12,
        'rms_norm_eps': 0.1,
      },
      id='one key head, wide heads, large eps',
    ),
  ],
)
def test_logits_equal_those_of_transformers(
  tmp_path, save_soft_llama, tied, fields, read_folder
):
  theirs = save_soft_llama(tmp_path, tied, **fields)
  config, params = read_folder(tmp_path)
  tokens = draw((2, LONG))
  expected = reference(theirs, tokens)
  found = logits_of(config, params, tokens)
  assert expected.std() > 1  # else a tolerance of 1e-3 says nothing
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_rope_scaling_changes_the_logits_of_long_rows(
  tmp_path, save_soft_llama, read_folder
):
  save_soft_llama(tmp_path, tied=True)
  config, params = read_folder(tmp_path)
  plain = dataclasses.replace(config, rope_scaling=None)
  tokens = draw((1, LONG))
  one = logits_of(config, params, tokens)
  other = logits_of(plain, params, tokens)
  assert np.abs(one - other)[:, 64:].max() > 0.1


@pytest.mark.parametrize('preset', sorted(families.PRESETS))
def test_rope_frequencies_of_presets_equal_those_of_transformers(preset):
  config = families.PRESETS[preset]
  theirs = transformers.LlamaConfig.from_dict(families.to_hf(config))
  rope = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
  np.testing.assert_allclose(
    decoder.rope_frequencies(config), rope.inv_freq.numpy(), rtol=1e-5
  )


@pytest.mark.slow
def test_smollm2_logits_equal_those_of_transformers_on_the_same_gguf():
  path = addresses.resolve(config_lib.SMOLLM2, 'model.address')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()
  base = weights.open_base(config_lib.SMOLLM2)
  params = weights.read_params(base, np.float32)
  text = chat.render(
    base.tokenizer,
    [{'role': 'user', 'content': 'Where do people go after work, at 18:30?'}],
    add_generation_prompt=True,
  )
  ids = base.tokenizer.encode(text, add_special_tokens=False)
  tokens = np.array([ids], np.int32)
  expected = reference(theirs, tokens)
  np.testing.assert_allclose(
    logits_of(base.config, params, tokens), expected, rtol=0, atol=1e-3
  )


def test_keys_and_values_kept_give_the_same_logits_as_one_pass(untied):
  config, params = untied
  tokens, cut = draw((2, 20)), 13

  @jax.jit
  def in_two_passes(params, tokens):
    model = decoder.Decoder(config, params)
    positions = jnp.broadcast_to(jnp.arange(20), tokens.shape)
    segments = jnp.ones_like(tokens)
    _, cache = model.packed_hidden(
      tokens[:, :cut], positions[:, :cut], segments[:, :cut], keep_cache=True
    )

    def attend(q, k, v, early_k, early_v):
      return attention.masked_attention(
        q,
        jnp.concatenate([early_k, k], axis=1),
        jnp.concatenate([early_v, v], axis=1),
        attention.causal_mask(segments)[:, :, cut:],
      )

    hidden, nothing = model(tokens[:, cut:], positions[:, cut:], attend, memory=cache)
    assert nothing is None
    return model.logits(hidden)

  np.testing.assert_allclose(
    in_two_passes(params, tokens), logits_of(config, params, tokens)[:, cut:], atol=1e-4
  )


@pytest.mark.slow
def test_remat_policies_give_equal_losses_and_gradients(untied):
  config, params = untied
  tokens = draw((2, 16))

  def loss(params, remat):
    logits = logits_of(config, params, tokens, remat)
    return jax.nn.logsumexp(logits, axis=-1).mean()

  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  expected, gradient = run(params, 'none')
  for remat in set(decoder.REMAT_POLICIES) - {'none'}:
    found, other = run(params, remat)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for name, value in gradient.items():
      np.testing.assert_allclose(
        other[name], value, rtol=1e-4, atol=1e-6 * np.abs(value).max()
      )


@pytest.mark.slow
def test_remat_policies_give_equal_adapters_around_bfloat16_weights(untied):
  config, params = untied
  params = {name: jnp.asarray(x, jnp.bfloat16) for name, x in params.items()}
  adapter = lora.init(config, 2, decoder.PROJECTIONS, jax.random.key(0))
  adapter = jax.tree.map(lambda x: x + 0.1, adapter)  # B is zero at first.
  tokens = draw((2, 16))

  def loss(adapter, remat):
    model = lora.attach(config, params, adapter, 4.0, remat=remat)
    positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)
    hidden, _ = model.packed_hidden(tokens, positions, jnp.ones_like(tokens))
    return jax.nn.logsumexp(model.logits(hidden), axis=-1).mean()

  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  expected, gradient = run(adapter, 'none')
  for remat in set(decoder.REMAT_POLICIES) - {'none'}:
    found, other = run(adapter, remat)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    for value, same in zip(
      jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True
    ):
      assert np.abs(value).max() > 0
      np.testing.assert_allclose(same, value, atol=0.02 * np.abs(value).max())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_saved_products_are_not_multiplied_again(untied, dtype):
  config, params = untied
  params = {name: jnp.asarray(x, dtype) for name, x in params.items()}
  adapter = lora.init(config, 2, decoder.PROJECTIONS, jax.random.key(0))
  tokens = draw((2, 16))
  positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)

  def loss(adapter, remat):
    model = lora.attach(
      config, params, adapter, 4.0, remat=remat, packed=blocked_attention.blocked
    )
    hidden, _ = model.packed_hidden(tokens, positions, jnp.ones_like(tokens))
    return hidden.astype(jnp.float32).sum()

  products = {}
  for remat in decoder.REMAT_POLICIES:
    # As XLA gets it: what nothing needs is gone.
    text = (
      jax.jit(jax.grad(loss), static_argnums=1)
      .lower(adapter, remat)
      .compile()
      .as_text()
    )
    products[remat] = len(re.findall(r' dot\(', text))
  assert products['products'] == products['none'] < products['full']


def test_no_position_depends_on_a_later_token(untied):
  config, params = untied
  length = 8
  tokens = jnp.arange(1, length + 1)[None]  # distinct: a row per position

  def hidden(embed):
    model = decoder.Decoder(config, params | {'embed': embed})
    row = tokens, jnp.arange(length)[None], jnp.ones_like(tokens)
    return model.packed_hidden(*row)[0][0].sum(-1)

  jacobian = jax.jit(jax.jacrev(hidden))(jnp.asarray(params['embed']))
  moved = np.abs(jacobian[:, 1 : length + 1]).sum(-1)  # [output, input]
  assert (moved[np.triu_indices(length, 1)] == 0).all()
  assert (moved[np.tril_indices(length)] > 0).all()


PACKED = {
  'tokens': jnp.arange(1, 17),  # distinct: a row of `embed` per position
  'segments': jnp.array([1] * 6 + [2] * 7 + [0] * 3),
  'positions': jnp.array([*range(6), *range(7), *range(3)]),
}


@pytest.mark.parametrize(
  'where, own',
  [
    pytest.param(range(1, 5), range(6), id='first'),
    pytest.param(range(8, 12), range(6, 13), id='second'),
  ],
)
def test_a_packed_loss_has_no_gradient_to_its_neighbours(untied, where, own):
  config, params = untied
  where = jnp.array(where)

  def loss(embed):
    logits = packed_logits(config, params | {'embed': embed}, **PACKED)
    scores = jax.nn.log_softmax(logits[where])
    return -scores[jnp.arange(len(where)), PACKED['tokens'][where + 1]].sum()

  gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(params['embed'])))
  moved = np.abs(gradient).sum(-1)
  seen = [i for i in own if i <= max(where)]
  assert (moved[np.asarray(PACKED['tokens'])[seen]] > 0).all()
  moved[np.asarray(PACKED['tokens'])[seen]] = 0
  assert (moved == 0).all()


def test_packed_logits_equal_those_of_each_segment_alone(untied):
  packed = packed_logits(*untied, **PACKED)
  for part in (slice(0, 6), slice(6, 13)):
    alone = logits_of(*untied, PACKED['tokens'][None, part])[0]
    np.testing.assert_allclose(packed[part], alone, atol=1e-4)


def test_backends_differ_in_speed_alone(untied):
  config, params = untied
  tokens = draw((1, 16))
  params = {name: jnp.asarray(x, jnp.bfloat16) for name, x in params.items()}

  @functools.partial(jax.jit, static_argnums=1)
  def logits(params, backend):
    model = decoder.Decoder(config, params, how=decoder.Execution(backend=backend))
    row = tokens, jnp.arange(16)[None], jnp.ones_like(tokens)
    return model.logits(model.packed_hidden(*row)[0])

  exact = logits_of(
    config, {n: x.astype(jnp.float32) for n, x in params.items()}, tokens
  )
  error = lambda found: float(jnp.sqrt(jnp.mean((found - exact) ** 2)))
  assert error(logits(params, 'tpu')) < 0.02 * float(exact.std())
  assert error(logits(params, 'cpu')) <= error(logits(params, 'tpu'))
