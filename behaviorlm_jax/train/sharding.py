"""One table decides where every array lives; jit does the rest.

Arrays have logical axes, TABLE sends these to axes of the mesh, and nothing else
in the project places arrays. A dimension that its mesh axes do not divide is
replicated, and the log names it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import families, lora

AXES = ('data', 'fsdp', 'tensor')
# Which axes of the mesh divide a logical axis. No array has two logical axes that
# share one: a mesh axis can divide one dimension alone.
TABLE = {
  'batch': ('data', 'fsdp'),
  'layers': (),
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'mlp': ('tensor',),
  'vocab': ('tensor',),
  'rank': (),
}
Logical = Sequence[str | None]  # Axes of an array; None: never divided.
Shape = tuple[int, ...]
Read = Callable[[tuple[slice, ...]], np.ndarray]  # Of a part of a weight.
# Of heads and kv_heads a weight has head_dim numbers for each, which stay
# together.
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


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
  """The devices, and where arrays of given logical axes live on them."""

  mesh: jax.sharding.Mesh
  head_dim: int = 1  # Of the model.

  def of(self, model: families.DecoderConfig) -> Self:
    """The same for a model, whose heads stay whole."""
    return dataclasses.replace(self, head_dim=model.head_dim)

  @property
  def row_parts(self) -> int:
    """Among how many devices a batch is divided."""
    return self._parts('batch')

  @functools.cached_property
  def device(self) -> jax.Device:
    """One of this process; of a topology, which belongs to none, its first."""
    devices = self.mesh.devices.flat
    mine = [d for d in devices if d.process_index == jax.process_index()]
    return mine[0] if mine else devices[0]

  @property
  def compiler_options(self) -> dict[str, str] | None:
    """Of programs that multiply divided weights."""
    if self.device.platform != 'tpu':
      return None
    # XLA for TPUs would gather a weight piece by piece and add up each piece's
    # product in memory: of a step of Llama-3.1-8B on 16 v5e chips, 2.8 times the
    # bytes to memory and 1.7 times those between chips (docs/tpu.md). Below so many
    # MiB it does not, which is always.
    return {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}

  @functools.cached_property
  def replicated(self) -> NamedSharding:
    """Of what every device has whole."""
    return NamedSharding(self.mesh, PartitionSpec())

  def _parts(self, axis: str) -> int:
    return int(np.prod([self.mesh.shape[name] for name in TABLE[axis]]))

  def sharding(self, axes: Logical, shape: Shape, name: str = '') -> NamedSharding:
    """Of an array with these logical axes; `name` for the log, if it is to know."""
    spec = []
    for axis, size in zip(axes, shape, strict=True):
      divided = axis is not None and size % self._parts(axis) == 0
      if axis and name and not divided:
        logging.info(
          '%s: %d %s cannot be divided by %s (%d); each device has all.',
          name,
          size,
          axis,
          ' x '.join(TABLE[axis]),
          self._parts(axis),
        )
      spec.append(TABLE[axis] if divided else None)
    return NamedSharding(self.mesh, PartitionSpec(*spec))

  def weight(self, axes: Logical, shape: Shape, name: str) -> NamedSharding:
    """`sharding` of a weight."""
    # Heads stay whole: half of one on either device would need both everywhere.
    units = [self.head_dim if axis in ('heads', 'kv_heads') else 1 for axis in axes]
    counts = [size // unit for size, unit in zip(shape, units, strict=True)]
    return self.sharding(axes, counts, name)

  def constrain(self, x: jax.Array, axes: Logical) -> jax.Array:
    """`x`, divided so in a compiled function."""
    if self.mesh.size == 1:
      return x
    return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

  def rows(self, shape: Shape) -> NamedSharding:
    """Of an array whose first axis is the batch."""
    return self.sharding(('batch', *(None,) * (len(shape) - 1)), shape)

  def host_rows(self, batch: int) -> list[int]:
    """The rows of a batch that devices of this host hold, sorted."""
    # They need not be neighbors, as a mesh follows the wires between devices; and a
    # set, as several devices may hold the same.
    parts = self.rows((batch,)).addressable_devices_indices_map((batch,)).values()
    return sorted({row for (rows,) in parts for row in range(*rows.indices(batch))})

  def adapter(
    self, shapes: Mapping[str, Mapping[str, Shape]]
  ) -> dict[str, dict[str, NamedSharding]]:
    """Of an adapter, from its shapes (see lora.shapes)."""
    places = {}
    # As the weights that they are added to, so that no product moves them.
    for name, shape in shapes.items():
      layers, out, into = PARAM_AXES[f'layers.{name}']
      places[name] = {
        'a': self.weight((layers, 'rank', into), shape['a'], f'{name} a'),
        'b': self.weight((layers, out, 'rank'), shape['b'], f'{name} b'),
      }
    return places

  def place(self, name: str, shape: Shape, dtype: np.dtype, read: Read) -> jax.Array:
    """`place` of weights.read_params: every device reads its own slices."""
    return jax.make_array_from_callback(
      shape,
      self.weight(PARAM_AXES[name], shape, name),
      lambda index: np.asarray(read(index), dtype),
    )

  def abstract(
    self, name: str, shape: Shape, dtype: np.dtype, read: Read
  ) -> jax.ShapeDtypeStruct:
    """As `place`, but shape, dtype and place alone: nothing is read."""
    del read
    return jax.ShapeDtypeStruct(
      shape, dtype, sharding=self.weight(PARAM_AXES[name], shape, name)
    )

  def abstract_rows(self, shape: Shape, dtype: np.dtype) -> jax.ShapeDtypeStruct:
    """The same of an array whose first axis is the batch."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=self.rows(shape))

  def put_rows(
    self, batch: Mapping[str, np.ndarray], rows: int
  ) -> dict[str, jax.Array]:
    """A host's rows (host_rows) of a batch of `rows`, as global arrays."""
    places = {row: place for place, row in enumerate(self.host_rows(rows))}

    def put(x: np.ndarray) -> jax.Array:
      shape = (rows, *x.shape[1:])

      def part(index: tuple[slice, ...]) -> np.ndarray:
        # A device's rows are neighbors in the batch, so among this host's, too.
        start, stop, _ = index[0].indices(rows)
        return x[places[start] : places[stop - 1] + 1]

      return jax.make_array_from_callback(shape, self.rows(shape), part)

    return {name: put(x) for name, x in batch.items()}

  def put_same(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch that every host holds whole, its rows spread over the devices."""
    return {
      name: jax.make_array_from_callback(x.shape, self.rows(x.shape), x.__getitem__)
      for name, x in batch.items()
    }

  def gather(self, tree: lora.Adapter) -> dict[str, dict[str, np.ndarray]]:
    """Global arrays as numpy, whole, on every host."""
    # By a program of all devices: device_get sees no part that other hosts have.
    return jax.device_get(jax.jit(lambda x: x, out_shardings=self.replicated)(tree))


def make_layout(
  mesh: Mapping[str, int],
  train: Mapping[str, int],
  devices: Sequence[jax.Device] | None = None,
) -> Layout:
  """The Layout over all devices, or over others to compile for.

  `mesh` and `train`: sections of the config; a batch must divide by its rows.
  """
  devices = jax.devices() if devices is None else devices
  ordered = _arrange(_mesh_shape(mesh, len(devices)), devices)
  axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
  layout = Layout(jax.sharding.Mesh(ordered, AXES, axis_types=axis_types))
  batch, accumulate = train['batch'], train['accumulate']
  # Every micro-batch is divided by itself.
  if batch % (layout.row_parts * accumulate):
    axes = ' x '.join(f'mesh.{name}' for name in TABLE['batch'])
    raise InputError(
      f'train.batch is {batch}, but {axes} is {layout.row_parts} '
      f'and train.accumulate is {accumulate}; the batch must be a '
      'multiple of their product.'
    )
  return layout


def _mesh_shape(mesh, count):
  """Devices along each of AXES, `count` in all; what -1 stands for is found."""
  shape = [mesh[axis] for axis in AXES]
  if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
    raise InputError(
      f'mesh is {dict(zip(AXES, shape, strict=True))}; every '
      'axis must be positive and at most one -1.'
    )
  if -1 in shape:
    known = -int(np.prod(shape))  # Of the other axes: the -1 turns the sign.
    # At least 1; where it does not divide them, the product below is another one.
    shape[shape.index(-1)] = max(1, count // known)
  if np.prod(shape) != count:
    raise InputError(
      f'mesh.data x fsdp x tensor is {" x ".join(map(str, shape))}, but '
      f'there are {count} devices; make the product equal.'
    )
  return shape


def _arrange(shape, devices):
  """The devices as an array of the mesh's shape, neighbors on wires.

  Slices of TPUs, which only a slower network joins, divide the data axis.
  """
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  # A TPU's wires have two or three directions; an axis may need part of one.
  split = {'allow_split_physical_axes': True}
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, **split)
  if shape[0] % slices:
    raise InputError(
      f'mesh.data is {shape[0]}, but there are {slices} slices, '
      'over which it is divided; make it a multiple.'
    )
  return mesh_utils.create_hybrid_device_mesh(
    (shape[0] // slices, *shape[1:]), (slices, 1, 1), devices, **split
  )
