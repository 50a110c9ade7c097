"""LoRA starts as the base model and leaves as a folder that peft reads."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import decoder, families, lora

RANK, ALPHA = 4, 12.0
TINY = families.PRESETS['tiny']
SUBSETS = [
  pytest.param(decoder.PROJECTIONS, id='all'),
  pytest.param(('v_proj', 'q_proj'), id='queries and values'),
  pytest.param(('k_proj', 'down_proj'), id='keys and down'),
]


def random_adapter(config, targets):
  """A drawn as for training, B too, so that nothing is zero."""
  adapter = lora.init(config, RANK, targets, jax.random.key(0))
  generator = np.random.default_rng(0)
  for sides in adapter.values():
    b = generator.standard_normal(sides['b'].shape) * 0.1
    sides['b'] = b.astype(np.float32)
  return adapter


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, adapter, tokens):
  model = lora.attach(config, params, adapter, ALPHA)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = model.packed_hidden(tokens, positions, jnp.ones_like(tokens))
  return model.logits(hidden)


def draw(shape):
  tokens = np.random.default_rng(1).integers(0, 300, shape)
  return tokens.astype(np.int32)


def test_init_has_the_distribution_of_peft(tmp_path, save_llama, read_folder):
  """Uniform draws of some thousand values come close to their bound."""
  theirs = save_llama(tmp_path)
  config, rank = read_folder(tmp_path)[0], 64
  ours = lora.init(config, rank, decoder.PROJECTIONS, jax.random.key(0))
  model = peft.get_peft_model(
    theirs, peft.LoraConfig(r=rank, target_modules=list(decoder.PROJECTIONS))
  )
  drawn = {name: [] for name in decoder.PROJECTIONS}
  for path, parameter in model.named_parameters():
    if 'lora_A' in path:
      name = path.split('.lora_A')[0].split('.')[-1]
      drawn[name].append(parameter.detach().numpy())
    assert 'lora_B' not in path or not parameter.any()
  for name, parts in drawn.items():
    a, expected = np.asarray(ours[name]['a']), np.stack(parts)
    assert a.shape == expected.shape
    assert np.abs(a).max() == pytest.approx(np.abs(expected).max(), rel=0.01)
    assert a.std() == pytest.approx(expected.std(), rel=0.05)
    assert np.abs(a.mean()) < 0.05 * a.std()
    assert not np.asarray(ours[name]['b']).any()


def test_layers_and_projections_start_from_different_draws():
  adapter = lora.init(TINY, RANK, ('k_proj', 'q_proj', 'v_proj'), jax.random.key(0))
  layers = [layer for name in adapter for layer in adapter[name]['a']]
  assert len({np.asarray(layer).tobytes() for layer in layers}) == 3 * TINY.layers


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_step_zero_logits_equal_the_base_models_exactly(
  tmp_path, save_soft_llama, dtype, read_folder
):
  save_soft_llama(tmp_path)
  config, params = read_folder(tmp_path, dtype)
  adapter = lora.init(config, RANK, decoder.PROJECTIONS, jax.random.key(0))
  tokens = draw((2, 24))
  found = logits_of(config, params, adapter, tokens)
  bare = logits_of(config, params, None, tokens)
  np.testing.assert_array_equal(found, bare)


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('targets', SUBSETS)
def test_peft_reads_our_folder_and_gives_our_logits(
  tmp_path, save_soft_llama, tied, targets, read_folder
):
  save_soft_llama(tmp_path / 'base', tied)
  config, params = read_folder(tmp_path / 'base')
  adapter = random_adapter(config, targets)
  lora.export(tmp_path / 'adapter', adapter, ALPHA, tmp_path / 'base')
  tokens = draw((2, 24))
  ours = logits_of(config, params, adapter, tokens)
  bare = logits_of(config, params, None, tokens)

  base = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'base', dtype=torch.float32
  )
  theirs = peft.PeftModel.from_pretrained(base, tmp_path / 'adapter').eval()
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3)
  assert np.abs(ours - bare).max() > 0.1


def test_every_projection_of_an_adapter_moves_the_logits(
  tmp_path, save_soft_llama, read_folder
):
  save_soft_llama(tmp_path)
  config, params = read_folder(tmp_path)
  tokens = draw((1, 12))
  bare = logits_of(config, params, None, tokens)
  adapter = random_adapter(config, decoder.PROJECTIONS)
  for name in decoder.PROJECTIONS:
    only = {
      other: sides | {'b': sides['b'] * (other == name)}
      for other, sides in adapter.items()
    }
    moved = logits_of(config, params, only, tokens)
    assert np.abs(moved - bare).max() > 0.01, name


@pytest.fixture
def exported(tmp_path):
  """An adapter, and the folder that holds it."""
  adapter = random_adapter(TINY, ('up_proj', 'o_proj'))
  lora.export(tmp_path / 'adapter', adapter, ALPHA, tmp_path)
  return adapter, tmp_path / 'adapter'


def test_an_exported_adapter_is_read_back_exactly(exported):
  adapter, folder = exported
  found, alpha = lora.read_adapter(folder)
  assert alpha == ALPHA
  assert jax.tree.structure(found) == jax.tree.structure(adapter)
  jax.tree.map(np.testing.assert_array_equal, found, adapter)
  assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    ({'use_rslora': True}, 'use_rslora'),
    ({'alpha_pattern': {'x': 1}}, 'alpha_pattern'),
    ({'peft_type': 'LOHA'}, 'LOHA'),
    ({'target_modules': ['o_proj']}, r'more tensors, such as .*up_proj'),
  ],
)
def test_other_kinds_of_adapters_are_refused(exported, fields, says):
  _, folder = exported
  path = folder / 'adapter_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))
  with pytest.raises(InputError, match=f'is no adapter .*{says}'):
    lora.read_adapter(folder)


def test_adapter_config_says_rank_alpha_targets_and_base(exported):
  _, folder = exported
  found = json.loads((folder / 'adapter_config.json').read_text())
  expected = {
    'peft_type': 'LORA',
    'r': RANK,
    'lora_alpha': ALPHA,
    'bias': 'none',
    'target_modules': ['o_proj', 'up_proj'],
    'base_model_name_or_path': str(folder.parent),
  }
  assert expected.items() <= found.items()


@pytest.mark.parametrize(
  'targets, named', [(('q_proj', 'qproj'), 'qproj'), ((), 'empty')]
)
def test_targets_that_are_no_projections_are_refused(targets, named):
  with pytest.raises(InputError, match=rf'^lora\.targets: .*{named}'):
    lora.shapes(TINY, RANK, targets)
