"""How fast the processors of this machine multiply, and which dtype fastest."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp

_TIMED = 0.05  # Seconds of products that tell a speed.
_ROWS, _FEW = 2048, 64  # Of a product: a short one tells less, a long one takes long.
_LONG = 8e9  # Operations of a long one, for a CPU.
CPU_INFO = Path('/proc/cpuinfo')


def fastest_dtype(backend: str, cpu_info: Path = CPU_INFO) -> str:
  """'bfloat16' or 'float32', the same on every machine of one kind.

  TPUs and GPUs since NVIDIA's Ampere have units for bfloat16, and so have CPUs
  with AMX (3.3 times float32 by XLA, measured on a Xeon). AVX512-BF16 doubles
  the rate of float32 on AMD's processors (measured on an EPYC); on Intel's, XLA
  and torch reach 0.6 of it (measured on a Xeon of model 207 that shows no AMX).
  Hosts of one run must be alike.

  Args:
    backend: jax.default_backend().
    cpu_info: what the Linux kernel says of the processor, if it is there.
  """
  if backend != 'cpu':
    return 'bfloat16'
  words = set(cpu_info.read_text().split()) if cpu_info.exists() else set()
  fast = 'amx_bf16' in words or {'AuthenticAMD', 'avx512_bf16'} <= words
  return 'bfloat16' if fast else 'float32'


def product_speed(width: int, inner: int, dtype: str) -> float:
  """Operations a second that all devices make of products as an MLP has them.

  Timed on one device, for a fraction of a second.

  Args:
    width: of the hidden states, [rows, width].
    inner: of the MLP, [rows, inner].
    dtype: of both and of the weights.
  """
  on_cpu, rows = jax.default_backend() == 'cpu', _ROWS
  if on_cpu:
    rows = min(rows, max(_FEW, int(_LONG / (4 * width * inner))))
  x = jnp.ones((rows, width), dtype)
  # Means of ones are ones, however often they are taken.
  up = jnp.full((inner, width), 1 / width, dtype)
  down = jnp.full((width, inner), 1 / inner, dtype)
  jax.block_until_ready(_multiply(x, up, down, 1))  # Compiled before it is timed.
  times, seconds = 1, 0.0
  while seconds < _TIMED:
    times, begin = 2 * times, time.monotonic()
    jax.block_until_ready(_multiply(x, up, down, times))
    seconds = time.monotonic() - begin
  # Devices of a CPU share its cores.
  devices = jax.process_count() if on_cpu else jax.device_count()
  return devices * 4 * rows * width * inner * times / seconds


@jax.jit
def _multiply(x, up, down, times):
  return jax.lax.fori_loop(0, times, lambda _, x: _dot(_dot(x, up), down), x)


def _dot(x, w):
  # As model/products.py multiplies: added up in float32, and no TF32.
  precision = 'highest' if x.dtype == jnp.float32 else None
  axes = (((1,), (1,)), ((), ()))
  y = jax.lax.dot_general(
    x, w, axes, precision=precision, preferred_element_type=jnp.float32
  )
  return y.astype(x.dtype)
