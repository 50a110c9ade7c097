"""Where arrays live, and that devices and processes change no number."""

import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.train import sharding

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name('devices_worker.py')
ROWS, LENGTH, PARTS, RANK = 16, 16, 2, 4  # Of the worker.


def mesh(data=1, fsdp=1, tensor=1):
  return {'data': data, 'fsdp': fsdp, 'tensor': tensor}


def start(devices, task):
  return subprocess.Popen(
    [sys.executable, str(WORKER), json.dumps(task)],
    text=True,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': str(devices), 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def finish(process):
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  return json.loads(out.splitlines()[-1])


@pytest.fixture(scope='module')
def alone():
  """Of one device."""
  [result] = finish(start(1, {'meshes': [mesh()], 'whole': True}))
  assert np.diff(result['losses']).max() < -0.01  # It does train.
  assert result['sent'] == []
  return result


def check_losses(result, alone):
  np.testing.assert_allclose(result['losses'], alone['losses'], rtol=1e-4)


def adapter_bytes(sizes):
  """On a device, from the table: a [2, R, in] and b [2, out, R] in float32."""
  f, t = sizes['fsdp'], sizes['tensor']
  embed, heads, kv, mlp = 64 / f, 64 / t, 32 / t, 128 / t
  pairs = (
    (embed, heads),
    (embed, kv),
    (embed, kv),
    (heads, embed),
    (embed, mlp),
    (embed, mlp),
    (mlp, embed),
  )
  return 4 * 2 * RANK * sum(into + out for into, out in pairs)


def check_bytes(sizes, result, alone):
  """Weights and optimizer state are really divided; norms are everywhere."""
  parts = sizes['fsdp'] * sizes['tensor']
  assert result['bytes']['params'] < 1.05 * alone['bytes']['params'] / parts
  expected = adapter_bytes(sizes)
  assert result['bytes']['adapter'] == expected
  assert 0 <= result['bytes']['optimizer'] - 2 * expected <= 16  # Two moments.


def check_sent(sizes, result):
  """Only what the design expects goes between devices.

  data: sums of gradients. fsdp: a layer's weights, too. tensor: sums of
  activations. Where all mix, factors of the adapter change places as well.
  """
  kinds = {'all-reduce'} if sizes != mesh() else set()
  if sizes['fsdp'] > 1:
    kinds.add('all-gather')
  if sizes['fsdp'] > 1 and sizes['tensor'] > 1:
    kinds.add('collective-permute')
  assert {kind for kind, _ in result['sent']} == kinds
  for kind, shape in result['sent']:
    if kind == 'all-gather':  # No activations, which have a row's length.
      assert shape[1:2] != [LENGTH], (kind, shape)
    if kind == 'collective-permute':
      assert np.prod(shape) <= 128 * RANK, (kind, shape)


@pytest.mark.parametrize(
  'devices, meshes',
  [(2, [mesh(data=2), mesh(fsdp=2), mesh(tensor=2)]), (4, [mesh(data=2, fsdp=2)])],
)
def test_devices_change_no_loss(devices, meshes, alone):
  found = finish(start(devices, {'meshes': meshes}))
  for sizes, result in zip(meshes, found, strict=True):
    assert result['devices'] == devices
    check_losses(result, alone)
    check_bytes(sizes, result, alone)
    check_sent(sizes, result)


def test_one_and_eight_devices_give_the_same_losses_and_scores(alone):
  meshes = [mesh(data=8), mesh(fsdp=8), mesh(2, 2, 2)]
  found = finish(start(8, {'meshes': meshes, 'whole': True}))
  for sizes, result in zip(meshes, found, strict=True):
    assert result['devices'] == 8
    check_losses(result, alone)
    for kind in ('scores', 'named'):
      np.testing.assert_allclose(result[kind], alone[kind], atol=1e-3)
    check_bytes(sizes, result, alone)
    check_sent(sizes, result)


def test_two_processes_with_two_devices_each_give_the_same_losses(alone):
  """Rows are divided among processes, not always side by side, or every process
  has all of them."""
  with socket.create_server(('', 0)) as server:
    port = server.getsockname()[1]
  meshes = [mesh(data=4), mesh(fsdp=4), mesh(fsdp=2, tensor=2), mesh(tensor=4)]
  orders = [[0, 2, 1, 3], [0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]]
  started = [
    start(
      2,
      {
        'meshes': meshes,
        'orders': orders,
        'distributed': {
          'coordinator': f'localhost:{port}',
          'processes': 2,
          'process': process,
          'timeout': 60,
        },
      },
    )
    for process in range(2)
  ]
  for found in map(finish, started):
    for sizes, result in zip(meshes, found, strict=True):
      assert result['devices'] == 4
      check_losses(result, alone)
      if sizes['tensor'] < 4:  # Two heads for keys and values.
        check_bytes(sizes, result, alone)
        check_sent(sizes, result)
    # Nobody reads what lives elsewhere: of weights in four parts, half.
    assert found[1]['read'] < 0.55 * alone['read']


def make_layout(**fields):
  """On the one device of this process, as if it were a part of a mesh."""
  config = config_lib.default()
  config.update_from_flattened_dict(fields)
  return sharding.make_layout(config.mesh, config.train)


def divided(layout, sizes, axes, shape, name='', head_dim=1):
  """The spec of a weight on a mesh of other sizes."""
  abstract = jax.sharding.AbstractMesh(tuple(sizes.values()), sharding.AXES)
  layout = dataclasses.replace(layout, mesh=abstract, head_dim=head_dim)
  return tuple(layout.weight(axes, shape, name).spec)


def test_the_table_decides():
  axes, shape = ('layers', 'heads', 'embed'), (2, 64, 64)
  assert divided(make_layout(), mesh(1, 2, 2), axes, shape) == (None, 'tensor', 'fsdp')


def test_no_weight_has_two_axes_that_one_of_the_mesh_divides():
  for axes in sharding.PARAM_AXES.values():
    used = [name for axis in axes if axis for name in sharding.TABLE[axis]]
    assert set(used) <= set(sharding.AXES)
    assert len(set(used)) == len(used)


def test_what_cannot_be_divided_is_whole_on_every_device_and_in_the_log(caplog):
  axes, shape = ('layers', 'kv_heads', 'embed'), (2, 3 * 64, 576)
  with caplog.at_level(logging.INFO):
    spec = divided(
      make_layout(), mesh(1, 4, 2), axes, shape, 'layers.k_proj', head_dim=64
    )
  assert spec == (None, None, 'fsdp')
  assert 'layers.k_proj: 3 kv_heads cannot be divided by tensor (2)' in (caplog.text)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'mesh.data': 3}, 'mesh.data x fsdp x tensor is 3 x 1 x 1, but there'),
    ({'train.batch': 3, 'train.accumulate': 2}, 'train.batch is 3, but'),
  ],
)
def test_a_layout_that_cannot_be_is_refused(fields, message):
  with pytest.raises(InputError, match=message):
    make_layout(**fields)


def test_gather_gives_every_host_whole_arrays():
  layout = make_layout()
  tree = {'a': np.arange(6.0).reshape(2, 3), 'b': {'c': np.ones(4)}}
  placed = jax.tree.map(lambda x: jax.device_put(x, layout.rows(x.shape)), tree)
  found = layout.gather(placed)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(found))
  jax.tree.map(np.testing.assert_array_equal, found, tree)
