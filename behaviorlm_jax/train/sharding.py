"""One table decides where every array lives; jit does the rest.

Arrays have logical axes, RULES sends logical axes to mesh axes, and nothing
else in the project places arrays. A dimension that its mesh axes do not divide
is replicated, and the log names it.
"""

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from behaviorlm_jax.errors import InputError

AXES = ('data', 'fsdp', 'tensor')
RULES = {
    'batch': ('data', 'fsdp'),
    'layers': None,
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'mlp': 'tensor',
    'vocab': 'tensor',
    'rank': None,
}
PARAM_AXES = {
    'embed': ('vocab', 'embed'),
    'head': ('vocab', 'embed'),
    'final_norm': (None,),
    'layers.attention_norm': ('layers', None),
    'layers.mlp_norm': ('layers', None),
    'layers.q_proj': ('layers', 'heads', 'embed'),
    'layers.k_proj': ('layers', 'kv_heads', 'embed'),
    'layers.v_proj': ('layers', 'kv_heads', 'embed'),
    'layers.o_proj': ('layers', 'embed', 'heads'),
    'layers.gate_proj': ('layers', 'mlp', 'embed'),
    'layers.up_proj': ('layers', 'mlp', 'embed'),
    'layers.down_proj': ('layers', 'embed', 'mlp'),
}


def make_mesh(sizes, batch, accumulate=1):
  """Mesh over all devices from config.mesh; `batch` rows must divide by it."""
  devices = jax.devices()
  shape = [sizes[axis] for axis in AXES]
  if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
    raise InputError(f'mesh is {dict(zip(AXES, shape, strict=True))}; every '
                     'axis must be positive and at most one -1.')
  if -1 in shape:
    known = -int(np.prod(shape))
    shape[shape.index(-1)] = max(1, len(devices) // known)
  if np.prod(shape) != len(devices):
    raise InputError(
        f'mesh.data x fsdp x tensor is {" x ".join(map(str, shape))}, but '
        f'there are {len(devices)} devices; make the product equal.')
  rows = shape[0] * shape[1]  # As row_parts, before there is a mesh.
  if batch % (rows * accumulate):
    raise InputError(
        f'train.batch is {batch}, but mesh.data x mesh.fsdp is {rows} '
        f'and train.accumulate is {accumulate}; the batch must be a '
        'multiple of their product.')
  return jax.make_mesh(shape, AXES, devices=devices,
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)


def sharding(mesh, axes, shape, name=''):
  """NamedSharding of an array with the given logical axes and shape."""
  spec = []
  for axis, size in zip(axes, shape, strict=True):
    target = RULES[axis] if axis else None
    parts = (target,) if isinstance(target, str) else target or ()
    if size % int(np.prod([mesh.shape[p] for p in parts])):
      logging.info('%s: axis %s of size %d is not divisible by mesh %s; '
                   'replicated.', name, axis, size, parts)
      target = None
    spec.append(target)
  return NamedSharding(mesh, PartitionSpec(*spec))


def row_parts(mesh):
  """Among how many devices the rows of a batch are divided."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def replicated(mesh):
  return NamedSharding(mesh, PartitionSpec())


def rows(mesh, shape):
  """Sharding of an array whose first axis is the batch."""
  return sharding(mesh, ('batch', *(None,) * (len(shape) - 1)), shape)


def adapter(mesh, shapes):
  """Shardings of an adapter, from its shapes (see lora.shapes)."""
  result = {}
  for name, shape in shapes.items():
    layers, out, into = PARAM_AXES[f'layers.{name}']
    result[name] = {
        'a': sharding(mesh, (layers, 'rank', into), shape['a'], name),
        'b': sharding(mesh, (layers, out, 'rank'), shape['b'], name),
    }
  return result


def placer(mesh):
  """`place` for weights.read_params: every device reads its own slices."""

  def place(name, shape, dtype, read):
    where = sharding(mesh, PARAM_AXES[name], shape, name)
    return jax.make_array_from_callback(
        shape, where, lambda index: np.asarray(read(index), dtype))

  return place


def put_rows(mesh, batch):
  """A host's numpy batch as global arrays."""
  hosts = jax.process_count()

  def put(x):
    shape = (x.shape[0] * hosts, *x.shape[1:])
    return jax.make_array_from_process_local_data(rows(mesh, shape), x, shape)

  return {name: put(x) for name, x in batch.items()}


def put_same(mesh, batch):
  """A batch that every host holds whole, its rows spread over the devices."""
  return {name: jax.device_put(x, rows(mesh, x.shape))
          for name, x in batch.items()}
