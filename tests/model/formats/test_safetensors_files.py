"""Safetensors files: headers and indices that do not fit are refused."""

import json
import struct


def test_a_folder_without_weights_is_refused(tmp_path, refused, save_llama):
  save_llama(tmp_path)
  (tmp_path / 'model.safetensors').unlink()
  refused(tmp_path, 'has neither model.safetensors nor')


def test_a_header_longer_than_its_file_is_refused(tmp_path, refused, save_llama):
  save_llama(tmp_path)
  file = tmp_path / 'model.safetensors'
  data = file.read_bytes()
  file.write_bytes(struct.pack('<Q', 10**15) + data[8:])
  refused(tmp_path, f'truncated at {len(data)} bytes .*header too large')
  file.write_bytes(data[:5])
  refused(tmp_path, 'truncated at 5 bytes .*header too small')
  file.write_bytes(data[:100])
  refused(tmp_path, 'truncated at 100 bytes .*invalid header length')


def test_data_of_another_length_than_the_header_says_are_refused(
  tmp_path, refused, save_llama
):
  save_llama(tmp_path)
  file = tmp_path / 'model.safetensors'
  data = file.read_bytes()
  file.write_bytes(data[:-10])
  refused(tmp_path, f'at {len(data) - 10} bytes .*file not fully covered')
  file.write_bytes(data + b'0')
  refused(tmp_path, f'at {len(data) + 1} bytes .*file not fully covered')


def test_a_header_that_is_not_one_is_refused(tmp_path, refused, save_llama):
  save_llama(tmp_path)
  file = tmp_path / 'model.safetensors'
  for header in (
    b'{broken',
    b'[1, 2]',
    b'{"a": 1}',
    b'{"a": {"dtype": 1}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":["",""]}}',
  ):
    file.write_bytes(struct.pack('<Q', len(header)) + header)
    refused(tmp_path, r'is corrupt .*invalid JSON in header')


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path, refused, save_llama):
  save_llama(tmp_path, max_shard_size='20KB')
  index = tmp_path / 'model.safetensors.index.json'
  content = json.loads(index.read_text())
  places = content['weight_map']
  name, file = next(iter(places.items()))
  other = next(place for place in places.values() if place != file)
  index.write_text(json.dumps({'weight_map': places | {name: other}}))
  refused(tmp_path, f'says that {name} is in {other}, which does not hold it')
  index.write_text(json.dumps({'weight_map': [1]}))
  refused(tmp_path, 'has no weight_map')
  index.write_text(json.dumps(content))
  (tmp_path / file).unlink()
  refused(tmp_path, f'names {file}, which does not exist')


def test_weights_of_other_dimensions_are_refused(tmp_path, refused, save_llama):
  save_llama(tmp_path)
  file = tmp_path / 'config.json'
  config = json.loads(file.read_text())
  file.write_text(json.dumps(config | {'intermediate_size': 64}))
  refused(tmp_path, r'has \(48, 32\) where .*gate_proj.* \(64, 32\) is needed')
  file.write_text(json.dumps(config | {'num_hidden_layers': 4}))
  refused(tmp_path, r'no tensor where model.layers.3')
  file.write_text(json.dumps(config | {'num_hidden_layers': 2}))
  refused(tmp_path, r'holds model.layers.2.*not part of a Llama decoder')
  file.write_text(json.dumps(config | {'tie_word_embeddings': False}))
  refused(tmp_path, 'no tensor where lm_head.weight')


def test_weights_of_another_type_are_refused(tmp_path, refused, save_llama):
  save_llama(tmp_path)
  file = tmp_path / 'model.safetensors'
  data = file.read_bytes()
  file.write_bytes(data.replace(b'"F32"', b'"I32"', 1))
  refused(tmp_path, 'has type I32; supported are F64, F32, F16, BF16')
  file.write_bytes(data.replace(b'"F32"', b'"F16"', 1))
  refused(tmp_path, 'invalid shape, data type, or offset')
