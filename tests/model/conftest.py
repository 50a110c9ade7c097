"""Small models as files: a Hugging Face folder, and GGUF files."""

import json

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, trainers

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import families, weights

SCALING = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 64,
}
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


@pytest.fixture
def refused():
  def check(address, message):
    """Opening ends with one sentence that matches `message`."""
    with pytest.raises(InputError, match=message) as caught:
      weights.open_base(str(address))
    assert str(caught.value).startswith('model.address: ')
    assert '\n' not in str(caught.value)

  return check


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A cache of the test's own."""
  monkeypatch.setenv('BEHAVIORLM_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


@pytest.fixture
def write_gguf(cache):
  del cache  # converted files must not outlive the test
  return write


def save(folder, tied=True, **options):
  """Writes a tiny random Llama with transformers; returns the model."""
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=tied,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_parameters=SCALING | {'rope_theta': 20000.0},
  )
  model = transformers.LlamaForCausalLM(config)
  for parameter in model.parameters():  # norms would otherwise all be ones
    torch.nn.init.normal_(parameter)
  model.save_pretrained(folder, **options)
  weights.open_base('random://tiny').tokenizer.save_pretrained(folder)
  return model


def save_soft(folder, tied=True, **fields):
  """Saves a random Llama whose attention is not one-hot; returns the model."""
  model = save(folder, tied)
  if fields:
    config = model.config.to_dict() | fields
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config))
  torch.manual_seed(1)
  for parameter in model.parameters():
    spread = 0.3 if parameter.ndim == 2 else 1.0
    torch.nn.init.normal_(parameter, std=spread)
  model.save_pretrained(folder)
  return model.eval()


def read(folder, dtype=np.float32):
  """Config and parameters of a folder or file."""
  base = weights.open_base(str(folder))
  return base.config, weights.read_params(base, dtype)


def stack(config, state):
  """Our parameters, from Hugging Face weights {name: array}."""
  result = {}
  for name in families.parameter_shapes(config):
    theirs = families.LLAMA_NAMES[name]
    if '{}' in theirs:
      layers = [state[theirs.format(layer)] for layer in range(config.layers)]
      result[name] = np.stack(layers)
    else:
      result[name] = state[theirs]
  return result


def tiny(tied=True, seed=0):
  """Config and Hugging Face weights {name: float32} of a tiny Llama."""
  config = families.DecoderConfig(
    vocab=320,
    layers=2,
    embed=64,
    mlp=96,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rope_theta=1e5,
    norm_eps=1e-5,
    tied=tied,
    max_length=256,
  )
  generator = np.random.default_rng(seed)
  return config, {
    name: generator.standard_normal(shape, np.float32)
    for name, shape in families.hf_shapes(config)
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


def write(path, config, state, fields=None, extra=None, kind=None, pre='smollm'):
  """Writes a GGUF as llama.cpp's converter would.

  `fields` overrides string or integer metadata, `extra` adds tensors, `kind`
  quantises the MLP of the first layer.
  """
  fields = fields or {}
  order = fields.get('order', gguf.GGUFEndian.LITTLE)
  writer = gguf.GGUFWriter(path, fields.get('architecture', 'llama'), endianess=order)
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
  names = {
    'token_embd': 'model.embed_tokens',
    'output_norm': 'model.norm',
    'output': 'lm_head',
  }
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


# What tests call, by fixtures: no test imports this file.
save_llama = pytest.fixture(lambda: save)
save_soft_llama = pytest.fixture(lambda: save_soft)
read_folder = pytest.fixture(lambda: read)
stacked = pytest.fixture(lambda: stack)
tiny_llama = pytest.fixture(lambda: tiny)
