"""LoRA: initialisation as PEFT's, and the PEFT folder in both directions.

An adapter is `{projection: {'a': [layers, R, in], 'b': [layers, out, R]}}` in
float32: PEFT's matrices, stacked. B starts at zero, so step 0 is exactly the base
model.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax import Array
from safetensors import numpy as safetensors_numpy

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.io import files
from behaviorlm_jax.model import decoder, families

Adapter = dict[str, dict[str, Array]]  # See the module.


def shapes(
  config: families.DecoderConfig, rank: int, targets: Sequence[str]
) -> dict[str, dict[str, tuple[int, ...]]]:
  """{projection: {'a': shape, 'b': shape}} for the chosen projections."""
  unknown = sorted(set(targets) - set(decoder.PROJECTIONS))
  if unknown or not targets:
    raise InputError(
      f'lora.targets: {unknown or "the empty list"} is not a choice of '
      f'projections; choose from {", ".join(decoder.PROJECTIONS)}.'
    )
  kernels = families.parameter_shapes(config)
  result = {}
  for name in targets:
    layers, out, into = kernels[f'layers.{name}']
    result[name] = {'a': (layers, rank, into), 'b': (layers, out, rank)}
  return result


def init(
  config: families.DecoderConfig, rank: int, targets: Sequence[str], key: Array
) -> Adapter:
  """A fresh adapter: A uniform in +-1/sqrt(in), B zero."""
  adapter = {}
  # Sorted, so that the order of lora.targets changes no draw.
  for name, shape in sorted(shapes(config, rank, targets).items()):
    key, draw = jax.random.split(key)
    # As PEFT's kaiming_uniform_(a=sqrt(5)): sqrt(6 / ((1 + 5) * in)).
    bound = shape['a'][-1] ** -0.5
    a = jax.random.uniform(draw, shape['a'], jnp.float32, -bound, bound)
    adapter[name] = {'a': a, 'b': jnp.zeros(shape['b'], jnp.float32)}
  return adapter


def attach(
  config: families.DecoderConfig,
  params: Mapping[str, Array],
  adapter: Adapter | None,
  alpha: float,
  **options: object,
) -> decoder.Decoder:
  """The decoder with base weights `params` and `adapter` (None: bare).

  `options`: fields of decoder.Execution.
  """
  how = decoder.Execution(**options)
  if adapter is None:
    return decoder.Decoder(config, params, how=how)
  # One rank for all projections: _load refuses a rank_pattern.
  rank = next(iter(adapter.values()))['a'].shape[1]
  return decoder.Decoder(config, params, adapter, alpha / rank, how)


_SIDES = {'a': 'lora_A', 'b': 'lora_B'}  # Ours -> PEFT's.


def _key(name: str, layer: int, side: str) -> str:
  """PEFT's name of one side of a projection."""
  module = families.LLAMA_NAMES[f'layers.{name}'].format(layer)
  return f'base_model.model.{module.removesuffix(".weight")}.{_SIDES[side]}.weight'


def export(
  folder: str | Path,
  adapter: Adapter,
  alpha: float,
  base: str | Path,
  revision: str | None = None,
) -> None:
  """Writes `adapter` as a PEFT folder, which is replaced whole.

  `base` is the folder or hub name of the base model, for those who load it, and
  `revision` that of a hub name; PEFT scales by alpha / rank.
  """
  folder = Path(folder)
  # A folder is no file that a rename replaces: whole beside its place first, so
  # that a killed run leaves no half of an adapter under its name.
  half = folder.with_name(folder.name + '.tmp')
  shutil.rmtree(half, ignore_errors=True)  # Of a run that was killed.
  half.mkdir(parents=True)
  tensors = {}
  for name, sides in adapter.items():
    for side, matrices in sides.items():
      for layer, matrix in enumerate(np.asarray(matrices, np.float32)):
        # safetensors writes memory as it lies, without a look at strides.
        tensors[_key(name, layer, side)] = np.ascontiguousarray(matrix)
  safetensors_numpy.save_file(
    tensors, half / 'adapter_model.safetensors', {'format': 'pt'}
  )
  settings = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': str(base),
    'revision': revision,
    'r': next(iter(adapter.values()))['a'].shape[1],
    'lora_alpha': alpha,
    'lora_dropout': 0.0,
    'bias': 'none',
    'init_lora_weights': True,
    'target_modules': sorted(adapter),
  }
  files.write_json(half / 'adapter_config.json', settings)
  shutil.rmtree(folder, ignore_errors=True)
  half.rename(folder)


def read_adapter(folder: str | Path) -> tuple[dict[str, dict[str, np.ndarray]], float]:
  """Reads a PEFT folder: the adapter (numpy, float32) and its alpha.

  Raises InputError where a file is missing, damaged or of another kind of adapter.
  """
  try:
    return _load(Path(folder))
  except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
    raise InputError(
      f'{folder} is no adapter that can be read ({error!r}); '
      'use one that this project exported.'
    ) from error


# Of other kinds of adapters; a plain one has them off, empty or left out.
_FOREIGN = (
  'use_rslora',
  'use_dora',
  'rank_pattern',
  'alpha_pattern',
  'modules_to_save',
  'layers_to_transform',
  'lora_bias',
)


def _load(folder: Path) -> tuple[dict[str, dict[str, np.ndarray]], float]:
  settings = json.loads((folder / 'adapter_config.json').read_text())
  foreign = [name for name in _FOREIGN if settings.get(name)]
  if settings['peft_type'] != 'LORA' or foreign:
    raise ValueError(f'peft_type {settings["peft_type"]}, with {foreign}')
  tensors = safetensors_numpy.load_file(folder / 'adapter_model.safetensors')
  adapter = {}
  for name in settings['target_modules']:
    adapter[name] = {}
    for side in _SIDES:
      matrices = []
      # Popped, so that what is left in the end is what we do not know.
      while (key := _key(name, len(matrices), side)) in tensors:
        matrices.append(tensors.pop(key).astype(np.float32))
      adapter[name][side] = np.stack(matrices)
  if tensors:
    raise ValueError(f'{len(tensors)} more tensors, such as {min(tensors)}')
  return adapter, settings['lora_alpha']
