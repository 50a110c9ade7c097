"""One table decides where every array lives; jit does the rest.

Arrays have logical axes, `config.sharding` sends logical axes to axes of the
mesh, and nothing else in the project places arrays. A dimension that its mesh
axes do not divide is replicated, and the log names it.
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
from ml_collections import ConfigDict

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import families, lora

AXES = ('data', 'fsdp', 'tensor')
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
  """The devices and the table: where arrays of given logical axes live."""

  mesh: jax.sharding.Mesh
  table: dict[str, tuple[str, ...]]  # {logical axis: mesh axes, as a tuple}.
  head_dim: int = 1  # Of the model.

  def of(self, model: families.DecoderConfig) -> Self:
    """The same for a model (families.DecoderConfig), whose heads stay whole."""
    return dataclasses.replace(self, head_dim=model.head_dim)

  @property
  def row_parts(self) -> int:
    """Among how many devices the rows of a batch are divided."""
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
    return int(np.prod([self.mesh.shape[name] for name in self.table[axis]]))

  def sharding(self, axes: Logical, shape: Shape, name: str = '') -> NamedSharding:
    """NamedSharding of an array with the given logical axes and shape."""
    spec = []
    for axis, size in zip(axes, shape, strict=True):
      target = self.table[axis] if axis else ()
      if axis and size % self._parts(axis):
        if name:
          logging.info(
            '%s: %d %s cannot be divided by %s (%d); each device has all.',
            name,
            size,
            axis,
            ' x '.join(target),
            self._parts(axis),
          )
        target = ()
      spec.append(target or None)
    # A mesh axis can divide one dimension alone; what is replicated uses none.
    used = [name for target in spec for name in target or ()]
    if len(set(used)) < len(used):
      raise InputError(
        f'{name or "an activation"} is divided along {", ".join(used)} by '
        f'{", ".join(f"sharding.{a}" for a in axes if a and self.table[a])}; '
        'give them different axes of the mesh.'
      )
    return NamedSharding(self.mesh, PartitionSpec(*spec))

  def weight(self, axes: Logical, shape: Shape, name: str) -> NamedSharding:
    """`sharding` of a weight: heads stay whole."""
    units = [self.head_dim if axis in ('heads', 'kv_heads') else 1 for axis in axes]
    # Half of a head on either device would need both for each position.
    counts = [size // unit for size, unit in zip(shape, units, strict=True)]
    return self.sharding(axes, counts, name)

  def constrain(self, x: jax.Array, axes: Logical) -> jax.Array:
    """Says in a compiled function how an activation is divided."""
    if self.mesh.size == 1:
      return x
    return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

  def rows(self, shape: Shape) -> NamedSharding:
    """Sharding of an array whose first axis is the batch."""
    return self.sharding(('batch', *(None,) * (len(shape) - 1)), shape)

  def host_rows(self, batch: int) -> list[int]:
    """The rows of a batch that devices of this host hold: a sorted list."""
    # They need not be neighbors, as a mesh follows the wires between devices; and a
    # set, as several devices may hold the same.
    parts = self.rows((batch,)).addressable_devices_indices_map((batch,))
    return sorted(
      {row for (rows,) in parts.values() for row in range(*rows.indices(batch))}
    )

  def adapter(
    self, shapes: Mapping[str, Mapping[str, Shape]]
  ) -> dict[str, dict[str, NamedSharding]]:
    """Shardings of an adapter, from its shapes (see lora.shapes)."""
    result = {}
    # As the weights that they are added to, so that no product moves them.
    for name, shape in shapes.items():
      layers, out, into = PARAM_AXES[f'layers.{name}']
      result[name] = {
        'a': self.weight((layers, 'rank', into), shape['a'], f'{name} a'),
        'b': self.weight((layers, out, 'rank'), shape['b'], f'{name} b'),
      }
    return result

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
    """The rows of a batch that a host has read (host_rows), as global arrays.

    `rows`: how many the global batch has.
    """
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
  config: ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Layout:
  """The Layout over all devices; train.batch must divide by its rows.

  `devices`: others than this run's, to compile for.
  """
  table = {axis: tuple(names) for axis, names in config.sharding.items()}
  for axis, names in table.items():
    if len(set(names) & set(AXES)) < len(names):
      raise InputError(
        f'sharding.{axis} is {names}; give axes of the mesh, '
        f'each once: {", ".join(AXES)}.'
      )
  devices = jax.devices() if devices is None else devices
  shape = [config.mesh[axis] for axis in AXES]
  if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
    raise InputError(
      f'mesh is {dict(zip(AXES, shape, strict=True))}; every '
      'axis must be positive and at most one -1.'
    )
  if -1 in shape:
    known = -int(np.prod(shape))  # Of the other axes: the -1 turns the sign.
    # At least 1; where it does not divide them, the product below is another one.
    shape[shape.index(-1)] = max(1, len(devices) // known)
  if np.prod(shape) != len(devices):
    raise InputError(
      f'mesh.data x fsdp x tensor is {" x ".join(map(str, shape))}, but '
      f'there are {len(devices)} devices; make the product equal.'
    )
  ordered = _arrange(shape, devices)
  layout = Layout(
    jax.sharding.Mesh(ordered, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3),
    table,
  )
  batch, accumulate = config.train.batch, config.train.accumulate
  # Every micro-batch is divided by itself.
  if batch % (layout.row_parts * accumulate):
    axes = ' x '.join(f'mesh.{name}' for name in table['batch']) or 'one device'
    raise InputError(
      f'train.batch is {batch}, but {axes} is {layout.row_parts} '
      f'and train.accumulate is {accumulate}; the batch must be a '
      'multiple of their product.'
    )
  return layout


def _arrange(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
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
