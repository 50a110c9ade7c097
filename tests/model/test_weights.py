"""Hugging Face folders and random presets: read back equal, or refused."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import families, weights


def weights_of(model):
  """Dimensions and float32 weights of a transformers model."""
  state = {k: v.float().numpy() for k, v in model.state_dict().items()}
  return families.from_hf(model.config.to_dict(), 'model'), state


def check_equal(found, expected):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('options', [{}, {'max_shard_size': '20KB'}])
def test_a_folder_is_read_back_equal(tmp_path, tied, options, save_llama, stacked):
  model = save_llama(tmp_path, tied, **options)
  assert (tmp_path / 'model.safetensors').exists() == (not options)
  base = weights.open_base(str(tmp_path))
  assert base.config == families.DecoderConfig(
    vocab=300,
    layers=3,
    embed=32,
    mlp=48,
    heads=4,
    kv_heads=2,
    head_dim=8,
    rope_theta=20000.0,
    norm_eps=1e-5,
    tied=tied,
    max_length=128,
    rope_scaling=families.RopeScaling(8.0, 1.0, 4.0, 64),
  )
  assert base.folder == tmp_path
  check_equal(weights.read_params(base, np.float32), stacked(*weights_of(model)))


def test_bfloat16_files_are_read_in_both_types(tmp_path, save_llama, stacked):
  model = save_llama(tmp_path)
  model.to(torch.bfloat16).save_pretrained(tmp_path)
  base = weights.open_base(str(tmp_path))
  expected = stacked(*weights_of(model))
  check_equal(weights.read_params(base, np.float32), expected)
  narrow = weights.read_params(base, ml_dtypes.bfloat16)
  assert {value.dtype for value in narrow.values()} == {np.dtype(ml_dtypes.bfloat16)}
  check_equal({k: v.astype(np.float32) for k, v in narrow.items()}, expected)


@pytest.mark.parametrize('address', ['folder', 'random://tiny'])
def test_place_reads_any_slice(tmp_path, address, save_llama):
  if address == 'folder':
    save_llama(tmp_path)
    address = str(tmp_path)
  base = weights.open_base(address)
  whole = weights.read_params(base, np.float32)

  def place(name, shape, dtype, read):
    assert shape == whole[name].shape and dtype == np.float32
    index = tuple(slice(size // 2, size) for size in shape)
    return read(index), whole[name][index]

  for part, expected in weights.read_params(base, np.float32, place).values():
    np.testing.assert_array_equal(part, expected)


def test_the_fingerprint_follows_weights_config_and_template(tmp_path, save_llama):
  save_llama(tmp_path)
  prints = [weights.open_base(str(tmp_path)).fingerprint]
  assert weights.open_base(str(tmp_path)).fingerprint == prints[0]
  file = tmp_path / 'model.safetensors'
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)
  prints.append(weights.open_base(str(tmp_path)).fingerprint)
  (tmp_path / 'chat_template.jinja').write_text('{{ messages }}')
  prints.append(weights.open_base(str(tmp_path)).fingerprint)
  assert len(set(prints)) == 3


# Tables.


@pytest.mark.parametrize('name', families.PRESETS)
def test_presets_survive_config_json(name):
  config = families.PRESETS[name]
  written = json.loads(json.dumps(families.to_hf(config)))
  assert families.from_hf(written, 'config.json') == config
  theirs = transformers.LlamaConfig.from_dict(written)
  assert families.from_hf(theirs.to_dict(), 'config.json') == config


@pytest.mark.parametrize(
  ('name', 'millions'),
  [
    ('smollm2-135m', 134.5),
    ('llama-3.2-1b', 1235.8),
    ('llama-3.1-8b', 8030.3),
    ('llama-3.1-70b', 70553.7),
  ],
)
def test_presets_have_the_published_number_of_parameters(name, millions):
  shapes = families.parameter_shapes(families.PRESETS[name])
  found = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
  assert round(found / 1e6, 1) == millions


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model_type': 'gpt2'}, "model_type 'gpt2'; supported is 'llama'"),
    ({'attention_bias': True}, 'attention_bias=True'),
    ({'mlp_bias': True}, 'mlp_bias=True'),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu'; only 'silu'"),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'rope_scaling': {'rope_type': 'yarn'}}, "rotary type 'yarn'"),
    ({'rope_scaling': {'type': 'linear'}}, "rotary type 'linear'"),
    ({'rope_parameters': {'rope_type': 'llama3'}}, 'lacks factor'),
    ({'hidden_size': None}, 'lacks hidden_size; a positive integer'),
    ({'num_attention_heads': 0}, 'num_attention_heads=0'),
    ({'num_key_value_heads': 3}, '4 query heads for 3 key-value heads'),
  ],
)
def test_what_the_decoder_does_not_do_is_refused(change, message):
  config = families.to_hf(families.PRESETS['tiny']) | change
  with pytest.raises(InputError, match=message):
    families.from_hf(config, 'm/config.json')


# Random presets.


def test_random_weights_are_the_same_every_time_and_differ_by_name():
  first, second = (
    weights.read_params(weights.open_base('random://tiny'), np.float32)
    for _ in range(2)
  )
  check_equal(first, second)
  assert np.all(first['final_norm'] == 1)
  assert np.all(first['layers.mlp_norm'] == 1)
  assert abs(first['embed'].std() - 0.02) < 5e-4
  queries = first['layers.q_proj']
  assert not np.array_equal(queries[0], queries[1])
  assert not np.array_equal(queries, first['layers.o_proj'])


def test_the_byte_tokenizer_gives_one_token_per_byte():
  tokenizer = weights.open_base('random://tiny').tokenizer
  assert len(tokenizer) == 259
  text = 'Mon 08:15 café 你好 🙂\n\t'
  ids = tokenizer(text)['input_ids']
  assert len(ids) == len(text.encode()) and max(ids) < 256
  assert tokenizer.decode(ids) == text
  assert len(tokenizer('<|im_start|><|im_end|><|pad|>')['input_ids']) == 3
  assert tokenizer.eos_token == '<|im_end|>'
  assert tokenizer.pad_token == '<|pad|>'


def test_the_random_chat_template_adds_no_system_message():
  tokenizer = weights.open_base('random://tiny').tokenizer
  messages = [{'role': 'user', 'content': 'hi'}]
  text = tokenizer.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True
  )
  assert text == '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'


def test_opening_and_reading_need_no_torch(tmp_path, save_llama):
  save_llama(tmp_path)
  script = (
    "import sys; sys.modules['torch'] = None\n"
    'import numpy\n'
    'from behaviorlm_jax.model import weights\n'
    f'base = weights.open_base({str(tmp_path)!r})\n'
    'weights.read_params(base, numpy.float32)\n'
    "assert base.tokenizer('ab')['input_ids']\n"
  )
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr


# Wrong input.


def test_addresses_that_name_nothing_are_refused(tmp_path, refused):
  refused(tmp_path / 'absent', 'does not exist')
  refused('random://huge', "'random://huge' names no preset; .* one of tiny")
  (tmp_path / 'model.bin').write_bytes(b'x')
  refused(tmp_path / 'model.bin', 'neither a folder nor a .gguf file')


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json'])
def test_a_folder_without_or_with_damaged_descriptions_is_refused(
  tmp_path, name, refused, save_llama
):
  save_llama(tmp_path)
  (tmp_path / name).write_text('{"model_type": ')
  refused(tmp_path, f'{name} is not JSON')
  (tmp_path / name).write_text('[]')
  refused(tmp_path, f'{name} holds list')
  (tmp_path / name).unlink()
  refused(tmp_path, f'has no {name}')


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, refused, save_llama):
  save_llama(tmp_path)
  tokenizer = weights.open_base('random://tiny').tokenizer
  tokenizer.add_tokens([f'word{i}' for i in range(60)])
  tokenizer.save_pretrained(tmp_path)
  refused(tmp_path, 'has 319 tokens but the model 300')
